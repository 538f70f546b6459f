"""How much of the test split is known from training: equal formulas, nearly equal patterns.

A split by formula keeps polymorphs together, but not compounds of neighbouring elements in one
structure type, nor a framework with more or less of its guest, whose patterns can be almost equal.
They are no error of the split, yet they decide what a score on it means. Each held-out crystal is
therefore given its nearest training crystal, by a fingerprint that no rotation of the cloud
changes, its radial profile.

Shape legend, besides that of `training.dataset`: D bins of ln |q|, T crystals compared with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from training.dataset import Clouds, CloudSet
from training.portions import blocks

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

# Standard deviation of a peak in ln |q|: a strain of x separates two equal patterns by x / 0.04.
WIDTH = 0.02
_BIN = WIDTH / 2  # finer, and a peak's width would not depend on where in a bin it lies
DAMPING = 5.0  # Å²; the edge of a cloud, where reflections come and go with the strain, has 3 %
DAMPING_SCALE_FREE = 1.1  # of |q| V^⅓
# Up to it, patterns are near: one and the same pattern is so far from itself when all |q| grow by
# 0.2 % or all intensities by 10 %. Of 5,450 test crystals of the Materials Project, 579 had a
# training crystal so near (sphere:1.2, splits of 10 %); 69 % of these pairs have one stoichiometry
# (XY₂Z, …) and 84 % one crystal system; among the others are lithium oxides of one framework.
TOLERANCE = 0.05
_BLOCK = 2**25  # pairs of crystals at a time


@dataclass(frozen=True, slots=True)
class Nearest:
    """For each of N crystals, the nearest of T others."""

    row_N: IntArray  # of the T, −1 where there is none
    distance_N: FloatArray  # see `nearest`; infinite where there is none
    within_N: IntArray  # how many of the T lie within the tolerance

    @property
    def near_N(self) -> NDArray[np.bool_]:
        """Crystals that have another within the tolerance."""
        return self.within_N > 0


def audit(data: Clouds, rows: Mapping[str, IntArray]) -> tuple[dict[str, Any], pa.Table]:
    """What the training split tells of the held-out ones: counts (plain JSON values), and a list.

    The list has a row for each crystal outside `train`: `id`, `group`, `split`, then twice, for the
    profile as it is (`near_…`) and scale-free (`isostructural_…`), `id`, `group` and `distance` of
    the nearest training crystal and the `count` of those within the tolerance.

    Args:
        rows: split → rows of its crystals, with `train` among them, as in `Parts.rows`.
    """
    held = {side: np.asarray(part) for side, part in rows.items() if side != "train"}
    train, outside = np.asarray(rows["train"]), np.concatenate([*held.values()])
    sides_N = np.repeat(list(held), [len(part) for part in held.values()])
    columns: dict[str, Any] = {"id": data.ids[outside], "group": data.groups[outside]}
    columns["split"] = sides_N
    counts: dict[str, dict[str, int]] = {
        side: {"structures": len(part)} for side, part in held.items()
    }
    for kind in ("near", "isostructural"):
        profiles_ND = radial_profiles(data, scale_free=kind == "isostructural")
        found = nearest(profiles_ND[outside], profiles_ND[train])
        for side in held:
            counts[side][kind] = int(found.near_N[sides_N == side].sum())
        known = found.row_N >= 0
        for name, texts in (("id", data.ids), ("group", data.groups)):
            column = np.full(len(outside), None, dtype=object)
            column[known] = texts[train[found.row_N[known]]]
            columns[f"{kind}_{name}"] = pa.array(column, pa.string())
        columns[f"{kind}_distance"] = found.distance_N
        columns[f"{kind}_count"] = found.within_N
    everyone = np.concatenate([train, outside])
    sides = np.concatenate([np.repeat("train", len(train)), sides_N])
    summary = {
        "shared_groups": shared_groups(data.groups[everyone].tolist(), sides.tolist()),
        "tolerance": TOLERANCE,
        "splits": counts,
    }
    return summary, pa.table(columns)


def shared_groups(groups_N: Sequence[str], sides_N: Sequence[str]) -> list[str]:
    """Groups with crystals on more than one side of a split, sorted; there should be none."""
    pairs = set(zip(map(str, groups_N), map(str, sides_N), strict=True))
    names, sides = np.unique([group for group, _ in pairs], return_counts=True)
    return [str(name) for name in names[sides > 1]]


def radial_profiles(data: Clouds, *, scale_free: bool = False) -> FloatArray:
    """(N, D) fingerprints: square root of the intensity by ln |q|, peaks smeared by `WIDTH`.

    The axis spans the whole set: compare only profiles of one call. Intensities are damped by
    exp(−B |q|²/2), as by thermal motion, and the origin is left out.

    Args:
        scale_free: |q| in units of V^(−⅓), V the cell's volume, and each profile of length one, so
            that isostructural crystals are near whatever the size of their atoms, if the contrast
            of their elements is similar.
    """
    volume_N = np.abs(np.linalg.det(data.lattice_N33.numpy().astype(np.float64)))
    unit_N = np.cbrt(volume_N) if scale_free else np.ones(len(data))
    damping = DAMPING_SCALE_FREE if scale_free else DAMPING
    every = [rows.numpy() for rows in blocks(data, torch.arange(len(data)))]
    least, largest = np.inf, 0.0
    for rows in every:
        length = _lengths(data.subset(rows), unit_N[rows])
        least = min(least, float(length[length > 0].min(initial=np.inf)))
        largest = max(largest, float(length.max(initial=0)))
    if not largest:
        return np.zeros((len(data), 1), np.float32)
    low = np.log(least) - 4 * WIDTH  # room for the whole of the outermost peaks
    bins = int((np.log(largest) + 4 * WIDTH - low) / _BIN) + 2
    axis = np.arange(bins) * _BIN
    kernel = np.exp(-((axis[:, None] - axis) ** 2) / (2 * WIDTH**2)).astype(np.float32)
    profiles = np.zeros((len(data), bins), np.float32)
    for rows in every:
        part = data.subset(rows)
        length = _lengths(part, unit_N[rows])
        weight = part.intensity_P.numpy() * part.multiplicity_P.numpy()
        weight = np.where(length > 0, weight * np.exp(-damping / 2 * length**2), 0.0)
        place = np.maximum(np.log(np.where(length > 0, length, 1.0)) - low, 0) / _BIN
        # Shared between the two next bins: a peak moves smoothly from one to the other.
        bin_, share = np.divmod(np.where(length > 0, place, 0.0), 1.0)
        flat = part.crystal_P.numpy() * bins + bin_.astype(np.int64)
        size = len(rows) * bins
        filled = np.bincount(flat, weight * (1 - share), size)
        filled += np.bincount(flat + 1, weight * share, size + 1)[:size]
        profiles[rows] = np.sqrt(filled.reshape(-1, bins).astype(np.float32) @ kernel)
    if scale_free:
        norm = np.linalg.norm(profiles, axis=1, keepdims=True)
        profiles /= np.where(norm > 0, norm, 1.0)
    return profiles


def _lengths(data: CloudSet, unit_N: NDArray[np.float64]) -> FloatArray:
    """(P,) |q| in units of each crystal's own."""
    length_P = np.linalg.norm(data.q_P3.numpy(), axis=1)
    lengths: FloatArray = length_P * unit_N.astype(np.float32)[data.crystal_P.numpy()]
    return lengths


