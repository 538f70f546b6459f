"""What the arms of an ablation score, and what an ablation costs, with 95 % intervals.

Predictions are those of one task, as `ablation.trials` describes them.

Shape legend: N crystals, C classes, R resamples, S seeds, G groups of crystals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ablation import significance
from ablation.significance import TESTED, by_group, contributions
from ablation.trials import REFERENCE, Condition, Trials
from cluster.errors import UserError
from training.metrics import METRICS, FloatArray, group_weights, percentile_interval, score

_DRAWS = 32  # of Student's t for each resample
_KEYS = [(n, pa.float64() if n == "strength" else pa.string()) for n in Condition.__slots__]
_NUMBERS = ("none", "value", "difference", "low", "high", "low90", "high90")
_DOUBTS = ("p", "p_seeds", "p_holm", "p_equivalence", "p_equivalence_holm")
_POWER = ("sd_seeds", "se_crystals", "visible")
METRIC_SCHEMA = pa.schema(
    [*_KEYS, ("metric", pa.string()), *((n, pa.float64()) for n in ("value", "low", "high"))]
)
EFFECT_SCHEMA = pa.schema(
    [
        *_KEYS,
        ("metric", pa.string()),
        *((name, pa.float64()) for name in _NUMBERS),
        ("seeds", pa.int64()),
        *((name, pa.float64()) for name in _DOUBTS),
        ("equivalent_within", pa.float64()),
        ("verdict", pa.string()),
        *((name, pa.float64()) for name in _POWER),
        ("seeds_needed", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One metric of several trials: the whole set in column 0, then each resample."""

    values_SR: FloatArray  # (S, 1 + R)
    parts_SG: FloatArray | None  # contributions of the groups, for the metrics in TESTED

    def __sub__(self, other: "Sampled") -> "Sampled":
        parts = None
        if self.parts_SG is not None and other.parts_SG is not None:
            parts = self.parts_SG - other.parts_SG
        return Sampled(self.values_SR - other.values_SR, parts)

    def of(self, rows: Sequence[int]) -> "Sampled":
        """Some of the seeds."""
        parts = None if self.parts_SG is None else self.parts_SG[rows]
        return Sampled(self.values_SR[rows], parts)


class Samples:
    """Every metric of the trials on the whole set and on resamples that all of them share.

    A condition is computed when it is first asked for.
    """

    def __init__(self, trials: Trials, *, resamples: int = 1000, seed: int = 0) -> None:
        self.trials = trials
        self.seed = seed
        drawn_RN = group_weights(trials.groups, resamples, seed)
        self._weights_RN = np.concatenate([np.ones_like(drawn_RN[:1]), drawn_RN])
        self._known: dict[Condition, dict[str, Sampled]] = {}

    def __call__(self, condition: Condition) -> dict[str, Sampled]:
        """Metric → values of the condition's seeds, these in ascending order."""
        if condition not in self._known:
            self._known[condition] = self._sampled(condition)
        return self._known[condition]

    def seeds(self, condition: Condition) -> list[int]:
        """Seeds of a condition in ascending order."""
        return sorted(self.trials.probabilities[condition])

    def _sampled(self, condition: Condition) -> dict[str, Sampled]:
        trials = self.trials
        by_seed = trials.probabilities[condition]
        found = []
        for seed in self.seeds(condition):
            try:
                found.append(score(trials.labels, by_seed[seed], self._weights_RN))
            except ValueError as error:
                raise UserError(
                    f"predictions of arm {condition.arm!r}, seed {seed}: {error}",
                    remedy="run this trial again",
                ) from None
        parts: dict[str, FloatArray] = {}
        for name in TESTED:
            each = [contributions(trials.labels, by_seed[s], name) for s in self.seeds(condition)]
            parts[name] = by_group(np.stack(each), trials.groups)
        return {
            name: Sampled(np.stack([values[name] for values in found]), parts.get(name))
            for name in METRICS
        }


