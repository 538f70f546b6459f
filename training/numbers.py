"""A quantity without a threshold: its distribution over bins → value, interval, and their errors.

The model of such a question is a classifier of narrow bins of log₁₀ of the quantity, so that it
gives a distribution and not a number alone (histogram regression: Imani & White, ICML 2018). The
median is the value, which of all has the smallest expected absolute error; in a bin, the
distribution is taken to be even.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.comparison import Comparison, paired
from training.metrics import Interval, group_weights, percentile_interval

FloatArray = NDArray[np.float64]
LEVELS = (0.05, 0.5, 0.95)  # lower end, value and upper end of what is told of a crystal


def quantiles(
    edges: Sequence[float], probability_NC: FloatArray, levels: Sequence[float] = LEVELS
) -> FloatArray:
    """(N, len(levels)) quantiles of distributions over C bins.

    Args:
        edges: C + 1, ascending.
        levels: in (0, 1).
    """
    edges_E = np.asarray(edges)
    shares_NC = probability_NC / probability_NC.sum(axis=1, keepdims=True)
    below_NE = np.pad(shares_NC.cumsum(axis=1), ((0, 0), (1, 0)))
    rows, columns = np.arange(len(shares_NC)), []
    for level in levels:
        bin_N = np.minimum((below_NE[:, 1:] < level).sum(axis=1), shares_NC.shape[1] - 1)
        within_N = (level - below_NE[rows, bin_N]) / np.maximum(shares_NC[rows, bin_N], 1e-300)
        columns.append(edges_E[bin_N] + within_N.clip(0, 1) * np.diff(edges_E)[bin_N])
    return np.stack(columns, axis=1)


def errors(
    value_N: FloatArray,
    edges: Sequence[float],
    probability_NC: FloatArray,
    groups_N: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """How well medians and intervals meet the true values, with 95 % intervals over groups.

    `mae` and `rmse` are in the unit of the edges, `r2` is the part of the variance that is
    explained, `coverage` the part of values inside their interval, 0.9 if it is honest.
    """
    samples = _samples(value_N, edges, probability_NC, group_weights(groups_N, resamples, seed))
    return {
        name: Interval(float(of[0]), *percentile_interval(of[1:], groups_N))
        for name, of in samples.items()
    }


def paired_errors(
    value_N: FloatArray,
    edges: Sequence[float],
    probability_NC: FloatArray,
    reference_NC: FloatArray,
    groups_N: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """The same of two models, both judged on the same resamples of the groups."""
    drawn_RN = group_weights(groups_N, resamples, seed)
    own, rival = (
        _samples(value_N, edges, each, drawn_RN) for each in (probability_NC, reference_NC)
    )
    return {name: paired(own[name], rival[name], groups_N) for name in own}


def _samples(
    value_N: FloatArray,
    edges: Sequence[float],
    probability_NC: FloatArray,
    drawn_RN: NDArray[np.int32],
) -> dict[str, FloatArray]:
    """(1 + R,) of each kind of error: of the whole set, then of each resample."""
    low_N, middle_N, high_N = quantiles(edges, probability_NC).T
    weights_RN = np.concatenate([np.ones((1, len(value_N))), drawn_RN])
    total_R = weights_RN.sum(axis=1)
    miss_N = middle_N - value_N
    mean_R = weights_RN @ value_N / total_R
    variance_R = weights_RN @ value_N**2 / total_R - mean_R**2
    squared_R = weights_RN @ miss_N**2 / total_R
    return {
        "mae": weights_RN @ np.abs(miss_N) / total_R,
        "rmse": np.sqrt(squared_R),
        "r2": 1 - squared_R / np.maximum(variance_R, 1e-300),
        "coverage": weights_RN @ ((low_N <= value_N) & (value_N <= high_N)) / total_R,
    }
