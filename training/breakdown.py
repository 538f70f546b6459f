"""Where a model is good: metrics of each part of the crystals, and of each class.

Shape legend: N crystals, C classes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.metrics import Interval, evaluate, group_weights, percentile_interval, score

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the crystals, with how many of them there are and what a model scores on them."""

    structures: int
    groups: int
    class_counts: list[int]  # (C,)
    metrics: dict[str, Interval]


def by_part(
    labels_N: ArrayLike,
    probabilities_NC: ArrayLike,
    parts_N: Sequence[str],
    groups_N: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Part]:
    """`evaluate` on the crystals of each part, such as each crystal system; parts sorted by name.

    A part in which fewer than two classes occur has NaN for all metrics but `ece`; break the task
    whose classes are the parts down by `by_class`. A part of few crystals has a wide interval, or
    with a single group none: do not read its value without. Raises ValueError as `evaluate` does.
    """
    score(labels_N, probabilities_NC)  # raises for what is not probabilities
    labels, probabilities = np.asarray(labels_N), np.asarray(probabilities_NC)
    parts, groups = np.asarray(parts_N, dtype=np.str_), np.asarray(groups_N, dtype=np.str_)
    if not len(labels) == len(parts) == len(groups):
        raise ValueError(
            f"parts_N has {len(parts)} and groups_N {len(groups)} entries for {len(labels)} labels"
        )
    answer = {}
    for name in np.unique(parts):
        rows = parts == name
        own = groups[rows].tolist()
        metrics = evaluate(labels[rows], probabilities[rows], own, resamples=resamples, seed=seed)
        counts = np.bincount(labels[rows], minlength=probabilities.shape[1]).tolist()
        answer[str(name)] = Part(int(rows.sum()), len(set(own)), counts, metrics)
    return answer


def by_class(
    labels_N: ArrayLike,
    probabilities_NC: ArrayLike,
    groups_N: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Interval]]:
    """For each of C classes `recall`, `precision`, `f1`, `auroc` and `average_precision`.

    The first three are of the predicted class, the most probable one; the last two rank all
    crystals by the probability of the class against the rest. Intervals are of one bootstrap over
    groups, and cover the choice of crystals. NaN where a class is never true (or, for `precision`,
    never predicted). Raises ValueError as `training.metrics.score` does.
    """
    score(labels_N, probabilities_NC)  # raises for what is not probabilities
    labels = np.asarray(labels_N)
    probabilities = np.asarray(probabilities_NC, dtype=np.float64)
    if len(groups_N) != len(labels):
        raise ValueError(f"groups_N has {len(groups_N)} entries for {len(labels)} labels")
    # The whole set first. Together they would take twice the memory for a moment.
    weightings = np.ones((1, len(labels)), np.int32), group_weights(groups_N, resamples, seed)
    predicted = probabilities.argmax(axis=1)
    answer = []
    for number in range(probabilities.shape[1]):
        true, called = labels == number, predicted == number
        counted = np.stack([true & called, true, called], axis=1).astype(np.float64)
        hits_R, true_R, called_R = np.array([w @ counted for each in weightings for w in each]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            samples = {
                "recall": hits_R / true_R,
                "precision": hits_R / called_R,
                "f1": np.where(true_R > 0, 2 * hits_R / (true_R + called_R), np.nan),
            }
        own = np.clip(probabilities[:, number], 0, 1)
        shares = np.stack([1 - own, own], axis=1)
        ranked = [score(true.astype(np.int64), shares, each) for each in weightings]
        for name in ("auroc", "average_precision"):
            samples[name] = np.concatenate([each[name] for each in ranked])
        answer.append(
            {
                name: Interval(float(values[0]), *percentile_interval(values[1:], groups_N))
                for name, values in samples.items()
            }
        )
    return answer