def metric_table(samples: Samples) -> pa.Table:
    """`METRIC_SCHEMA`: each condition in order of first appearance, each metric.

    `value` is the mean over the condition's S seeds of the metric on all crystals. `low` and `high`
    are the 2.5 and 97.5 percentiles of the sum of two independent doubts about it:

    - which crystals: the mean over all seeds on each of R bootstrap resamples of the groups, the
      same for all trials (percentile interval: Efron and Tibshirani, An Introduction to the
      Bootstrap, 1993, chapter 13; whole groups: see `group_weights`);
    - which trainings: s/√S · t, with s the standard deviation (S − 1 in the denominator) of the
      seeds' values on all crystals, and t drawn from Student's distribution with S − 1 degrees of
      freedom (Student, The Probable Error of a Mean, Biometrika 6, 1908).

    The interval thus speaks of new crystals of the same kind and of new trainings. Seeds are not
    resampled like crystals, for two or three values drawn with replacement do not show their own
    spread: they may lie close together by luck. Student's t reckons with that luck, for values
    that are roughly normal. Noise of a training on single crystals is in both parts; the resampled
    deviations are therefore shrunk by what of their variance is such noise (see
    `significance.spread`; here from how differently the seeds answer to a resample). With one seed
    there is no s, and the interval speaks of the crystals only. It is cut at the least and greatest
    value that the metric can have.
    """
    rows = []
    for condition in samples.trials.probabilities:
        found = samples(condition)
        for name, metric in METRICS.items():
            limits = (metric.low, metric.high)
            value, draws = spread_out(found[name].values_SR, samples.seed)
            low, high = _interval(draws, samples.trials.groups, limits)
            numbers = {"metric": name, "value": value, "low": low, "high": high}
            rows.append(_keys(condition) | numbers)
    return pa.Table.from_pylist(rows, schema=METRIC_SCHEMA)


def effect_table(samples: Samples, *, reference: str = REFERENCE) -> pa.Table:
    """`EFFECT_SCHEMA`: each condition of each model against that model's untouched reference.

    Paired: a seed counts when both the condition and the reference have it (`seeds` says how many
    do), and `none`, `value` and `difference` = value − none are means over these seeds of the
    metric of the reference, of the condition, and of their difference with the same seed. The
    interval is that of the difference, made as in `metric_table` with both networks of a pair
    judged on the same draw of crystals, and with s that of the pairs' differences. What is common
    to both, easy and hard crystals above all, cancels. A condition without a seed in common with
    the reference has no row.

    For the metrics in `significance.TESTED`: `p` (`permutation_p`), `p_seeds` (`seeds_p`),
    `p_equivalence` with the 90 % interval `low90` … `high90` (`equivalence`), each `…_holm` after
    Holm's correction over the family, which is all conditions of the task for this metric;
    `equivalent_within`, the smallest margin within which the effect is none at 5 %, uncorrected;
    the `verdict`; `sd_seeds` of one seed's difference, `se_crystals` from the choice of crystals
    alone, the smallest difference that is `visible` with these seeds, and `seeds_needed` to see
    0.01 (null: no number of seeds is enough, it takes more crystals). Null for other metrics.

    With one pair everything speaks of the crystals, not of the chance of training: a difference
    that another seed would reverse can exclude zero; its verdict is `one seed`. How often intervals
    hold the truth and tests find what is not there: `benchmarks/calibration.py` and its results.
    An interval that includes zero is no evidence of no effect; `verdict` "no effect" is.

    Raises UserError when no model has a trial of `reference`.
    """
    trials = samples.trials
    if all(c.arm != reference for c in trials.probabilities):
        arms = ", ".join(dict.fromkeys(c.arm for c in trials.probabilities))
        raise UserError(
            f"predictions have no arm {reference!r} to compare with",
            remedy=f"run it, or name one of {arms} as the reference",
        )
    rows = []
    for condition in trials.probabilities:
        base = trials.reference(condition.model, reference)
        if base is None or condition == base:
            continue
        paired = sorted(trials.probabilities[condition].keys() & trials.probabilities[base].keys())
        if not paired:
            continue
        mine = [samples.seeds(condition).index(seed) for seed in paired]
        theirs = [samples.seeds(base).index(seed) for seed in paired]
        for name, metric in METRICS.items():
            value, none = samples(condition)[name].of(mine), samples(base)[name].of(theirs)
            rows.append(
                _keys(condition)
                | {"metric": name}
                | {"none": float(none.values_SR[:, 0].mean())}
                | {"value": float(value.values_SR[:, 0].mean())}
                | assess(value - none, trials.groups, metric.high - metric.low, samples.seed)
            )
    correct(rows)
    return pa.Table.from_pylist(rows, schema=EFFECT_SCHEMA)


