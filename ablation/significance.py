"""How sure a difference is: permutation, many comparisons at once, equivalence, power.

Shape legend: N crystals, C classes, S seeds, G groups of crystals, F sign flips, D draws of
Student's t for each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import t as student

from training.comparison import placements
from training.metrics import FloatArray, IntArray

ALPHA = 0.05
"""Level of all tests; the family-wise one after Holm's correction."""
MARGIN = 0.02
"""Change of the metric below which an effect counts as none: about what two trainings of one recipe
differ by on some hundreds of crystals. The tables say for each effect within which margin it is
none, for readers who want another."""
RESOLUTION = 0.01
"""Change that a planned study wants to see; see `seeds_needed`."""
POWER = 0.8
_MOST_SEEDS = 1000
_FLIPS, _DRAWS = 10_000, 8
TESTED = ("auroc", "balanced_accuracy")
"""Metrics that are sums over crystals, so that a sign flip of crystals can be followed."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the doubt about a mean difference over S seeds comes from."""

    seed: float  # variance of one seed's difference, given the crystals
    crystal: float  # variance of the mean over seeds, from the choice of crystals alone
    shared: float  # variance of the mean from trainings' noise on single crystals, part of both

    @property
    def pure(self) -> float:
        """Share of the crystals' variance that is not training noise, in [0, 1]."""
        return max(0.0, 1 - self.shared / self.crystal) if self.crystal > 0 else 0.0


def contributions(labels_N: IntArray, probabilities_NC: FloatArray, metric: str) -> FloatArray:
    """(N,) what each crystal adds to one of `TESTED`; the sum is the metric.

    `balanced_accuracy` is such a sum. `auroc` is a mean over pairs of a positive and a negative
    crystal; each gets its placement value (DeLong, DeLong and Clarke-Pearson 1988), the share of
    the other class that it ranks rightly against, less half the AUROC, divided by the size of its
    class: the first-order part of Hoeffding's decomposition. Macro over classes as in
    `training.metrics.score`. NaN where the metric is not defined.
    """
    present, sizes = np.unique(labels_N, return_counts=True)
    if len(present) < 2:
        return np.full(len(labels_N), np.nan)
    if metric == "balanced_accuracy":
        hit_N = probabilities_NC.argmax(axis=1) == labels_N
        size_N = sizes[np.searchsorted(present, labels_N)]
        return np.asarray(hit_N / size_N / len(present))
    ranked = present if probabilities_NC.shape[1] > 2 else np.array([1])
    total_N = np.zeros(len(labels_N))
    for c in ranked:
        positive_N = labels_N == c
        placement_N = placements(positive_N, probabilities_NC[:, c])
        auroc = float(placement_N[positive_N].mean())
        size_N = np.where(positive_N, positive_N.sum(), (~positive_N).sum())
        total_N += (placement_N - auroc / 2) / size_N
    return total_N / len(ranked)


def by_group(contributions_SN: FloatArray, groups_N: Sequence[str]) -> FloatArray:
    """(S, G) sums of contributions over the crystals of each group."""
    names, member_N = np.unique(np.asarray(groups_N, dtype=np.str_), return_inverse=True)
    return np.stack([np.bincount(member_N, row, len(names)) for row in contributions_SN])


def spread(difference_SG: FloatArray) -> Spread:
    """Variances of the mean over S seeds of the sum over G groups, crossed random effects.

    The groups' variance is that of the mean contribution; the interaction's, of trainings with
    single crystals, is what is left of each contribution after its group's and its seed's mean
    (as in a two-way layout without repeats, Scheffé, The Analysis of Variance, 1959, chapter 7).
    It is in both the spread of the seeds and that of the crystals, and `shared` lets one count it
    once (Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 1, 386, 2007).
    """
    seeds, groups = difference_SG.shape
    mean_G = difference_SG.mean(axis=0)
    crystal = groups * float(mean_G.var(ddof=1)) if groups > 1 else math.nan
    if seeds < 2:
        return Spread(math.nan, crystal, 0.0)
    whole_S = difference_SG.sum(axis=1)
    left_SG = difference_SG - mean_G - ((whole_S - whole_S.mean()) / groups)[:, None]
    shared = float((left_SG**2).sum()) / (seeds * (seeds - 1))
    return Spread(float(whole_S.var(ddof=1)), crystal, shared)


