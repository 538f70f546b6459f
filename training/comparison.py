"""Which of two models is better on the same crystals: DeLong's test, and a paired bootstrap.

Both speak of new crystals, not of new trainings: two networks of one recipe and two seeds differ
too, so compare ensembles, or several seeds of each as `ablation.stats.effect_table` does.

Shape legend: N crystals, C classes, P positive and M negative crystals, R resamples, G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.metrics import (
    CONFIDENCE,
    METRICS,
    Interval,
    group_weights,
    percentile_interval,
    score,
)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A metric of a model and of its reference; NaN where the data do not define it."""

    value: float
    reference: float
    difference: Interval  # value − reference
    p: float  # two-sided, of no difference


def delong(
    labels_N: ArrayLike,
    probabilities_NC: ArrayLike,
    reference_NC: ArrayLike,
    groups_N: Sequence[str],
) -> Comparison:
    """AUROC of two models (C = 2) with DeLong's test for correlated AUROCs.

    The variance of the difference comes from what each crystal adds to it (DeLong, DeLong and
    Clarke-Pearson, Biometrics 44, 837, 1988), by midranks (Sun and Xu, IEEE Signal Process. Lett.
    21, 1389, 2014) in N log N steps. Crystals of a group are not independent: their parts are
    summed first (Obuchowski, Biometrics 53, 567, 1997), which with groups of one crystal is
    DeLong's variance. The interval is symmetric and normal; without variance and without a
    difference, p is 1. Fewer than two groups with a positive, or with a negative, give NaN.

    Raises ValueError as `training.metrics.score` does, and for C > 2.
    """
    if np.shape(probabilities_NC)[1:] != (2,):
        raise ValueError(
            f"probabilities_NC has shape {np.shape(probabilities_NC)}; DeLong's test is for two "
            "classes: compare more with paired_bootstrap"
        )
    value, reference = (
        float(score(labels_N, p)["auroc"][0]) for p in (probabilities_NC, reference_NC)
    )
    positive = np.asarray(labels_N) == 1
    parts = [placements(positive, np.asarray(p)[:, 1]) for p in (probabilities_NC, reference_NC)]
    difference = value - reference
    names, member_N = np.unique(np.asarray(groups_N, dtype=np.str_), return_inverse=True)
    if len(member_N) != len(positive):
        raise ValueError(f"groups_N has {len(member_N)} entries for {len(positive)} labels")
    own_N = parts[0] - parts[1] - difference
    # Twice (G,): the parts of the positives, and of the negatives, summed over the group.
    sides = (positive, ~positive)
    sums = [np.bincount(member_N[s], own_N[s], len(names)) / max(s.sum(), 1) for s in sides]
    groups = [len(np.unique(member_N[s])) for s in sides]
    if min(groups) < 2:
        nothing = Interval(difference, math.nan, math.nan)
        return Comparison(value, reference, nothing, math.nan)
    variance = sum(k / (k - 1) * float(s @ s) for k, s in zip(groups, sums, strict=True))
    variance += 2 * len(names) / (len(names) - 1) * float(sums[0] @ sums[1])
    deviation = math.sqrt(max(variance, 0.0))
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation
    interval = Interval(difference, difference - half, difference + half)
    if deviation < 1e-12:
        return Comparison(value, reference, interval, float(abs(difference) < 1e-12))
    p = math.erfc(abs(difference) / deviation / math.sqrt(2))
    return Comparison(value, reference, interval, p)


def paired_bootstrap(
    labels_N: ArrayLike,
    probabilities_NC: ArrayLike,
    reference_NC: ArrayLike,
    groups_N: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """All `METRICS` of two models, both judged on the same resamples of the groups.

    The interval is the percentile one. p is 2 min(share of differences ≤ 0, share ≥ 0), the
    observed resamples counted with one more on either side (Davison and Hinkley 1997, section
    4.2), hence never below 2 / (R + 1): the level at which the interval would begin to hold 0.
    Resamples where a metric is not defined are left out.

    Raises ValueError as `training.metrics.evaluate` does, or for two shapes of probabilities.
    """
    if np.shape(probabilities_NC) != np.shape(reference_NC):
        raise ValueError(
            f"probabilities_NC has shape {np.shape(probabilities_NC)} and reference_NC "
            f"{np.shape(reference_NC)}; compare models of the same crystals and classes"
        )
    if len(groups_N) != np.shape(labels_N)[0]:
        raise ValueError(f"groups_N has {len(groups_N)} entries for {np.shape(labels_N)[0]} labels")
    drawn_RN = group_weights(groups_N, resamples, seed)
    weights_RN = np.concatenate([np.ones_like(drawn_RN[:1]), drawn_RN])  # the whole set first
    first = score(labels_N, probabilities_NC, weights_RN)
    second = score(labels_N, reference_NC, weights_RN)
    return {name: paired(first[name], second[name], groups_N) for name in METRICS}


def paired(first_R: FloatArray, second_R: FloatArray, groups_N: Sequence[str]) -> Comparison:
    """A metric of two models, of the whole set and then of the same resamples of the groups."""
    difference_R = first_R - second_R
    low, high = percentile_interval(difference_R[1:], groups_N)
    return Comparison(
        value=float(first_R[0]),
        reference=float(second_R[0]),
        difference=Interval(float(difference_R[0]), low, high),
        p=math.nan if math.isnan(low) else _p(difference_R[1:]),
    )


def _p(difference_R: FloatArray) -> float:
    defined = difference_R[~np.isnan(difference_R)]
    fewest = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (fewest + 1) / (len(defined) + 1))


def placements(positive_N: NDArray[np.bool_], score_N: FloatArray) -> FloatArray:
    """(N,) share of the other class that a crystal ranks rightly against, ties counting ½.

    The mean over either class is the AUROC. NaN where the other class is empty.
    """
    placement = np.empty(len(score_N))
    rank = _midranks(score_N)
    own, other = rank[positive_N], rank[~positive_N]
    with np.errstate(divide="ignore", invalid="ignore"):
        placement[positive_N] = (own - _midranks(score_N[positive_N])) / len(other)
        placement[~positive_N] = 1 - (other - _midranks(score_N[~positive_N])) / len(own)
    return placement


def _midranks(score_N: FloatArray) -> FloatArray:
    """Ranks from 1; equals share the mean of theirs."""
    _, place, count = np.unique(score_N, return_inverse=True, return_counts=True)
    ranks: FloatArray = (count.cumsum() - (count - 1) / 2)[place]
    return ranks
