"""The default source: decorated AFLOW prototypes, so that everything runs without a download.

Mehl et al., The AFLOW library of crystallographic prototypes, Comput. Mater. Sci. 136, S1 (2017),
288 of them as carried by pymatgen. Crystal i of a seed is made like this:

1. The crystal system is i mod 7 of those that the library has; within it, the prototypes take
   turns in an order shuffled by the seed. Systems are thus even whatever the library holds.
2. Each element of the prototype is replaced by another, one to one: as many are drawn without
   repetition from the elements with an X-ray, an electron and a neutron scattering factor (noble
   gases and deuterium left out) and assigned in the order of their size.
3. The cell is scaled by (Σ r_new³ / Σ r_old³)^⅓ over its atoms, r covalent radii (Cordero et al.,
   Dalton Trans. 2008, 2832, from gemmi; at least 0.7 Å), then by a random −4 … +4 % in length.
   Elements that bring two species closer, relative to the sum of their radii, than 80 % of what
   the closest pair of the prototype is, are drawn again.
4. The cell is strained by the part of a random symmetric tensor (±4 % along, ±3 % across the
   axes) that the point group leaves alone: nothing more in a cubic crystal, c/a in a tetragonal,
   trigonal or hexagonal one, three lengths in an orthorhombic one, β too in a monoclinic one,
   all in a triclinic one. Fractional coordinates stay as they are.

A crystal whose space group (moyo, 0.1 Å) is not that of its prototype is drawn again, and a
prototype whose own space group, found in the same way, is not the one in its AFLOW label is left
out. `group` is the AFLOW label with the formula. The library has few prototypes (2 triclinic ones),
so decorations of one prototype stand on both sides of a split: good for trying things out, no test
of unseen structure types.
"""

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, get_args

import gemmi
import moyopy
import numpy as np
import orjson

from featurization.cells import symmetry_of
from featurization.config import RadiationName
from featurization.crystal import CRYSTAL_SYSTEMS, Crystal, FloatArray, IntArray, Reject
from featurization.geometry import close_pairs
from featurization.radiation import form_factors
from featurization.records import Record, listed, parsed
from featurization.structures import crystal_from_structure_dict
from featurization.validation import crystal_from_arrays

SYMPREC = 0.1  # Å, as in the labels that featurization gives
_DRAWS = 200
_CLOSENESS = 0.8
_NOBLE_GASES = ("He", "Ne", "Ar", "Kr", "Xe", "Rn", "Og")


@dataclass(frozen=True, slots=True)
class _Prototype:
    label: str  # AFLOW: stoichiometry, Pearson symbol, space group, Wyckoff letters
    number: int  # space group
    lattice: FloatArray  # (3, 3)
    positions: FloatArray  # (A, 3)
    kind: IntArray  # (A,), 0 … K − 1: which of its species
    radii: FloatArray  # (K,), of its own species, Å
    shortest: FloatArray  # (K, K), shortest distance between two species, Å
    closest: float  # the least of shortest / sum of radii
    rotations: FloatArray  # (G, 3, 3), Cartesian, x' = R x


class Prototypes:
    """`count` decorated prototypes; crystal i depends on `seed` and i alone."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def describe(self) -> dict[str, str | int | float]:
        library, skipped = _library()
        return {
            "kind": "prototypes",
            "path": _library_file().name,
            "sha256": hashlib.sha256(_library_file().read_bytes()).hexdigest(),
            "count": self._count,
            "seed": self._seed,
            "prototypes": sum(len(members) for members in library.values()),
            "prototypes_left_out": skipped,
        }

    def records(self) -> Iterator[Record]:
        return listed(self)

    def __len__(self) -> int:
        return self._count

    def record(self, index: int) -> Record:
        return Record(index, f"aflow-{index:06d}", index)

    def parse(self, record: Record) -> Crystal:
        return parsed(record, lambda index: _decorated(index, self._seed, record.id))


def _decorated(index: int, seed: int, id: str) -> Crystal:
    library, _ = _library()
    systems = list(library)
    turn, place = divmod(index, len(systems))
    members = _shuffled(systems[place], seed)
    prototype = members[turn % len(members)]
    random = np.random.default_rng([seed, index])
    for _ in range(_DRAWS):
        crystal = _draw(prototype, random, id)
        if crystal is None:
            continue
        if _space_group(crystal.lattice, crystal.positions, prototype.kind) == prototype.number:
            return crystal
    raise Reject("source", f"no decoration of {prototype.label} keeps its space group")


def _draw(prototype: _Prototype, random: np.random.Generator, id: str) -> Crystal | None:
    """One decoration, None if its atoms are too close."""
    kinds = len(prototype.radii)
    drawn = random.choice(_elements(), size=kinds, replace=False).tolist()
    chosen = [""] * kinds
    for kind, name in zip(np.argsort(prototype.radii), sorted(drawn, key=_radius), strict=True):
        chosen[kind] = name
    radii = np.array([_radius(name) for name in chosen])
    cubes = (radii**3)[prototype.kind].sum() / (prototype.radii**3)[prototype.kind].sum()
    scale = float(np.cbrt(cubes)) * (1.0 + random.uniform(-0.04, 0.04))
    tensor = np.diag(random.uniform(-0.04, 0.04, 3))
    tensor[[0, 0, 1], [1, 2, 2]] = tensor[[1, 2, 2], [0, 0, 1]] = random.uniform(-0.03, 0.03, 3)
    closest = (prototype.shortest / np.add.outer(radii, radii)).min()
    if scale * closest < _CLOSENESS * prototype.closest:
        return None
    rotations = prototype.rotations
    strain = (rotations @ tensor @ rotations.transpose(0, 2, 1)).mean(axis=0)
    count = len(prototype.kind)
    crystal = crystal_from_arrays(
        id,
        scale * prototype.lattice @ (np.eye(3) + strain),
        prototype.positions,
        [chosen[kind] for kind in prototype.kind],
        np.ones(count),
        np.arange(count, dtype=np.int64),
        {},
    )
    return replace(crystal, group=f"{prototype.label}:{crystal.reduced_formula}")


@cache
def _library() -> tuple[dict[str, list[_Prototype]], int]:
    """Crystal system → its prototypes in the library's order, and how many were left out."""
    data = _library_file().read_bytes()
    entries = orjson.loads(gzip.decompress(data) if _library_file().name.endswith("gz") else data)
    found = [_prototype(entry) for entry in entries]
    kept = [prototype for prototype in found if prototype is not None]
    systems: dict[str, list[_Prototype]] = {}
    for system in CRYSTAL_SYSTEMS:
        members = [p for p in kept if symmetry_of(p.number).crystal_system == system]
        if members:
            systems[system] = members
    return systems, len(found) - len(kept)