def permutation_p(difference_SG: FloatArray, seed: int = 0) -> float:
    """Two-sided p of no difference, by exchanging the two networks' answers on whole groups.

    Where a perturbation does nothing, the two networks of a pair could have given each other's
    answers: F times, each group of crystals, drawn by lot, changes sides in all pairs (a sign flip
    of its contribution). That speaks of the crystals. For the trainings there are too few seeds to
    permute (three pairs can give no p below ¼): their doubt is added to each permuted difference
    as in the intervals, s/√S · t with Student's t of S − 1 degrees of freedom; training noise on
    single crystals is then in both, and taken out of the first. With one seed p speaks of the
    crystals only.
    """
    if not np.isfinite(difference_SG).all():
        return math.nan
    seeds, groups = difference_SG.shape
    found = spread(difference_SG)
    random = np.random.default_rng((seed, seeds, groups))
    flips_FG = (random.integers(2, size=(_FLIPS, groups), dtype=np.int8) * 2 - 1).astype(np.float32)
    mean_G = difference_SG.mean(axis=0)
    null = flips_FG @ mean_G.astype(np.float32)
    if seeds > 1:
        t_FD = random.standard_t(seeds - 1, size=(_FLIPS, _DRAWS))
        null = math.sqrt(found.pure) * null[:, None] + math.sqrt(found.seed / seeds) * t_FD
    # Sums in another order may differ in their last bits.
    reached = np.abs(null) >= abs(float(mean_G.sum())) * (1 - 1e-6) - 1e-12
    return float((reached.sum() + 1) / (reached.size + 1))


def seeds_p(difference_S: FloatArray, seed: int = 0) -> float:
    """Two-sided p of no difference from the seeds alone, by flipping the signs of pairs.

    Assumes nothing of how trainings scatter, and cannot be below 2^(1−S) for S pairs: all 2^S
    choices up to 12 pairs, as many random ones beyond (Fisher, The Design of Experiments, 1935).
    """
    if not np.isfinite(difference_S).all():
        return math.nan
    pairs = len(difference_S)
    if pairs <= 12:
        flips = np.array(list(product((1, -1), repeat=pairs)))
    else:
        random = np.random.default_rng((seed, pairs))
        flips = random.integers(2, size=(2**12, pairs)) * 2 - 1
        flips[0] = 1
    sums = np.abs(flips @ difference_S)
    return float((sums >= sums[0] * (1 - 1e-9)).mean())


def holm(p_K: Sequence[float] | FloatArray) -> FloatArray:
    """(K,) p values corrected for K tests (Holm, Scand. J. Stat. 6, 65, 1979); NaN is no test."""
    p = np.asarray(p_K, dtype=np.float64)
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p, kind="stable")[: int(np.isfinite(p).sum())]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def equivalence(draws_R: FloatArray) -> tuple[float, float, float]:
    """p of an effect as large as `MARGIN` or larger, and the 90 % interval.

    Two one-sided tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 657, 1987): p < 5 % says that
    the effect lies within (−margin, margin), which is so exactly when the 90 % interval does. The
    draws are those of the effect's 95 % interval.
    """
    drawn = draws_R[~np.isnan(draws_R)]
    if not len(drawn):
        return math.nan, math.nan, math.nan
    below, above = int((drawn <= -MARGIN).sum()), int((drawn >= MARGIN).sum())
    low, high = np.quantile(drawn, (ALPHA, 1 - ALPHA))
    return (max(below, above) + 1) / (len(drawn) + 1), float(low), float(high)


def verdict(seeds: int, p_holm: float, p_equivalence_holm: float) -> str:
    """What may be said of an effect, both p values corrected for the family.

    `effect`, `small effect` (there is one, within the margin), `no effect` (within the margin),
    `undecided`, or `one seed`: a single pair of trainings does not show how much trainings differ.
    """
    if seeds < 2:
        return "one seed"
    there, within = p_holm < ALPHA, p_equivalence_holm < ALPHA
    if there:
        return "small effect" if within else "effect"
    return "no effect" if within else "undecided"


def visible(found: Spread, seeds: int) -> float:
    """Smallest difference that S seeds see with power 80 % at the two-sided level of 5 %.

    (t₀.₉₇₅ + t₀.₈) √(V + s²/S), with V the variance from the crystals alone, s² that of a seed's
    difference, and degrees of freedom after Satterthwaite (Biometrics Bull. 2, 110, 1946). NaN for
    fewer than two seeds.
    """
    if seeds < 2 or not math.isfinite(found.seed):
        return math.nan
    crystals = found.pure * found.crystal
    trainings = found.seed / seeds
    variance = crystals + trainings
    freedom = (seeds - 1) * (variance / trainings) ** 2 if trainings > 0 else math.inf
    quantiles = student.ppf([1 - ALPHA / 2, POWER], freedom)
    return float(quantiles.sum()) * math.sqrt(variance)


def seeds_needed(found: Spread) -> int | None:
    """Fewest seeds that see `RESOLUTION`, as `visible` reckons; None when no number does.

    The doubt that stems from the choice of crystals does not shrink with seeds: then only more
    test crystals help.
    """
    if not math.isfinite(found.seed) or visible(found, _MOST_SEEDS) > RESOLUTION:
        return None
    low, high = 2, _MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if visible(found, middle) > RESOLUTION else (low, middle)
    return low