def nearest(
    profiles_ND: FloatArray, others_TD: FloatArray, tolerance: float = TOLERANCE
) -> Nearest:
    """The nearest of the others to each crystal, by |a − b| / max(|a|, |b|) of their profiles.

    The distance is 0 for equal patterns, √2 for patterns of equal strength without common peaks;
    as a function of amplitudes it resembles the weighted R factor of two powder patterns. All pairs
    are compared, in blocks. A profile of zeros is near nothing.
    """
    found = Nearest(
        row_N=np.full(len(profiles_ND), -1, np.int64),
        distance_N=np.full(len(profiles_ND), np.inf, np.float32),
        within_N=np.zeros(len(profiles_ND), np.int64),
    )
    if not len(others_TD):
        return found
    square_T = np.einsum("td,td->t", others_TD, others_TD)
    step = max(1, _BLOCK // len(others_TD))
    for first in range(0, len(profiles_ND), step):
        rows = slice(first, first + step)
        mine = profiles_ND[rows]
        square = np.einsum("nd,nd->n", mine, mine)[:, None]
        larger = np.maximum(square, square_T)
        apart = (square + square_T - 2 * mine @ others_TD.T) / np.where(larger > 0, larger, 1)
        apart = np.sqrt(np.where((square > 0) & (square_T > 0), np.maximum(apart, 0), np.inf))
        found.distance_N[rows] = apart.min(axis=1)
        found.row_N[rows] = np.where(apart.min(axis=1) < np.inf, apart.argmin(axis=1), -1)
        found.within_N[rows] = (apart <= tolerance).sum(axis=1)
    return found