def assess(
    difference: Sampled, groups_N: Sequence[str], span: float, seed: int = 0
) -> dict[str, Any]:
    """The columns of `effect_table` that one difference has by itself, without its family.

    Args:
        span: the largest size that the difference can have.
    """
    value, draws = spread_out(difference.values_SR, seed)
    low, high = _interval(draws, groups_N, (-span, span))
    seeds = len(difference.values_SR)
    row: dict[str, Any] = {"difference": value, "low": low, "high": high, "seeds": seeds}
    if difference.parts_SG is None:
        return row
    if math.isnan(low):
        draws = np.array([])
    p_equivalence, low90, high90 = significance.equivalence(draws)
    found = significance.spread(difference.parts_SG)
    return row | {
        "low90": low90,
        "high90": high90,
        "p": significance.permutation_p(difference.parts_SG, seed),
        "p_seeds": significance.seeds_p(difference.values_SR[:, 0], seed),
        "p_equivalence": p_equivalence,
        "equivalent_within": max(abs(low90), abs(high90)),
        "sd_seeds": math.sqrt(found.seed) if found.seed >= 0 else math.nan,
        "se_crystals": math.sqrt(found.pure * found.crystal) if found.crystal >= 0 else math.nan,
        "visible": significance.visible(found, seeds),
        "seeds_needed": significance.seeds_needed(found),
    }


def correct(rows: list[dict[str, Any]]) -> None:
    """Add Holm's p values and the verdict to rows of one family; each tested metric is its own."""
    for name in TESTED:
        family = [row for row in rows if row["metric"] == name]
        for p in ("p", "p_equivalence"):
            corrected = significance.holm([row[p] for row in family])
            for row, value in zip(family, corrected.tolist(), strict=True):
                row[f"{p}_holm"] = value
        for row in family:
            row["verdict"] = significance.verdict(
                row["seeds"], row["p_holm"], row["p_equivalence_holm"]
            )


def spread_out(values_SR: FloatArray, seed: int) -> tuple[float, FloatArray]:
    """Mean over seeds on the whole set (column 0), and draws of what it might have been."""
    whole_S, value_R = values_SR[:, 0], values_SR[:, 1:].mean(axis=0)
    seeds, value = len(whole_S), float(whole_S.mean())
    if seeds == 1 or not math.isfinite(value):
        return value, value_R
    crystal = float(np.nanvar(value_R))
    apart_SR = values_SR[:, 1:] - value_R
    shared = float(np.nanvar(apart_SR, axis=1).mean()) / (seeds - 1)
    pure = significance.Spread(math.nan, crystal, shared).pure
    # Its own stream, the same for all conditions with as many seeds: a condition's row depends on
    # no other. Several draws a resample, for the tails of t with one degree of freedom are long.
    random = np.random.default_rng((seed, seeds))
    t_RD = random.standard_t(seeds - 1, size=(len(value_R), _DRAWS))
    error = whole_S.std(ddof=1) / math.sqrt(seeds)
    centred_R = value + math.sqrt(pure) * (value_R - value)
    return value, (centred_R[:, None] + error * t_RD).ravel()


def _interval(
    draws: FloatArray, groups_N: Sequence[str], limits: tuple[float, float]
) -> tuple[float, float]:
    low, high = np.clip(percentile_interval(draws, groups_N), *limits)
    return float(low), float(high)


def _keys(condition: Condition) -> dict[str, Any]:
    return {name: getattr(condition, name) for name in Condition.__slots__}
