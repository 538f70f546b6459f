"""Do probabilities mean what they say? Temperature scaling, a diagnostic, and the table for it.

Shape legend: N crystals, C classes, B confidence bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.metrics import ECE_BINS, Interval, confusion_matrix, ece_bins
from training.proportion import proportion

FloatArray = NDArray[np.float64]

TEMPERATURES = (0.01, 100.0)  # least and greatest; separable classes would ask for 0
_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Bin:
    """Crystals whose confidence lies in (low, high]; NaN where there is none."""

    low: float
    high: float
    count: int
    confidence: float  # mean
    accuracy: Interval


def scaled(logits_NC: ArrayLike, temperature: float) -> FloatArray:
    """Softmax of logits / T, (N, C) in float64. Logarithms of probabilities serve as logits."""
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be above 0")
    logits = np.asarray(logits_NC, dtype=np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def log_loss(labels_N: ArrayLike, logits_NC: ArrayLike, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the labels, nats; it is what the temperature lowers."""
    labels, logits = _checked(labels_N, logits_NC)
    logits = (logits - logits.max(axis=1, keepdims=True)) / temperature
    own = logits[np.arange(len(labels)), labels]
    return float((np.log(np.exp(logits).sum(axis=1)) - own).mean())


def fit_temperature(labels_N: ArrayLike, logits_NC: ArrayLike) -> float:
    """The temperature T of least log loss on these crystals; give validation, never test.

    One parameter for all classes (Guo et al. 2017, section 4.2). The predicted classes stay, and
    with C = 2 so does every ranking. The log loss is convex in 1/T, so that the sign of its slope
    Σ (E_p[z] − z_label) leads to the least by bisection of log T within `TEMPERATURES`. T = 1 is
    kept unless the loss falls.

    Raises ValueError for no crystals, logits that are not finite, or labels that do not fit.
    """
    labels, logits = _checked(labels_N, logits_NC)
    if not len(labels):
        raise ValueError("labels_N is empty: give validation crystals to fit a temperature")
    own = logits[np.arange(len(labels)), labels]
    low, high = np.log(TEMPERATURES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = (scaled(logits, float(np.exp(middle))) * logits).sum(axis=1)
        # Means above the labels' logits: the network is too sure of itself, T must grow.
        if (expected - own).sum() > 0:
            low = middle
        else:
            high = middle
    temperature = float(np.clip(np.exp((low + high) / 2), *TEMPERATURES))
    better = log_loss(labels, logits, temperature) < log_loss(labels, logits)
    return temperature if better else 1.0


def reliability(
    labels_N: ArrayLike, probabilities_NC: ArrayLike, groups_N: Sequence[str]
) -> list[Bin]:
    """Confidence against accuracy in the bins of the expected calibration error.

    Confidence is the probability of the predicted class, as for `ece` of `training.metrics`: the
    mean of |accuracy − confidence| weighted by `count` is that error. The interval of the accuracy
    is that of `proportion`. Raises ValueError as `training.metrics.score` does.
    """
    confusion_matrix(labels_N, probabilities_NC)  # raises for what is not probabilities
    labels, probabilities = np.asarray(labels_N), np.asarray(probabilities_NC, dtype=np.float64)
    groups = np.asarray(groups_N, dtype=np.str_)
    if len(groups) != len(labels):
        raise ValueError(f"groups_N has {len(groups)} entries for {len(labels)} labels")
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bin_N = ece_bins(confidence)
    table = []
    for number, (low, high) in enumerate(pairwise(np.linspace(0, 1, ECE_BINS + 1).tolist())):
        inside = bin_N == number
        count = int(inside.sum())
        table.append(
            Bin(
                low=low,
                high=high,
                count=count,
                confidence=float(confidence[inside].mean()) if count else float("nan"),
                accuracy=proportion(right[inside], groups[inside].tolist()),
            )
        )
    return table


def _checked(labels_N: ArrayLike, logits_NC: ArrayLike) -> tuple[NDArray[np.int64], FloatArray]:
    labels, logits = np.asarray(labels_N), np.asarray(logits_NC, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits_NC has shape {logits.shape} and labels_N {labels.shape}; give (N, C ≥ 2), (N,)"
        )
    if not np.isfinite(logits).all():
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise ValueError(f"logits_NC[{row}] = {logits[row].tolist()}: must be finite")
    classes = logits.shape[1]
    fine = np.issubdtype(labels.dtype, np.integer) and (labels >= 0).all()
    if len(labels) and not (fine and (labels < classes).all()):
        raise ValueError(f"labels_N must be integers 0 … {classes - 1}")
    return labels.astype(np.int64), logits
