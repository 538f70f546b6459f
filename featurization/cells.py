"""Symmetry search, labels from it, and the cell that the cloud is written in.

One moyo call gives the space group and the standardized cell. A standardized cell is accepted
only if it is provably the same crystal: each atom mapped back lies where it was, the lattice is
strained no more than the symmetry tolerance explains, and the composition is unchanged.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache

import moyopy
import numpy as np

from featurization.config import CellName
from featurization.crystal import Crystal, FloatArray, Reject

CRYSTAL_SYSTEMS = (
    "triclinic",
    "monoclinic",
    "orthorhombic",
    "tetragonal",
    "trigonal",
    "hexagonal",
    "cubic",
)

# moyo warns when a supercell hides operations from the input cell's basis; we use none of those.
logging.getLogger("moyo").setLevel(logging.ERROR)

# Idealization may move an atom, or the tip of a lattice vector, by this many tolerances.
_ALLOWED_TOLERANCES = 3.0


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Labels of one symmetry search."""

    number: int  # space group, 1 … 230
    point_group: str  # Hermann–Mauguin, e.g. "m-3m"
    bravais: str  # Bravais class, e.g. "cF"
    crystal_system: str  # one of CRYSTAL_SYSTEMS


def standardize(crystal: Crystal, cell: CellName, symprec: float) -> tuple[Crystal, Symmetry]:
    """The crystal in the cell asked for, and its symmetry.

    Args:
        cell: "primitive" or "conventional" (standardized and idealized), "niggli" (the Niggli
            reduction of the primitive one), or "as_given" (untouched; only labelled).
        symprec: tolerance in Å.

    Raises:
        Reject: the search fails, or its cell is another crystal.
    """
    first = np.unique(crystal.site, return_index=True)[1]  # a row of each site
    contents = [_content(crystal, int(crystal.site[row])) for row in first]
    kinds = sorted(set(contents))
    given = moyopy.Cell(
        crystal.lattice.tolist(),
        crystal.positions[first].tolist(),
        [kinds.index(content) + 1 for content in contents],
    )
    try:
        dataset = moyopy.MoyoDataset(given, symprec=symprec, setting=moyopy.Setting.standard())
    except BaseException as error:  # a Rust panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise Reject("cell", f"symmetry search failed at symprec {symprec} Å: {error}") from None
    symmetry = symmetry_of(dataset.number)
    if cell == "as_given":
        return crystal, symmetry
    _check_same_crystal(given, dataset, symprec)
    chosen = dataset.std_cell if cell == "conventional" else dataset.prim_std_cell
    lattice, positions = np.array(chosen.basis), np.array(chosen.positions)
    if cell == "niggli":
        reduced, transformation = moyopy.niggli_reduce(chosen.basis)
        lattice = np.array(reduced)
        positions = positions @ np.linalg.inv(np.array(transformation).T)
    rows = [
        (site, name, occupancy)
        for site, kind in enumerate(chosen.numbers)
        for name, occupancy in kinds[kind - 1]
    ]
    site = np.array([row[0] for row in rows], dtype=np.int64)
    standard = replace(
        crystal,
        lattice=lattice,
        positions=positions[site] % 1.0,
        species=tuple(row[1] for row in rows),
        occupancy=np.array([row[2] for row in rows]),
        site=site,
    )
    _check_same_composition(crystal, standard)
    return standard, symmetry


@cache
def symmetry_of(number: int) -> Symmetry:
    """Symmetry labels of a space-group number, 1 … 230."""
    kind = moyopy.SpaceGroupType(number)
    return Symmetry(
        number=number,
        point_group=str(kind.geometric_crystal_class),
        bravais=str(kind.bravais_class),
        crystal_system=str(kind.crystal_system).lower(),
    )


def _content(crystal: Crystal, site: int) -> tuple[tuple[str, float], ...]:
    rows = np.flatnonzero(crystal.site == site)
    return tuple(sorted((crystal.species[r], round(float(crystal.occupancy[r]), 6)) for r in rows))


def _check_same_crystal(given: moyopy.Cell, dataset: moyopy.MoyoDataset, symprec: float) -> None:
    """Reject a standardized cell whose atoms or lattice moved further than the tolerance allows.

    The primitive and the conventional cell differ by an exact centering, so that one is checked.
    """
    linear = np.array(dataset.prim_std_linear)
    selected = np.array(given.basis).T @ linear  # columns, before idealization
    ideal = np.array(dataset.prim_std_cell.basis).T
    limit = _ALLOWED_TOLERANCES * symprec
    # Lattice: polar stretch, expressed as the motion of the longest lattice vector's tip.
    stretch = np.linalg.svd(ideal @ np.linalg.inv(selected), compute_uv=False)
    longest = float(np.linalg.norm(selected, axis=0).max())
    moved = float(np.abs(stretch - 1.0).max()) * longest
    if moved > limit:
        raise Reject("cell", f"standardized lattice differs by {moved:.3f} Å > {limit:.3f} Å")
    kinds = np.array(dataset.prim_std_cell.numbers)[dataset.mapping_std_prim]
    if not np.array_equal(kinds, given.numbers):
        raise Reject("cell", "standardized cell puts other species on the sites")
    shift = np.array(dataset.prim_std_origin_shift)
    expected = (np.array(given.positions) - shift) @ np.linalg.inv(linear).T
    found = np.array(dataset.prim_std_cell.positions)[dataset.mapping_std_prim]
    delta: FloatArray = expected - found
    distance = float(np.linalg.norm((delta - np.rint(delta)) @ ideal.T, axis=1).max())
    if distance > limit:
        raise Reject("cell", f"standardized atoms moved by {distance:.3f} Å > {limit:.3f} Å")


def _check_same_composition(before: Crystal, after: Crystal) -> None:
    ratio = sum(after.composition.values()) / sum(before.composition.values())
    for name, amount in before.composition.items():
        if abs(after.composition.get(name, 0.0) - ratio * amount) > 1e-6 * max(1.0, ratio * amount):
            raise Reject("cell", f"standardized cell changes the amount of {name}")
    if abs(after.volume / before.volume / ratio - 1.0) > 0.1:
        raise Reject("cell", "standardized cell changes the volume per atom by more than 10 %")
