"""What a page draws from predictions: ROC and reliability.

Shape legend: N crystals, C classes, G grid points, B bins.
"""

from dataclasses import dataclass

import numpy as np

from training.figures import roc
from training.metrics import ECE_BINS, FloatArray, IntArray, ece_bins
from training.proportion import wilson

GRID = np.linspace(0.0, 1.0, 201)
"""False-positive rates at which curves are averaged over classes and seeds."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Stated probability against observed frequency, one entry a bin that is not empty."""

    stated: FloatArray  # (B,), mean probability in the bin
    observed: FloatArray  # (B,), share of crystals for which the statement was right
    low: FloatArray  # (B,), 95 % Wilson interval of `observed`
    high: FloatArray  # (B,)
    count: IntArray  # (B,), predictions in the bin, summed over seeds


def mean_roc(labels_N: IntArray, probabilities_NC: FloatArray) -> FloatArray:
    """True-positive rate at `GRID`, (G,): of class 1 for C = 2, else averaged one-vs-rest.

    The average is over the classes that are present (macro); NaN when only one class is.
    At a false-positive rate where the curve is vertical, its upper end counts.
    """
    classes = [1] if probabilities_NC.shape[1] == 2 else range(probabilities_NC.shape[1])
    curves = []
    for c in classes:
        positive = labels_N == c
        if positive.any() and not positive.all():
            curves.append(np.interp(GRID, *roc(positive, probabilities_NC[:, c])))
    return np.mean(curves, axis=0) if curves else np.full(len(GRID), np.nan)


def reliability(
    labels_N: IntArray, probabilities_NC: FloatArray, *, repeats: int = 1
) -> Reliability:
    """Calibration in `ECE_BINS` equal-width bins.

    C = 2: the probability of class 1 against how often class 1 is true. C > 2: the probability
    of the top class against how often it is the true one (Guo et al. 2017).

    Args:
        labels_N: class indices.
        probabilities_NC: rows of several seeds may be stacked.
        repeats: how many rows belong to one crystal; the Wilson intervals (Wilson 1927) count
            each crystal once, because seeds do not add crystals.
    """
    if probabilities_NC.shape[1] == 2:
        stated_N, right_N = probabilities_NC[:, 1], labels_N == 1
    else:
        stated_N = probabilities_NC.max(axis=1)
        right_N = probabilities_NC.argmax(axis=1) == labels_N
    bins_N = ece_bins(stated_N)
    count = np.bincount(bins_N, minlength=ECE_BINS)
    full = count > 0
    n = count[full]
    stated = np.bincount(bins_N, stated_N, minlength=ECE_BINS)[full] / n
    observed = np.bincount(bins_N, right_N, minlength=ECE_BINS)[full] / n
    low, high = wilson(observed, n / repeats)
    return Reliability(stated, observed, low, high, n)
