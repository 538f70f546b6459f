"""How well probabilities match labels, with intervals from a bootstrap over groups of crystals.

Shape legend: N crystals, C classes, R weightings (bootstrap resamples), P positive and M negative
crystals of one class against the rest, B confidence bins.

Every metric takes a weight for each crystal; a weight of k means the crystal counts k times. A
whole bootstrap is therefore one call of `score` with the (R, N) counts of `group_weights`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ECE_BINS = 15  # Guo et al. 2017, section 4
CONFIDENCE = 0.95
_BLOCK = 2**19  # weights in float64 held at a time (4 MB), with about eight arrays of that size


@dataclass(frozen=True, slots=True)
class Metric:
    """What a reader needs to interpret a metric; it is dimensionless and lies in [low, high]."""

    title: str
    low: float
    high: float


METRICS: dict[str, Metric] = {
    "auroc": Metric("AUROC", 0.0, 1.0),
    "average_precision": Metric("average precision", 0.0, 1.0),
    "balanced_accuracy": Metric("balanced accuracy", 0.0, 1.0),
    "f1": Metric("F1", 0.0, 1.0),
    "mcc": Metric("Matthews correlation", -1.0, 1.0),
    "ece": Metric("expected calibration error", 0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its 95 % interval; NaN where the data do not define it."""

    value: float
    low: float
    high: float


def group_weights(groups_N: Sequence[str], resamples: int, seed: int) -> NDArray[np.int32]:
    """Counts (R, N) of a cluster bootstrap: groups are drawn with replacement, whole.

    Each resample draws as many groups as there are; a crystal counts as often as its group was
    drawn (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8,
    strategy 1). The draw depends on the set of group names, on `resamples` and on `seed`, not on
    the order of the crystals.
    """
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: must be at least 1; 1000 is usual")
    names, member_N = np.unique(np.asarray(groups_N, dtype=np.str_), return_inverse=True)
    random = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(groups_N)), dtype=np.int32)
    if len(names):
        for row in weights:
            drawn = random.integers(len(names), size=len(names), dtype=np.int32)
            row[:] = np.bincount(drawn, minlength=len(names))[member_N]
    return weights


