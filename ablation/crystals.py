"""Which crystals a network loses when the symmetry or the intensities of its input are destroyed.

A crystal is lost in a pair of trainings when the network of the untouched input has it right and
that of the perturbed input, of the same seed, has it wrong; gained is the contrary. Two trainings
on the same untouched input disagree, too: `by_chance` is how often one has a crystal right and
another, of another seed, has it wrong. What exceeds it is owed to the perturbation.

Shape legend: N crystals, C classes, S seeds, K pairs of a seed and an arm.
"""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ablation.catalogue import Catalogue
from ablation.contrast import SIDES
from ablation.trials import Condition, Trials
from training.metrics import FloatArray, Interval
from training.proportion import proportion

_OF_SIDE = ("right", "p_true", "lost", "gained")
_PARTS = {"crystal_system": pa.string(), "space_group": pa.int64()}
CRYSTAL_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("task", "model", "id", "group", "formula", "class")]
    + [("crystal_system", pa.string()), ("space_group", pa.int64())]
    + [(name, pa.float64()) for name in ("right", "p_true", "by_chance")]
    + [(f"{side}_{name}", pa.float64()) for side in SIDES for name in _OF_SIDE]
)
LOSS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("task", "model", "by", "part")]
    + [("crystals", pa.int64()), ("groups", pa.int64())]
    + [("right", pa.float64()), ("by_chance", pa.float64())]
    + [(f"{side}_lost{end}", pa.float64()) for side in SIDES for end in ("", "_low", "_high")]
)


def crystal_table(
    trials: Trials, model: str, task: str, classes: Sequence[str], catalogue: Catalogue | None
) -> pa.Table:
    """`CRYSTAL_SCHEMA`, a row a test crystal: shares of the seeds, means over the arms of a side.

    `right` and `p_true` (probability of the true class) without a prefix are of the untouched
    input. The sides are those of `ablation.contrast`; null where none of their arms has a seed in
    common with the reference. Formula and symmetry are null without a dataset. No rows when the
    reference has no trial.
    """
    base = trials.reference(model)
    if base is None:
        return CRYSTAL_SCHEMA.empty_table()
    own = trials.probabilities[base]
    right = {seed: _right(trials, p_NC) for seed, p_NC in own.items()}
    swaps = [right[a] & ~right[b] for a, b in permutations(right, 2)]
    columns: dict[str, Any] = {
        "task": [task] * len(trials.ids),
        "model": [model] * len(trials.ids),
        "id": trials.ids,
        "group": trials.groups,
        "class": [classes[label] for label in trials.labels],
        "right": np.mean(list(right.values()), axis=0),
        "p_true": np.mean([_p_true(trials, p_NC) for p_NC in own.values()], axis=0),
        "by_chance": np.mean(swaps, axis=0) if swaps else np.full(len(trials.ids), math.nan),
    }
    for side, arms in SIDES.items():
        found = _side(trials, right, [Condition(model, arm) for arm in arms])
        columns |= {f"{side}_{name}": values for name, values in found.items()}
    columns |= _symmetry(trials.ids, catalogue)
    arrays = [
        pa.array(columns[field.name], field.type, from_pandas=True) for field in CRYSTAL_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=CRYSTAL_SCHEMA)


def loss_table(crystals: pa.Table) -> pa.Table:
    """`LOSS_SCHEMA`: share of crystals lost, of each crystal system and space group, and of all.

    Intervals are Wilson's with whole groups (`training.proportion`): crystals, not trainings. A
    share of few crystals has a wide one.
    """
    rows = []
    for task in dict.fromkeys(crystals["task"].to_pylist()):
        of_task = [row for row in crystals.to_pylist() if row["task"] == task]
        parts: dict[tuple[str, Any], list[dict[str, Any]]] = {("all", "all"): of_task}
        for by in _PARTS:
            for row in of_task:
                if row[by] is not None:
                    parts.setdefault((by, row[by]), []).append(row)
        ordered = sorted(parts.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
        rows += [_loss(by, str(part), members) for (by, part), members in ordered]
    return pa.Table.from_pylist(rows, schema=LOSS_SCHEMA)


def _loss(by: str, part: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [row["group"] for row in members]
    answer: dict[str, Any] = {"task": members[0]["task"], "model": members[0]["model"]}
    answer |= {"by": by, "part": part, "crystals": len(members), "groups": len(set(groups))}
    for name in ("right", "by_chance"):
        known = [row[name] for row in members if row[name] is not None]
        answer[name] = float(np.mean(known)) if known else None
    for side in SIDES:
        lost = [row[f"{side}_lost"] for row in members]
        none = Interval(math.nan, math.nan, math.nan)
        share = none if None in lost else proportion(lost, groups)
        ends = {"": share.value, "_low": share.low, "_high": share.high}
        answer |= {f"{side}_lost{end}": value for end, value in ends.items()}
    return answer


def _side(
    trials: Trials, right: dict[int, NDArray[np.bool_]], conditions: Sequence[Condition]
) -> dict[str, FloatArray]:
    pairs = [
        (right[seed], p_NC)
        for condition in conditions
        for seed, p_NC in trials.probabilities.get(condition, {}).items()
        if seed in right
    ]
    if not pairs:
        return dict.fromkeys(_OF_SIDE, np.full(len(trials.ids), math.nan))
    was_KN = np.stack([was for was, _ in pairs])
    is_KN = np.stack([_right(trials, p_NC) for _, p_NC in pairs])
    return {
        "right": is_KN.mean(axis=0),
        "p_true": np.mean([_p_true(trials, p_NC) for _, p_NC in pairs], axis=0),
        "lost": (was_KN & ~is_KN).mean(axis=0),
        "gained": (~was_KN & is_KN).mean(axis=0),
    }


def _right(trials: Trials, p_NC: FloatArray) -> NDArray[np.bool_]:
    hit_N: NDArray[np.bool_] = p_NC.argmax(axis=1) == trials.labels
    return hit_N


def _p_true(trials: Trials, p_NC: FloatArray) -> FloatArray:
    own: FloatArray = p_NC[np.arange(len(trials.labels)), trials.labels]
    return own


def _symmetry(ids: list[str], catalogue: Catalogue | None) -> dict[str, list[Any]]:
    names = ("formula", "crystal_system", "space_group")
    if catalogue is None:
        return {name: [None] * len(ids) for name in names}
    rows = catalogue.rows_of(ids)
    columns = (catalogue.formulas, catalogue.crystal_systems, catalogue.numbers)
    return {
        name: [column[row].item() if row >= 0 else None for row in rows]
        for name, column in zip(names, columns, strict=True)
    }
