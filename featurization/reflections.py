"""The reflections of one crystal: which are equivalent, and the powder pattern they add up to."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import moyopy
import numpy as np

from featurization.cells import Symmetry
from featurization.config import FeaturizationConfig
from featurization.crystal import FloatArray, IntArray

# Stored lattices are idealized, intensities single precision: nothing equivalent differs by more.
_LATTICE_TOLERANCE = 1e-4  # Å
_INTENSITY_TOLERANCE = 1e-3
# |q| of one shell differ by rounding only.
_SHELL_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Diffraction:
    """One crystal of a dataset as stored, with its origin taken apart (P points without it)."""

    id: str
    formula: str
    config: FeaturizationConfig
    lattice: FloatArray  # (3, 3), rows a, b, c in Å
    symmetry: Symmetry
    labels: Mapping[str, float]  # known ones only
    label_units: Mapping[str, str]
    unit: str  # of the intensity
    hkl: IntArray  # (P, 3), one of each pair ±hkl
    intensity: FloatArray  # (P,), |F|²/V²
    others: Mapping[str, FloatArray]  # radiation → (P,), the columns `intensity_NAME`
    origin: float | None  # I(000); None when the cloud does not hold it

    @property
    def reciprocal(self) -> FloatArray:
        """Rows a*, b*, c* in 1/Å (no 2π)."""
        return np.linalg.inv(self.lattice).T.astype(np.float64)

    @property
    def length(self) -> FloatArray:
        """(P,) |q| = 1/d in 1/Å."""
        length: FloatArray = np.linalg.norm(self.hkl @ self.reciprocal, axis=1)
        return length

    @property
    def complete_to(self) -> float:
        """|q| in 1/Å up to which the cloud holds every reflection.

        A sphere is complete. A Miller cube misses |h| = m + 1 = |q·a|, which is no nearer than
        (m + 1) / |a|; so for k and l.
        """
        if self.config.miller_limit is None:
            assert self.config.q_max is not None
            return self.config.q_max
        longest = float(np.linalg.norm(self.lattice, axis=1).max())
        return (self.config.miller_limit + 1) / longest


def reflections(one: Diffraction) -> list[dict[str, Any]]:
    """Sets of equivalent reflections, the origin left out, strongest I × multiplicity first.

    Each has `hkl` (of the stored cell), `q` = |q| (1/Å), `d` (Å), `intensity`, `multiplicity`
    (equivalent points of the cloud, both Friedel mates; beyond `complete_to` some may lie outside
    of a Miller cube) and, for other radiations of the dataset, `intensity_NAME`.
    """
    images = (_codes(one.hkl @ operation) for operation in laue_operations(one))
    _, inverse, counts = np.unique(
        reduce(np.maximum, images), return_inverse=True, return_counts=True
    )
    # The one of the stored half with the most and the largest positive indices stands for all.
    order = np.lexsort([*one.hkl.T[::-1], (one.hkl >= 0).sum(axis=1), inverse])
    chosen = order[np.cumsum(counts) - 1]
    strength = one.intensity[chosen] * counts
    length = one.length
    rows = []
    for kind in np.lexsort([length[chosen], -strength]):
        point = chosen[kind]
        rows.append(
            {
                "hkl": one.hkl[point].tolist(),
                "q": float(length[point]),
                "d": float(1.0 / length[point]),
                "intensity": float(one.intensity[point]),
                "multiplicity": 2 * int(counts[kind]),
            }
            | {f"intensity_{name}": float(column[point]) for name, column in one.others.items()}
        )
    return rows


def powder(one: Diffraction) -> tuple[FloatArray, FloatArray]:
    """The powder pattern that a cloud implies, without Lorentz or polarization factor.

    Returns:
        For each of S shells of equal |q|, in order: (S,) |q| in 1/Å, and (S,) the sum of the
        intensities of all its points, both Friedel mates.
    """
    length = one.length
    order = np.argsort(length)
    ascending = length[order]
    new = np.diff(ascending, prepend=0.0) > _SHELL_TOLERANCE * ascending
    total = 2.0 * np.bincount(np.cumsum(new) - 1, one.intensity[order])
    return ascending[new], total.astype(np.float64)


def laue_operations(one: Diffraction) -> IntArray:
    """(R, 3, 3) operations W of the stored lattice that leave all intensities as they are: h → hW.

    They are found from the cloud, hence in whatever cell it is written: the operations of the bare
    lattice, without those that move a reflection onto one of another intensity. A cell that the
    lattice of the crystal does not leave alone (a supercell taken as given) shows fewer.
    """
    bare = moyopy.Cell(one.lattice.tolist(), [[0.0, 0.0, 0.0]], [1])
    found = moyopy.MoyoDataset(bare, symprec=_LATTICE_TOLERANCE).operations.rotations
    if not len(one.hkl):
        return np.eye(3, dtype=np.int64)[None]
    codes = _codes(one.hkl)
    order = np.argsort(codes)
    ascending = codes[order]
    columns = np.stack([one.intensity, *one.others.values()])
    floor = 1e-6 * columns.max(axis=1, keepdims=True)
    kept = []
    for operation in np.unique(np.array(found, dtype=np.int64), axis=0):
        images = one.hkl @ operation
        wanted = _codes(images)
        place = np.minimum(np.searchsorted(ascending, wanted), len(order) - 1)
        # An absent reflection may have been dropped; one outside of the Miller cube is not known.
        image = np.where(ascending[place] == wanted, columns[:, order[place]], 0.0)
        limit = one.config.miller_limit
        known = np.abs(images).max(axis=1) <= limit if limit else np.ones(len(images), dtype=bool)
        allowed = _INTENSITY_TOLERANCE * np.maximum(image, columns) + floor
        if (np.abs(image - columns) <= allowed)[:, known].all():
            kept.append(operation)
    return np.array(kept)


def _codes(hkl: IntArray) -> IntArray:
    """One number for ±hkl, the same for both; indices are below 2¹⁶ (shards store int16)."""
    base = 1 << 17
    code: IntArray = np.abs((hkl[:, 2] * base + hkl[:, 1]) * base + hkl[:, 0])
    return code
