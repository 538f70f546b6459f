"""Deep ensembles: how unsure they are, and whether they are wrong where they are unsure.

Lakshminarayanan et al., NeurIPS 2017: networks of one recipe and different seeds; the answer is
the mean of their probabilities.

Shape legend: M members, N crystals, C classes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.metrics import Interval, group_weights, percentile_interval, score
from training.proportion import proportion

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The answer of an ensemble, and two measures of its doubt."""

    probabilities_NC: FloatArray  # mean over members
    spread_N: FloatArray  # standard deviation over members of the predicted class's probability
    entropy_N: FloatArray  # nats, of the mean


@dataclass(frozen=True, slots=True)
class Quantile:
    """Crystals between two quantiles of the uncertainty, from sure to unsure."""

    low: float
    high: float
    count: int
    error: Interval  # share of wrong predictions


@dataclass(frozen=True, slots=True)
class DoubtAndError:
    """How an uncertainty goes with being wrong."""

    quantiles: list[Quantile]
    auroc: Interval  # probability that a wrong crystal is less sure than a right one; ½: useless
    area: Interval  # under the risk–coverage curve; the error rate: useless
    least_area: float  # of an uncertainty that ranks every wrong crystal last
    error: Interval


def combine(probabilities_MNC: ArrayLike) -> Ensemble:
    """Members' probabilities → mean and doubts.

    With one member the spread is 0.

    Raises ValueError for no member, or entries that are no probabilities.
    """
    members = np.asarray(probabilities_MNC, dtype=np.float64)
    if members.ndim != 3 or not len(members):
        raise ValueError(f"probabilities_MNC has shape {members.shape}; give (M ≥ 1, N, C)")
    if not ((members >= 0).all() and (np.abs(members.sum(axis=2) - 1) <= 0.01).all()):
        raise ValueError("probabilities_MNC must be in [0, 1] and add to 1 over the classes")
    mean_NC = members.mean(axis=0)
    own_MN = members[:, np.arange(len(mean_NC)), mean_NC.argmax(axis=1)]
    return Ensemble(
        probabilities_NC=mean_NC,
        spread_N=own_MN.std(axis=0, ddof=min(1, len(members) - 1)),
        entropy_N=_entropy(mean_NC),
    )


def risk_coverage(wrong_N: ArrayLike, uncertainty_N: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Coverage 1/N, 2/N, … 1 and the error rate (N,) among so many of the surest crystals.

    The mean of the latter is the area under the curve (Geifman and El-Yaniv, NeurIPS 2017). Equal
    uncertainties come in random order, of which this is the expectation.
    """
    wrong = np.asarray(wrong_N, dtype=np.float64)
    _, place, count = np.unique(np.asarray(uncertainty_N), return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(place, wrong, len(count)) / count, count)
    number = np.arange(1, len(wrong) + 1)
    return number / max(len(wrong), 1), expected.cumsum() / number


def doubt_and_error(
    wrong_N: ArrayLike,
    uncertainty_N: ArrayLike,
    groups_N: Sequence[str],
    *,
    quantiles: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> DoubtAndError:
    """Error rate by quantile of the uncertainty, its AUROC for being wrong, risk–coverage area.

    Intervals of `auroc` and `area` are of a bootstrap over groups, those of error rates of
    `proportion`. Crystals of equal uncertainty share a quantile, of which there may be fewer then.
    NaN where there is nothing wrong, nothing right, or nothing at all.

    Raises ValueError for lengths that differ or an uncertainty that is not finite.
    """
    wrong, uncertainty = np.asarray(wrong_N, dtype=np.bool_), np.asarray(uncertainty_N)
    groups = np.asarray(groups_N, dtype=np.str_)
    if not len(wrong) == len(uncertainty) == len(groups):
        raise ValueError(
            f"wrong_N, uncertainty_N and groups_N have {len(wrong)}, {len(uncertainty)} and "
            f"{len(groups)} entries; give one each a crystal"
        )
    if not np.isfinite(uncertainty).all():
        raise ValueError("uncertainty_N must be finite")
    names = groups.tolist()
    # The whole set first. Together they would take twice the memory for a moment.
    weightings = np.ones((1, len(wrong)), np.int32), group_weights(names, resamples, seed)
    _, place_N = np.unique(uncertainty, return_inverse=True)
    rank_N = place_N / max(len(wrong), 1)  # in [0, 1), as `score` wants it; ties stay ties
    ranked = np.stack([1 - rank_N, rank_N], axis=1)
    errors_N = wrong.astype(np.int64)
    auroc_R = np.concatenate([score(errors_N, ranked, each)["auroc"] for each in weightings])
    area_R = np.array(
        [_area(np.repeat(wrong, w), np.repeat(rank_N, w)) for each in weightings for w in each]
    )
    errors = int(wrong.sum())
    return DoubtAndError(
        quantiles=_by_quantile(wrong, uncertainty, groups, quantiles),
        auroc=Interval(float(auroc_R[0]), *percentile_interval(auroc_R[1:], names)),
        area=Interval(float(area_R[0]), *percentile_interval(area_R[1:], names)),
        least_area=_area(np.arange(len(wrong)) >= len(wrong) - errors, np.arange(len(wrong))),
        error=proportion(wrong, names),
    )


def _by_quantile(
    wrong_N: NDArray[np.bool_],
    uncertainty_N: FloatArray,
    groups_N: NDArray[np.str_],
    quantiles: int,
) -> list[Quantile]:
    if not len(wrong_N):
        return []
    edges = np.quantile(uncertainty_N, np.linspace(0, 1, quantiles + 1)[1:-1], method="lower")
    quantile_N = np.searchsorted(np.unique(edges), uncertainty_N, side="left")
    table = []
    for number in np.unique(quantile_N):
        rows = quantile_N == number
        own = uncertainty_N[rows]
        error = proportion(wrong_N[rows], groups_N[rows].tolist())
        table.append(Quantile(float(own.min()), float(own.max()), int(rows.sum()), error))
    return table


def _area(wrong_N: ArrayLike, uncertainty_N: ArrayLike) -> float:
    _, risk_N = risk_coverage(wrong_N, uncertainty_N)
    return float(risk_N.mean()) if len(risk_N) else float("nan")


def _entropy(probabilities: FloatArray) -> FloatArray:
    logarithm = np.log(np.where(probabilities > 0, probabilities, 1.0))
    entropy: FloatArray = -(probabilities * logarithm).sum(axis=-1)
    return entropy
