"""Predictions of all trials of one task, sorted into conditions and checked.

They come as one Arrow table, a row a trial and crystal: `trial`, `model`, `arm`, `mode` (strings),
`strength` (floating, null for an arm without one), `seed` (integer), `id`, `group` (strings),
`label` (integer) and `p0` … `p{C−1}` (floating). A trial is one network: one condition trained with
one seed. Rows may come in any order; every trial has the same crystals, with the same labels and
groups.

Shape legend: N crystals, C classes.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import UserError
from training.metrics import FloatArray, IntArray

REFERENCE = "none"
"""Arm whose input is untouched."""
_TEXTS = ("trial", "model", "arm", "mode", "id", "group")
_KEYS = (*_TEXTS, "strength", "seed", "label")


@dataclass(frozen=True, slots=True)
class Condition:
    """What the trials of several seeds have in common."""

    model: str
    arm: str
    strength: float | None = None
    mode: str = "retrain"

    @property
    def name(self) -> str:
        """Arm, strength and mode in words, the usual mode left out."""
        strength = "" if self.strength is None else f" {self.strength:g}"
        return f"{self.arm}{strength}" + ("" if self.mode == "retrain" else f" ({self.mode})")


@dataclass(frozen=True, slots=True)
class Trials:
    """All trials on the same crystals, those sorted by id."""

    ids: list[str]  # (N,)
    groups: list[str]  # (N,)
    labels: IntArray  # (N,)
    probabilities: dict[Condition, dict[int, FloatArray]]  # condition → seed → (N, C)

    def reference(self, model: str, arm: str = REFERENCE) -> Condition | None:
        """The condition that all others of a model are compared with; None when it has no trial."""
        found = Condition(model, arm)
        return found if found in self.probabilities else None


def read_trials(predictions: pa.Table) -> Trials:
    """Sort a table into conditions, in the order in which they appear.

    Raises UserError for a table that is not as the module describes.
    """
    p_names = _checked(predictions)
    codes, names = {}, {}
    for name in _TEXTS:
        codes[name], names[name] = _encoded(predictions.column(name))
    numbers = {name: predictions.column(name).to_numpy() for name in ("strength", "seed", "label")}
    p_NC = np.stack([predictions.column(p).to_numpy() for p in p_names], axis=1)
    alphabetic = np.empty(len(names["id"]), dtype=np.int64)
    alphabetic[np.argsort(np.array(names["id"]))] = np.arange(len(alphabetic))
    order = np.lexsort((alphabetic[codes["id"]], codes["trial"]))
    _, begins, counts = np.unique(codes["trial"][order], return_index=True, return_counts=True)
    blocks = [order[begin : begin + count] for begin, count in zip(begins, counts, strict=True)]
    blocks.sort(key=lambda rows: rows.min())
    probabilities: dict[Condition, dict[int, FloatArray]] = {}
    for rows in blocks:
        trial = names["trial"][codes["trial"][rows[0]]]
        condition, seed = _identity(trial, rows, codes, names, numbers)
        by_seed = probabilities.setdefault(condition, {})
        if seed in by_seed:
            raise UserError(
                f"trial {trial!r}: arm {condition.arm!r} has another trial with seed {seed}",
                remedy="keep one of them",
            )
        columns = {"id": (codes["id"], names["id"]), "group": (codes["group"], names["group"])}
        _check_same_crystals(trial, rows, blocks[0], columns, numbers["label"])
        by_seed[seed] = p_NC[rows].astype(np.float64)
    first = blocks[0]
    return Trials(
        ids=[names["id"][code] for code in codes["id"][first]],
        groups=[names["group"][code] for code in codes["group"][first]],
        labels=numbers["label"][first].astype(np.int64),
        probabilities=probabilities,
    )


def _checked(predictions: pa.Table) -> list[str]:
    """Names of the columns of probabilities: p0, p1, …"""
    numbered = [name for name in predictions.column_names if re.fullmatch(r"p\d+", name)]
    p_names = [f"p{index}" for index in range(max(2, len(numbered)))]
    missing = [name for name in (*_KEYS, *p_names) if name not in predictions.column_names]
    if missing or not predictions.num_rows:
        raise UserError(
            f"predictions have {predictions.num_rows} rows and lack columns {missing}",
            remedy=f"give one row a trial and crystal with {', '.join(_KEYS)}, p0, p1, …",
        )
    for name in (*_KEYS, *p_names):
        column = predictions.column(name)
        if column.null_count and name != "strength":
            raise UserError(
                f"predictions have {column.null_count} rows without {name}",
                remedy="leave out what has no prediction, in all trials alike",
            )
        if name in ("seed", "label") and not pa.types.is_integer(column.type):
            raise UserError(f"{name} has type {column.type}", remedy="give integers")
    return p_names


def _encoded(column: pa.ChunkedArray) -> tuple[IntArray, list[str]]:
    """Index of each row's text in a list of the distinct ones."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, [str(text) for text in encoded.dictionary.to_pylist()]


def _identity(
    trial: str,
    rows: IntArray,
    codes: dict[str, IntArray],
    names: dict[str, list[str]],
    numbers: dict[str, NDArray[Any]],
) -> tuple[Condition, int]:
    found = set(
        zip(
            *(codes[name][rows].tolist() for name in ("model", "arm", "mode")),
            ("" if math.isnan(x) else repr(x) for x in numbers["strength"][rows].tolist()),
            numbers["seed"][rows].tolist(),
            strict=True,
        )
    )
    if len(found) > 1:
        arms = sorted({(names["arm"][arm], seed) for _, arm, _, _, seed in found})
        raise UserError(
            f"trial {trial!r} has {len(found)} sets of model, arm, strength, mode and seed: "
            f"{arms[:3]}",
            remedy="give each network its own trial name",
        )
    ((model, arm, mode, strength, seed),) = found
    texts = names["model"][model], names["arm"][arm]
    dose = float(strength) if strength else None
    return Condition(*texts, dose, names["mode"][mode]), int(seed)


def _check_same_crystals(
    trial: str,
    rows: IntArray,
    first: IntArray,
    texts: dict[str, tuple[IntArray, list[str]]],
    label_N: NDArray[Any],
) -> None:
    """Compare a trial (its rows sorted by id) with the first trial, and with itself for repeats."""
    code_N, name_of = texts["id"]
    if not np.array_equal(code_N[rows], code_N[first]) or (np.diff(code_N[rows]) == 0).any():
        counts = Counter(name_of[code] for code in code_N[rows])
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise UserError(
                f"trial {trial!r} has {len(repeated)} crystals more than once, e.g. "
                f"{repeated[0]!r}",
                remedy="give one row a trial and crystal",
            )
        expected = {name_of[code] for code in code_N[first]}
        lacking, extra = sorted(expected - counts.keys()), sorted(counts.keys() - expected)
        raise UserError(
            f"trial {trial!r} is not of the crystals of the first trial: "
            f"{len(lacking)} are missing {lacking[:3]}, {len(extra)} are new {extra[:3]}",
            remedy="run all trials with one dataset and one split",
        )
    for name, values in (("label", label_N), ("group", texts["group"][0])):
        differing = np.flatnonzero(values[rows] != values[first])
        if len(differing):
            crystal = name_of[code_N[rows[differing[0]]]]
            raise UserError(
                f"trial {trial!r} and the first trial differ in {name} for {len(differing)} "
                f"crystals, e.g. {crystal!r}",
                remedy="run all trials with one dataset and one task",
            )