def score(
    labels_N: ArrayLike, probabilities_NC: ArrayLike, weights_RN: ArrayLike | None = None
) -> dict[str, FloatArray]:
    """All `METRICS`, each as (R,), for R weightings of the crystals (one of all ones when None).

    With C = 2, class 1 is the positive one; with C > 2, "macro" is the plain mean over the classes
    present, i.e. those that at least one label names, each against the rest. The predicted class
    is the most probable one, the first of equals.

    - `auroc`: probability that a positive outranks a negative, ties counting ½ (Mann–Whitney;
      Hanley and McNeil 1982); macro one-against-rest.
    - `average_precision`: Σₙ (Rₙ − Rₙ₋₁) Pₙ over the distinct scores, without interpolation, as in
      scikit-learn; macro one-against-rest.
    - `balanced_accuracy`: mean recall over the classes present (Brodersen et al. 2010).
    - `f1`: 2 TP / (2 TP + FP + FN) of the positive class; macro for C > 2.
    - `mcc`: R_K (Gorodkin 2004), for C = 2 the Matthews correlation; 0 when all predictions are of
      one class.
    - `ece`: Σ_b (n_b/n) |accuracy_b − confidence_b| (Guo et al. 2017, eq. 3) over 15 equal bins
      (lower, upper] of the confidence, which is the probability of the predicted class; for C = 2
      too, so that only confidences from ½ to 1 occur, not of the probability of class 1.

    A weighting in which a class present has no weight gives NaN for all but `ece`, and so does a
    set with fewer than two classes; no weight at all gives NaN for `ece` too. Nothing is raised or
    warned about. Integer weights give what repeated rows give.

    Raises ValueError for labels that are not integers 0 … C − 1, probabilities that are not
    finite, outside [0, 1] or do not add to 1 within 0.01, negative or non-finite weights, and
    shapes that do not fit.
    """
    labels, probabilities = _checked(labels_N, probabilities_NC)
    number, classes = probabilities.shape
    weights = np.ones((1, number)) if weights_RN is None else _checked_weights(weights_RN, number)
    present = np.unique(labels)
    ranked = present if classes > 2 else [1]
    rankings = [_ranking(labels == c, probabilities[:, c]) for c in ranked]
    cells_NK = _one_hot(labels * classes + probabilities.argmax(axis=1), classes * classes)
    gaps_NB = _calibration_gaps(labels, probabilities)

    result = {name: np.full(len(weights), np.nan) for name in METRICS}
    step = max(1, _BLOCK // max(number, 1))
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        block_RN = weights[rows].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            result["ece"][rows] = np.abs(block_RN @ gaps_NB).sum(axis=1) / block_RN.sum(axis=1)
            if len(present) < 2:
                continue
            matrix_RCC = (block_RN @ cells_NK).reshape(-1, classes, classes)
            found = _from_confusion(matrix_RCC, present)
            # Crystals lead: sorting and cumulating then move whole contiguous rows.
            block_NR = np.ascontiguousarray(block_RN.T)
            pairs = np.stack([_auroc_and_precision(r, block_NR) for r in rankings])
            found["auroc"], found["average_precision"] = pairs.mean(axis=0)
        missing = (matrix_RCC.sum(axis=2)[:, present] == 0).any(axis=1)
        for name, values in found.items():
            result[name][rows] = np.where(missing, np.nan, values)
    return result


def confusion_matrix(labels_N: ArrayLike, probabilities_NC: ArrayLike) -> IntArray:
    """Counts (C, C): rows are true classes, columns predicted ones.

    Predicted is the most probable class, the first of equals: for C = 2, class 1 above ½. Raises
    ValueError as `score` does.
    """
    labels, probabilities = _checked(labels_N, probabilities_NC)
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def evaluate(
    labels_N: ArrayLike,
    probabilities_NC: ArrayLike,
    groups_N: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Every metric on the whole set, with a 95 % percentile interval of a bootstrap over groups.

    The interval covers the choice of the crystals, not the training of the network. Resamples
    where a metric is not defined (see `score`) are left out; with fewer than two groups nothing
    can be resampled and the interval is NaN.

    Raises ValueError as `score` does, or when `groups_N` has another length than `labels_N`.
    """
    whole = score(labels_N, probabilities_NC)
    number = len(np.asarray(labels_N))
    if len(groups_N) != number:
        raise ValueError(f"groups_N has {len(groups_N)} entries for {number} labels; give one each")
    samples = score(labels_N, probabilities_NC, group_weights(groups_N, resamples, seed))
    return {
        name: Interval(float(whole[name][0]), *percentile_interval(samples[name], groups_N))
        for name in METRICS
    }


def percentile_interval(samples_R: FloatArray, groups_N: Sequence[str]) -> tuple[float, float]:
    """Central 95 % of the bootstrap samples that are numbers.

    NaN, NaN when none is, or when `groups_N` has fewer than two groups, so that all resamples are
    alike.
    """
    defined = samples_R[~np.isnan(samples_R)]
    if not len(defined) or len(set(groups_N)) < 2:
        return float("nan"), float("nan")
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(defined, (tail, 1.0 - tail))
    return float(low), float(high)


def ece_bins(confidence_N: FloatArray) -> IntArray:
    """(N,) numbers of the `ECE_BINS` equal bins (lower, upper] of [0, 1]."""
    edges = np.linspace(0, 1, ECE_BINS + 1)
    return np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, ECE_BINS - 1)


def _checked(labels_N: ArrayLike, probabilities_NC: ArrayLike) -> tuple[IntArray, FloatArray]:
    labels = np.asarray(labels_N)
    probabilities = np.asarray(probabilities_NC, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(f"probabilities_NC has shape {probabilities.shape}; give (N, C ≥ 2)")
    number, classes = probabilities.shape
    if labels.shape != (number,):
        raise ValueError(f"labels_N has shape {labels.shape}; give ({number},), one for each row")
    if number and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels_N has type {labels.dtype}; give integers 0 … {classes - 1}")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise ValueError(
            f"labels_N[{outside[0]}] = {labels[outside[0]]} is not in 0 … {classes - 1}; "
            "give a column of probabilities to every class"
        )
    # NaN fails every comparison: hence not (inside) rather than (outside).
    fine = (probabilities >= 0) & (probabilities <= 1)
    bad = np.flatnonzero(~(fine.all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) <= 0.01)))
    if len(bad):
        raise ValueError(
            f"probabilities_NC[{bad[0]}] = {probabilities[bad[0]].tolist()}: must be finite, in "
            "[0, 1] and add to 1; apply a softmax first if these are logits"
        )
    return labels.astype(np.int64), probabilities


def _checked_weights(weights_RN: ArrayLike, number: int) -> NDArray[np.number]:
    weights = np.asarray(weights_RN)
    if weights.ndim != 2 or weights.shape[1] != number:
        raise ValueError(f"weights_RN has shape {weights.shape}; give (R, {number})")
    # The extremes tell of NaN and infinities without an array as large as the weights.
    if weights.size and not (weights.min() >= 0 and weights.max() < np.inf):
        raise ValueError("weights_RN has negative or non-finite entries; give counts ≥ 0")
    return weights


@dataclass(frozen=True, slots=True)
class _Ranking:
    """One class against the rest in descending order of the score, whatever the weights."""

    positives: IntArray  # (P,), crystals of the class
    negatives: IntArray  # (M,), the others
    reached: IntArray  # (P,), number of positives whose score is at least that of this positive
    above: IntArray  # (P,), number of negatives whose score is higher
    through: IntArray  # (P,), number of negatives whose score is at least as high


def _ranking(positive_N: NDArray[np.bool_], score_N: FloatArray) -> _Ranking:
    order = np.argsort(-score_N, kind="stable")
    positives, negatives = order[positive_N[order]], order[~positive_N[order]]
    own, other = -score_N[positives], -score_N[negatives]
    return _Ranking(
        positives=positives,
        negatives=negatives,
        reached=np.searchsorted(own, own, side="right"),
        above=np.searchsorted(other, own, side="left"),
        through=np.searchsorted(other, own, side="right"),
    )


def _auroc_and_precision(ranking: _Ranking, weights_NR: FloatArray) -> FloatArray:
    """AUROC and average precision, (2, R), of one class; NaN where they are undefined."""
    own_PR: FloatArray = weights_NR[ranking.positives]
    positive = _cumulated(own_PR)
    negative = _cumulated(weights_NR[ranking.negatives])
    true, false = positive[ranking.reached], negative[ranking.through]
    lost: FloatArray = np.einsum("pr,pr->r", own_PR, negative[ranking.above] + false) / 2
    # A positive without weight may have nothing above it: it adds nothing, whatever its precision.
    called = np.maximum(true + false, np.finfo(np.float64).tiny)
    gained: FloatArray = np.einsum("pr,pr->r", own_PR, true / called)
    return np.stack([1 - lost / (positive[-1] * negative[-1]), gained / positive[-1]])


def _cumulated(rows_PR: FloatArray) -> FloatArray:
    """Sums of the first 0, 1, … P rows, (P + 1, R)."""
    sums = np.zeros((len(rows_PR) + 1, rows_PR.shape[1]))
    np.cumsum(rows_PR, axis=0, out=sums[1:])
    return sums


def _from_confusion(matrix_RCC: FloatArray, present: IntArray) -> dict[str, FloatArray]:
    """Metrics of the predicted class, each (R,); `present` are the classes that labels name."""
    hits_RC = np.diagonal(matrix_RCC, axis1=1, axis2=2)
    true_RC, called_RC = matrix_RCC.sum(axis=2), matrix_RCC.sum(axis=1)
    counted = present if matrix_RCC.shape[1] > 2 else [1]
    square = true_RC.sum(axis=1) ** 2
    covariance = hits_RC.sum(axis=1) * np.sqrt(square) - (true_RC * called_RC).sum(axis=1)
    spread_true = square - (true_RC**2).sum(axis=1)
    spread_called = square - (called_RC**2).sum(axis=1)
    # Weights that are not whole leave a rounding error where all predictions are of one class.
    varied = spread_called > 1e-12 * square
    return {
        "balanced_accuracy": (hits_RC / true_RC)[:, present].mean(axis=1),
        "f1": (2 * hits_RC / (true_RC + called_RC))[:, counted].mean(axis=1),
        "mcc": np.where(varied, covariance / np.sqrt(spread_true * spread_called), 0.0),
    }


def _one_hot(column_N: IntArray, columns: int) -> FloatArray:
    hot = np.zeros((len(column_N), columns))
    hot[np.arange(len(column_N)), column_N] = 1.0
    return hot


def _calibration_gaps(labels_N: IntArray, probabilities_NC: FloatArray) -> FloatArray:
    """(N, B): accuracy minus confidence of each crystal in the column of its bin, else 0."""
    confidence = probabilities_NC.max(axis=1)
    gap: FloatArray = (probabilities_NC.argmax(axis=1) == labels_N) - confidence
    return _one_hot(ece_bins(confidence), ECE_BINS) * gap[:, None]
