"""What the arms of an ablation score, and what an ablation costs, with 95 % intervals.

Predictions come as one Arrow table, a row a trial and crystal: `trial` (string), `arm` (string),
`seed` (integer), `id` (string), `group` (string), `label` (integer) and `p0` … `p{C−1}` (floating).
A trial is one network: one arm trained with one seed. Rows may come in any order; every trial has
the same crystals, with the same labels and groups.

Shape legend: N crystals, C classes, R resamples, S seeds.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import UserError
from training.metrics import METRICS, group_weights, percentile_interval, score

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_DRAWS = 32  # of Student's t for each resample
_KEYS = ("trial", "arm", "seed", "id", "group", "label")
Samples = dict[str, FloatArray]  # metric → (1 + R,): on the whole set, then on each resample


@dataclass(frozen=True, slots=True)
class _Trials:
    """All trials on the same crystals, those sorted by id."""

    labels: IntArray  # (N,)
    groups: list[str]  # (N,)
    probabilities: dict[str, dict[int, FloatArray]]  # arm → seed → (N, C)


def metric_table(predictions: pa.Table, *, resamples: int = 1000, seed: int = 0) -> pa.Table:
    """Columns arm, metric, value, low, high: each arm in order of first appearance, each metric.

    `value` is the mean over the arm's S seeds of the metric on all crystals. `low` and `high` are
    the 2.5 and 97.5 percentiles of the sum of two independent doubts about it:

    - which crystals: the mean over all seeds on each of R bootstrap resamples of the groups, the
      same for all trials (percentile interval: Efron and Tibshirani, An Introduction to the
      Bootstrap, 1993, chapter 13; whole groups: see `group_weights`);
    - which trainings: s/√S · t, with s the standard deviation (S − 1 in the denominator) of the
      seeds' values on all crystals, and t drawn from Student's distribution with S − 1 degrees of
      freedom (Student, The Probable Error of a Mean, Biometrika 6, 1908).

    The interval thus speaks of new crystals of the same kind and of new trainings. Seeds are not
    resampled like crystals, for two or three values drawn with replacement do not show their own
    spread: they may lie close together by luck. Student's t reckons with that luck, for values
    that are roughly normal. Noise of a training on single crystals enters both parts, so that the
    interval is rather too wide. With one seed there is no s, and the interval speaks of the
    crystals only. It is cut at the least and greatest value that the metric can have.

    Raises UserError for a table that is not as the module describes.
    """
    trials = _trials(predictions)
    samples = _samples(trials, resamples, seed)
    rows = []
    for arm, by_seed in samples.items():
        for name, metric in METRICS.items():
            values = np.stack([by_seed[s][name] for s in sorted(by_seed)])
            value, low, high = _summary(values, trials.groups, seed, (metric.low, metric.high))
            rows.append({"arm": arm, "metric": name, "value": value, "low": low, "high": high})
    return pa.Table.from_pylist(rows, schema=_schema("value", "low", "high"))


def effect_table(
    predictions: pa.Table, *, reference: str = "none", resamples: int = 1000, seed: int = 0
) -> pa.Table:
    """Columns arm, metric, none, value, difference, low, high, seeds: each arm but `reference`.

    Paired: a seed counts when both the arm and the reference have it (`seeds` says how many do),
    and `none`, `value` and `difference` = value − none are means over these seeds of the metric of
    the reference, of the arm, and of the arm minus the reference with the same seed. The interval
    is that of the difference, made as in `metric_table` with both networks of a pair judged on the
    same draw of crystals, and with s that of the pairs' differences. What is common to both, easy
    and hard crystals above all, cancels. An arm without a seed in common with the reference has no
    row.

    With one pair the interval covers the choice of the crystals, not the chance of training: a
    difference that another seed would reverse can exclude zero. Simulated with two arms of equal
    merit and 200 crystals (AUROC and balanced accuracy, 1000 simulations each; 5 % is nominal),
    the interval excluded zero in these shares of the cases:

    ===================================  ========  =======  =======  =======
    pairs                                1         2        3        5
    trainings differ by noise on single
    crystals only                        5–6 %     < 1 %    < 1 %    < 1 %
    some trainings are better than
    others throughout                    32–92 %   2–5 %    2–5 %    2–5 %
    ===================================  ========  =======  =======  =======

    In the second row the standard deviation of a pair's difference was 0.04 to 0.21 in AUROC, in
    the first 0.01. Two pairs are honest but tell little: t is 12.7 for them, 4.3 for three and 2.8
    for five, and the intervals were about 3 times as wide as with three pairs and 5 times as wide
    as with five. With a standard deviation of 0.13, a planted loss of 0.155 in AUROC was found in
    13 % of the cases with two pairs, in 24 % with three and in 52 % with five; with noise on
    single crystals only, in 88 % with two and always with three. An interval that includes zero
    is no evidence of no effect.

    Raises UserError for a table that is not as the module describes or lacks `reference`.
    """
    trials = _trials(predictions)
    if reference not in trials.probabilities:
        raise UserError(
            f"predictions have no arm {reference!r} to compare with",
            remedy=f"run it, or name one of {', '.join(trials.probabilities)} as the reference",
        )
    samples = _samples(trials, resamples, seed)
    rows = []
    for arm in (name for name in samples if name != reference):
        paired = sorted(samples[arm].keys() & samples[reference].keys())
        for name, metric in METRICS.items() if paired else ():
            values = np.stack([samples[arm][s][name] for s in paired])
            base = np.stack([samples[reference][s][name] for s in paired])
            span = metric.high - metric.low
            difference, low, high = _summary(values - base, trials.groups, seed, (-span, span))
            rows.append(
                {
                    "arm": arm,
                    "metric": name,
                    "none": float(base[:, 0].mean()),
                    "value": float(values[:, 0].mean()),
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "seeds": len(paired),
                }
            )
    columns = _schema("none", "value", "difference", "low", "high")
    return pa.Table.from_pylist(rows, schema=columns.append(pa.field("seeds", pa.int64())))


def _schema(*numbers: str) -> pa.Schema:
    names = [(name, pa.string()) for name in ("arm", "metric")]
    return pa.schema([*names, *((name, pa.float64()) for name in numbers)])


def _summary(
    values_SR: FloatArray, groups_N: Sequence[str], seed: int, limits: tuple[float, float]
) -> tuple[float, float, float]:
    """Mean over seeds on the whole set (column 0), and the interval that `metric_table` describes.

    `limits` are the least and the greatest value that the mean can have.
    """
    whole_S, means_R = values_SR[:, 0], values_SR[:, 1:].mean(axis=0)
    seeds = len(whole_S)
    if seeds > 1:
        # Its own stream, the same for all arms with as many seeds: an arm's row depends on no
        # other. Several draws a resample, for the tails of t with one degree of freedom are long.
        random = np.random.default_rng((seed, seeds))
        t_RD = random.standard_t(seeds - 1, size=(len(means_R), _DRAWS))
        means_R = (means_R[:, None] + whole_S.std(ddof=1) / math.sqrt(seeds) * t_RD).ravel()
    low, high = np.clip(percentile_interval(means_R, groups_N), *limits)
    return float(whole_S.mean()), float(low), float(high)


def _samples(trials: _Trials, resamples: int, seed: int) -> dict[str, dict[int, Samples]]:
    """Every metric of every trial on the whole set and on the resamples that all trials share."""
    drawn_RN = group_weights(trials.groups, resamples, seed)
    weights_RN = np.concatenate([np.ones_like(drawn_RN[:1]), drawn_RN])
    samples: dict[str, dict[int, Samples]] = {arm: {} for arm in trials.probabilities}
    for arm, by_seed in trials.probabilities.items():
        for number, probabilities_NC in by_seed.items():
            try:
                samples[arm][number] = score(trials.labels, probabilities_NC, weights_RN)
            except ValueError as error:
                raise UserError(
                    f"predictions of arm {arm!r}, seed {number}: {error}",
                    remedy="run this trial again",
                ) from None
    return samples


def _trials(predictions: pa.Table) -> _Trials:
    """Sort the table into trials, and check that they are of the same crystals."""
    names = _checked_columns(predictions)
    columns = {name: np.asarray(predictions.column(name).to_pylist()) for name in names}
    p_names = [name for name in names if name not in _KEYS]
    trial, identity = columns["trial"], columns["id"]
    probabilities: dict[str, dict[int, FloatArray]] = {}
    first: IntArray = np.empty(0, dtype=np.int64)
    for name in dict.fromkeys(trial.tolist()):
        rows = np.flatnonzero(trial == name)
        rows = rows[np.argsort(identity[rows], kind="stable")]
        runs = set(zip(columns["arm"][rows].tolist(), columns["seed"][rows].tolist(), strict=True))
        if len(runs) > 1:
            raise UserError(
                f"trial {name!r} has {len(runs)} pairs of arm and seed: {sorted(runs)[:3]}",
                remedy="give each pair of arm and seed its own trial name",
            )
        arm, number = runs.pop()
        if number in probabilities.setdefault(arm, {}):
            raise UserError(
                f"trial {name!r}: arm {arm!r} has another trial with seed {number}",
                remedy="keep one of them",
            )
        first = first if len(first) else rows
        _check_same_crystals(columns, first, rows)
        probabilities[arm][number] = np.stack([columns[p][rows] for p in p_names], axis=1)
    return _Trials(columns["label"][first], columns["group"][first].tolist(), probabilities)


def _checked_columns(predictions: pa.Table) -> list[str]:
    """Names of the columns in use: `_KEYS`, then p0, p1, …"""
    numbered = [name for name in predictions.column_names if re.fullmatch(r"p\d+", name)]
    names = [*_KEYS, *(f"p{index}" for index in range(max(2, len(numbered))))]
    missing = [name for name in names if name not in predictions.column_names]
    if missing or not predictions.num_rows:
        raise UserError(
            f"predictions have {predictions.num_rows} rows and lack columns {missing}",
            remedy=f"give one row a trial and crystal with {', '.join(_KEYS)}, p0, p1, …",
        )
    for name in names:
        column = predictions.column(name)
        if column.null_count:
            raise UserError(
                f"predictions have {column.null_count} rows without {name}",
                remedy="leave out what has no prediction, in all trials alike",
            )
        if name in ("seed", "label") and not pa.types.is_integer(column.type):
            raise UserError(f"{name} has type {column.type}", remedy="give integers")
    return names


def _check_same_crystals(columns: dict[str, NDArray[Any]], first: IntArray, rows: IntArray) -> None:
    """Compare a trial (its rows sorted by id) with the first trial, and with itself for repeats."""
    trial, other = columns["trial"][rows[0]], columns["trial"][first[0]]
    counts = Counter(columns["id"][rows].tolist())
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"trial {str(trial)!r} has {len(repeated)} crystals more than once, e.g. "
            f"{repeated[0]!r}",
            remedy="give one row a trial and crystal",
        )
    expected = set(columns["id"][first].tolist())
    if expected != counts.keys():
        lacking, extra = sorted(expected - counts.keys()), sorted(counts.keys() - expected)
        raise UserError(
            f"trial {str(trial)!r} is not of the crystals of trial {str(other)!r}: "
            f"{len(lacking)} are missing {lacking[:3]}, {len(extra)} are new {extra[:3]}",
            remedy="run all trials with one dataset and one split",
        )
    for name in ("label", "group"):
        differing = np.flatnonzero(columns[name][rows] != columns[name][first])
        if len(differing):
            crystal = columns["id"][rows[differing[0]]]
            raise UserError(
                f"trials {str(trial)!r} and {str(other)!r} differ in {name} for {len(differing)} "
                f"crystals, e.g. {str(crystal)!r}",
                remedy="run all trials with one dataset and one task",
            )