def _prototype(entry: dict[str, Any]) -> _Prototype | None:
    label = entry["tags"]["aflow"]
    crystal = crystal_from_structure_dict(entry["snl"], label, {})
    names, kind = np.unique(crystal.species, return_inverse=True)
    cell = moyopy.Cell(crystal.lattice.tolist(), crystal.positions.tolist(), (kind + 1).tolist())
    dataset = moyopy.MoyoDataset(cell, symprec=SYMPREC)
    if dataset.number != int(label.split("_")[2]):
        return None
    # x' = W x in fractional columns is A W A⁻¹ in Cartesian ones, A holding the vectors as columns.
    basis = crystal.lattice.T
    point_group = np.unique(np.array(dataset.operations.rotations), axis=0)
    rotations = basis @ point_group @ np.linalg.inv(basis)
    radii = np.array([_radius(name) for name in names.tolist()])
    shortest = _shortest_distances(crystal.lattice, crystal.positions, kind)
    return _Prototype(
        label=label,
        number=dataset.number,
        lattice=crystal.lattice,
        positions=crystal.positions,
        kind=kind,
        radii=radii,
        shortest=shortest,
        closest=float((shortest / np.add.outer(radii, radii)).min()),
        rotations=rotations,
    )


def _shortest_distances(lattice: FloatArray, positions: FloatArray, kind: IntArray) -> FloatArray:
    """(K, K) shortest distances between species; inf where they are further than 5 Å apart."""
    first, second, distance = close_pairs(lattice, positions, 5.0)
    shortest = np.full((int(kind.max()) + 1,) * 2, np.inf)
    # The pair 0, 0 stands for any atom and its own image.
    own = first == second
    if own.any():
        np.fill_diagonal(shortest, distance[own].min())
    pairs = (kind[first[~own]], kind[second[~own]])
    np.minimum.at(shortest, pairs, distance[~own])
    symmetric: FloatArray = np.minimum(shortest, shortest.T)
    return symmetric


@lru_cache(maxsize=64)
def _shuffled(system: str, seed: int) -> list[_Prototype]:
    members = _library()[0][system]
    order = np.random.default_rng([seed, CRYSTAL_SYSTEMS.index(system)]).permutation(len(members))
    return [members[i] for i in order]


@cache
def _elements() -> list[str]:
    """Elements that every radiation can see, noble gases left out."""
    names = [gemmi.Element(z).name for z in range(1, 119)]
    return [name for name in names if name not in _NOBLE_GASES and _scatters(name)]


def _radius(name: str) -> float:
    return max(0.7, gemmi.Element(name).covalent_r)


def _scatters(name: str) -> bool:
    try:
        for radiation in get_args(RadiationName):
            form_factors([name], np.zeros(1), radiation)
    except Reject:
        return False
    return True


def _space_group(lattice: FloatArray, positions: FloatArray, kind: IntArray) -> int:
    """Space-group number, 0 if the search fails."""
    cell = moyopy.Cell(lattice.tolist(), positions.tolist(), (kind + 1).tolist())
    try:
        return int(moyopy.MoyoDataset(cell, symprec=SYMPREC).number)
    except (ValueError, RuntimeError):
        return 0


@cache
def _library_file() -> Traversable:
    """The library as data: its classes, slow to import, are not needed."""
    folder = files("pymatgen.analysis") / "prototypes"
    names = ("aflow_prototypes.json.gz", "aflow_prototypes.json")
    return next(folder / name for name in names if (folder / name).is_file())
