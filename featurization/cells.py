"""Symmetry search, labels from it, and the cell that the cloud is written in.

One moyo call gives the space group and the standardized cell. A standardized cell is accepted
only if it is provably the same crystal: each atom mapped back lies where it was, the lattice is
strained no more than the symmetry tolerance explains, and the composition is unchanged.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import moyopy
import numpy as np

from featurization.config import CellName
from featurization.crystal import Crystal, FloatArray, Reject, cell_volume
from featurization.geometry import close_pairs, inverse, motion
from featurization.kernel import reciprocal_cell

# moyo warns when a supercell hides operations from the input cell's basis; we use none of those.
logging.getLogger("moyo").setLevel(logging.ERROR)

# Idealization may move an atom, or the tip of a lattice vector, by this many tolerances.
_ALLOWED_TOLERANCES = 3.0
# Å; the primitive and the conventional cell are made from the same numbers.
_EXACT = 1e-3

# symprec × longest ÷ shortest² of the reduced edges. Real crystals are below 1 at 0.1 Å; moyo never
# came back from some random cells above 2.5.
_MOST_SHEAR = 2.0

Content = tuple[tuple[str, float], ...]  # species and occupancies of a site


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
    contents: dict[int, Content] = {}  # in the order of sites, species in alphabetical order
    rows = zip(crystal.site.tolist(), crystal.species, crystal.occupancy.tolist(), strict=True)
    for site, name, occupancy in sorted(rows):
        contents[site] = (*contents.get(site, ()), (name, round(occupancy, 6)))
    kinds = sorted(set(contents.values()))
    number = {content: index for index, content in enumerate(kinds, 1)}
    positions = np.empty((len(contents), 3))
    positions[crystal.site] = crystal.positions
    numbers = [number[content] for content in contents.values()]
    _check_tolerance(crystal.lattice, symprec)
    given = moyopy.Cell(crystal.lattice.tolist(), positions.tolist(), numbers)
    try:
        dataset = moyopy.MoyoDataset(given, symprec=symprec, setting=moyopy.Setting.standard())
    except BaseException as error:  # a Rust panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise Reject("cell", f"symmetry search failed at symprec {symprec} Å: {error}") from None
    symmetry = symmetry_of(dataset.number)
    if cell == "as_given":
        return crystal, symmetry
    limit = _ALLOWED_TOLERANCES * symprec
    _check_same_crystal(crystal.lattice, positions, numbers, dataset, limit)
    chosen = dataset.std_cell if cell == "conventional" else dataset.prim_std_cell
    lattice, positions = np.array(chosen.basis), np.array(chosen.positions)
    if cell == "niggli":
        reduced, transformation = moyopy.niggli_reduce(chosen.basis)
        lattice = np.array(reduced)
        positions = positions @ np.linalg.inv(np.array(transformation).T)
    sites, species, occupancies = zip(
        *(
            (site, name, occupancy)
            for site, kind in enumerate(chosen.numbers)
            for name, occupancy in kinds[kind - 1]
        ),
        strict=True,
    )
    rows_of = np.array(sites)
    standard = Crystal(
        id=crystal.id,
        lattice=lattice,
        positions=positions[rows_of] % 1.0,
        species=species,
        occupancy=np.array(occupancies),
        site=rows_of,
        labels=crystal.labels,
        group=crystal.group,
    )
    _check_same_composition(crystal, standard)
    if cell == "conventional":
        _check_centering(dataset.prim_std_cell, chosen)
    return standard, symmetry


def _check_tolerance(lattice: FloatArray, symprec: float) -> None:
    """Reject a cell in which a shear by a short lattice vector v passes for a symmetry.

    It moves the tip of a long vector b by v²/2b in length. Where the tolerance allows that many
    times over, moyo multiplies shears without end, and takes 30 MiB of memory a second for them.
    """
    reciprocal, _, longest = reciprocal_cell(np.ascontiguousarray(lattice))
    # Between lattice planes there is no vector, and Niggli's cell has no longer edge than any.
    if symprec * longest * (reciprocal**2).sum(axis=1).max() <= _MOST_SHEAR:
        return
    reduced = lattice.tolist()
    with suppress(ValueError):  # it gives some cells up
        reduced, _ = moyopy.niggli_reduce(reduced)
    edges = np.linalg.norm(reduced, axis=1)
    low, high = float(edges.min()), float(edges.max())
    if symprec * high / low**2 > _MOST_SHEAR:
        raise Reject(
            "cell",
            f"edges of {low:.3g} and {high:.3g} Å with symprec {symprec} Å: symprec × longest ÷ "
            f"shortest² must be ≤ {_MOST_SHEAR:g}; use a smaller symprec",
        )


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


def _check_same_crystal(
    lattice: FloatArray,
    positions: FloatArray,
    numbers: list[int],
    dataset: moyopy.MoyoDataset,
    limit: float,
) -> None:
    """Reject a primitive standardized cell whose atoms or lattice moved by more than `limit` Å."""
    primitive, mapping = dataset.prim_std_cell, dataset.mapping_std_prim
    kinds = primitive.numbers
    if [kinds[atom] for atom in mapping] != numbers:
        raise Reject("cell", "standardized cell puts other species on the sites")
    lattice_moved, atoms_moved = motion(
        np.ascontiguousarray(lattice),
        positions,
        np.array(dataset.prim_std_linear).T.copy(),
        np.array(dataset.prim_std_origin_shift),
        np.array(primitive.basis),
        np.array(primitive.positions)[mapping],
    )
    if lattice_moved > limit:
        raise Reject("cell", f"standardized lattice differs by {lattice_moved:.3f} > {limit:.3f} Å")
    if atoms_moved > limit:
        raise Reject("cell", f"standardized atoms moved by {atoms_moved:.3f} > {limit:.3f} Å")


def _check_centering(primitive: moyopy.Cell, conventional: moyopy.Cell) -> None:
    """Reject a conventional cell that is not the primitive one with an exact centering."""
    small, large = np.array(primitive.basis), np.array(conventional.basis)
    rows = np.rint(large @ inverse(small))
    order = round(cell_volume(rows))
    # moyo lists all images of one atom of the primitive cell, then those of the next.
    same = [kind for kind in primitive.numbers for _ in range(order)] == conventional.numbers
    if same:
        positions = np.array(conventional.positions)
        images = np.array(primitive.positions).repeat(order, axis=0)
        moved = motion(large, positions, inverse(rows), np.zeros(3), small, images)
        same = max(moved) < _EXACT and len(close_pairs(large, positions, _EXACT)[0]) == 0
    if not same:
        raise Reject("cell", "conventional cell is not the primitive one with a centering")


def _check_same_composition(before: Crystal, after: Crystal) -> None:
    old, new = before.composition, after.composition
    ratio = sum(new.values()) / sum(old.values())
    for name, amount in old.items():
        if abs(new.get(name, 0.0) - ratio * amount) > 1e-6 * max(1.0, ratio * amount):
            raise Reject("cell", f"standardized cell changes the amount of {name}")
    if abs(after.volume / before.volume / ratio - 1.0) > 0.1:
        raise Reject("cell", "standardized cell changes the volume per atom by more than 10 %")
