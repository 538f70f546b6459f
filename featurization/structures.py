"""Structures in the forms that databases and programs write → a validated `Crystal`.

Whatever comes in, either a crystal that can be computed with comes out or a `Reject`.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import gemmi
import numpy as np

from featurization.crystal import Crystal, Reject
from featurization.validation import (
    MAX_ATOMS,
    cartesian_to_fractional,
    check_size,
    crystal_from_arrays,
    lattice_from_parameters,
    numbers,
)

# A CIF of more atoms than this before special positions are merged is not expanded at all.
_MAX_IMAGES = 50 * MAX_ATOMS


def crystal_from_structure_dict(
    structure: Mapping[str, Any], id: str, labels: dict[str, float]
) -> Crystal:
    """A crystal from a pymatgen `Structure.as_dict()`, as in JSON of the Materials Project.

    The lattice may be a `matrix` or only `a`, `b`, `c`, `alpha`, `beta`, `gamma`; a site needs
    `abc` (fractional) or `xyz` (Å). Oxidation states, labels and site properties are ignored.

    Raises:
        Reject: malformed, or not valid as in `crystal_from_arrays`.
    """
    try:
        cell, sites = structure["lattice"], structure["sites"]
        if "matrix" in cell:
            lattice = numbers(cell["matrix"], (3, 3), "lattice")
        else:
            names = ("a", "b", "c", "alpha", "beta", "gamma")
            lattice = lattice_from_parameters(numbers([cell[name] for name in names], (6,), "cell"))
        if len(sites) > MAX_ATOMS:
            raise Reject("structure", f"{len(sites)} sites; must be 1 to {MAX_ATOMS}")
        fractional = all("abc" in s for s in sites)
        coordinates = numbers([s["abc" if fractional else "xyz"] for s in sites], None, "sites")
        rows = [
            (index, species["element"], species.get("occu", 1.0))
            for index, entry in enumerate(sites)
            for species in entry["species"]
        ]
        names_, occupancy = [str(r[1]) for r in rows], numbers([r[2] for r in rows], (-1,), "occu")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Reject(
            "structure", f"malformed structure dict: {type(error).__name__}: {error}"
        ) from None
    if not fractional:
        coordinates = cartesian_to_fractional(coordinates, lattice)
    site = np.array([r[0] for r in rows], dtype=np.int64)
    return crystal_from_arrays(id, lattice, coordinates[site], names_, occupancy, site, labels)


def crystal_from_pymatgen(structure: Any, id: str, labels: dict[str, float]) -> Crystal:
    """A crystal from a `pymatgen.core.Structure`; oxidation states are ignored.

    Raises:
        Reject: not valid as in `crystal_from_arrays`.
    """
    # `symbol` of pymatgen's deuterium and tritium is "H", their `name` is not.
    rows = [
        (index, getattr(getattr(species, "element", species), "name", species.symbol), amount)
        for index, entry in enumerate(structure)
        for species, amount in entry.species.items()
    ]
    site = np.array([row[0] for row in rows], dtype=np.int64)
    return crystal_from_arrays(
        id,
        numbers(structure.lattice.matrix, (3, 3), "lattice"),
        numbers(structure.frac_coords, None, "sites")[site],
        [row[1] for row in rows],
        numbers([row[2] for row in rows], (-1,), "occupancy"),
        site,
        labels,
    )


def crystal_from_cif(text: str, id: str, labels: dict[str, float]) -> Crystal:
    """A crystal from the first data block that has atom sites; further blocks are ignored.

    Listed symmetry operations are applied, else those of the named space group, else none (P1).
    Images of one site within 0.4 Å of each other are one atom on a special position (averaged).
    Mixed occupancy (several sites in one place) becomes one site.

    Raises:
        Reject: too long, not CIF, no atom sites, an unknown space group, or not valid as in
            `crystal_from_arrays`.
    """
    check_size(text)
    try:
        document = gemmi.cif.read_string(text, check_level=0)  # published files repeat tags
        structures = (_small_structure(block) for block in document)
        small = next((s for s in structures if len(s.sites) > 0), None)
    except (ValueError, RuntimeError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise Reject("structure", f"not CIF: {reason[:200]}") from None
    if small is None:
        raise Reject("structure", "no data block with atom sites")
    cell = small.cell
    lattice = lattice_from_parameters(numbers(cell.parameters, (6,), "cell"))
    if not small.symops and small.spacegroup is None and small.spacegroup_hm:
        raise Reject("structure", f"unknown space group {small.spacegroup_hm!r}")
    for place in small.sites:
        if not all(math.isfinite(x) for x in place.fract.tolist()):
            raise Reject("structure", f"a coordinate of {place.label} is not a number")
        if place.element.name == "X":
            name = place.type_symbol or place.label
            raise Reject("structure", f"unknown element {name!r}")
    if len(small.sites) * (1 + len(cell.images)) > _MAX_IMAGES:
        raise Reject("structure", f"{len(small.sites)} sites × {1 + len(cell.images)} operations")
    sites = small.get_all_unit_cell_sites()
    if len(sites) > MAX_ATOMS:  # before they become Python's, which take ten times the memory
        raise Reject("structure", f"{len(sites)} atoms; must be 1 to {MAX_ATOMS}")
    return crystal_from_arrays(
        id,
        lattice,
        numbers([place.fract.tolist() for place in sites], None, "sites"),
        [place.element.name for place in sites],
        numbers([place.occ for place in sites], (-1,), "occupancy"),
        np.arange(len(sites), dtype=np.int64),
        labels,
    )


def _small_structure(block: gemmi.cif.Block) -> gemmi.SmallStructure:
    for tag in ("_atom_site_fract_x", "_atom_site_Cartn_x"):
        if (rows := len(block.find_values(tag))) > MAX_ATOMS:
            raise Reject("structure", f"{rows} rows of atoms; must be 1 to {MAX_ATOMS}")
    return gemmi.make_small_structure_from_block(block)


def crystal_from_poscar(text: str, id: str, labels: dict[str, float]) -> Crystal:
    """A crystal from VASP 5 POSCAR text (direct or Cartesian, selective dynamics allowed).

    Raises:
        Reject: too long, not POSCAR, VASP 4 (no element symbols), or not valid as in
            `crystal_from_arrays`.
    """
    check_size(text)
    # pymatgen takes most of a second to import: only for those who have POSCAR files.
    from pymatgen.io.vasp.inputs import Poscar

    lines = text.splitlines()
    if len(lines) < 8:
        raise Reject("structure", f"POSCAR has {len(lines)} lines; needs at least 8")
    if all(word.isdigit() for word in lines[5].split()):
        raise Reject("structure", "POSCAR without element symbols (VASP 4); line 6 must name them")
    counts = lines[6].split("!")[0].split()
    if not counts or not all(word.isdecimal() for word in counts):
        raise Reject("structure", f"POSCAR line 7 is {lines[6]!r}; must be numbers of atoms")
    if sum(int(word[:9]) for word in counts) > MAX_ATOMS:
        raise Reject("structure", f"POSCAR with {' + '.join(counts)} atoms; at most {MAX_ATOMS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = Poscar.from_str(text).structure
    except Exception as error:  # pymatgen raises many kinds on malformed text
        raise Reject("structure", f"not POSCAR: {type(error).__name__}: {error}") from None
    return crystal_from_pymatgen(structure, id, labels)
