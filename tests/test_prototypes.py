"""Decorated prototypes keep the symmetry of their prototype, and nothing else of it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from featurization import prototypes
from featurization.cells import standardize, symmetry_of
from featurization.crystal import CRYSTAL_SYSTEMS, Crystal
from featurization.geometry import close_pairs
from featurization.prototypes import Prototypes
from featurization.sources import open_source


def crystals(count: int, seed: int = 0) -> list[Crystal]:
    source = Prototypes(count, seed)
    return [source.parse(record) for record in source.records()]


def space_group(crystal: Crystal) -> int:
    """By spglib, which shares no code with moyo."""
    kinds = sorted(set(crystal.species))
    numbers = [kinds.index(name) + 1 for name in crystal.species]
    cell = (crystal.lattice, crystal.positions, numbers)
    found = spglib.get_spacegroup(cell, symprec=prototypes.SYMPREC)
    return int(found.split("(")[1].rstrip(")"))


@pytest.fixture(scope="module")
def sample() -> list[Crystal]:
    return crystals(420, seed=3)


def test_each_decoration_has_the_space_group_of_its_aflow_label(sample: list[Crystal]) -> None:
    for crystal in sample:
        wanted = int(crystal.group.split("_")[2])
        assert standardize(crystal, "primitive", 0.1)[1].number == wanted, crystal.id
        assert standardize(crystal, "niggli", 0.1)[1].number == wanted, crystal.id


def test_spglib_agrees(sample: list[Crystal]) -> None:
    # The two searches may draw the line at the tolerance differently, but hardly ever.
    off = [c.group for c in sample if space_group(c) != int(c.group.split("_")[2])]
    assert len(off) <= 0.03 * len(sample), off


def test_a_strain_that_ignores_the_point_group_is_noticed(sample: list[Crystal]) -> None:
    """The broken variant of step 4: the space group must not survive it."""
    strain = np.eye(3) + np.array([[0.04, 0.02, 0.0], [0.02, -0.04, 0.01], [0.0, 0.01, 0.03]])
    lost = total = 0
    for crystal in sample[:140]:
        number = int(crystal.group.split("_")[2])
        if symmetry_of(number).crystal_system != "triclinic":
            broken = replace(crystal, lattice=crystal.lattice @ strain)
            total += 1
            lost += space_group(broken) != number
    assert lost > 0.9 * total


def test_lattice_parameters_vary_where_the_crystal_system_lets_them(sample: list[Crystal]) -> None:
    """Lengths relative to each other are fixed in cubic cells and free in tetragonal ones."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for crystal in sample:
        standard, symmetry = standardize(crystal, "conventional", 0.1)
        lengths = np.linalg.norm(standard.lattice, axis=1)
        key = (symmetry.crystal_system, crystal.group.split(":")[0])
        ratios.setdefault(key, []).append(float(lengths[2] / lengths[0]))
    cubic = [r for (system, _), rs in ratios.items() if system == "cubic" for r in rs]
    assert np.allclose(cubic, 1.0, atol=1e-6)
    for system in ("tetragonal", "hexagonal", "orthorhombic"):
        spreads = [np.ptp(rs) for (s, _), rs in ratios.items() if s == system and len(rs) > 1]
        assert spreads, system
        assert np.median(spreads) > 1e-3, system


def test_crystal_systems_are_even_and_every_prototype_has_its_turn() -> None:
    library = prototypes._library()[0]
    assert sum(map(len, library.values())) >= 270
    assert tuple(library) == CRYSTAL_SYSTEMS
    largest = max(map(len, library.values()))
    counts: Counter[str] = Counter()
    labels = set()
    for crystal in crystals(7 * largest):
        labels.add(crystal.group.split(":")[0])
        counts[symmetry_of(int(crystal.group.split("_")[2])).crystal_system] += 1
    assert max(counts.values()) == min(counts.values())
    assert labels == {p.label for members in library.values() for p in members}


def test_crystals_are_plausible(sample: list[Crystal]) -> None:
    for crystal in sample:
        assert 0.9 < crystal.volume / len(crystal.species) < 700.0
        _, _, near = close_pairs(crystal.lattice, crystal.positions, 0.7)
        assert len(near) == 0, crystal.id
        assert not crystal.labels
        stoichiometry = crystal.group.split("_")[0]
        if "sigma" not in stoichiometry:
            assert len(set(crystal.species)) == sum(c.isupper() for c in stoichiometry)
    assert len({c.reduced_formula for c in sample}) > 300


def test_elements_scatter_every_radiation_and_are_no_noble_gases() -> None:
    elements = prototypes._elements()
    assert len(elements) > 80
    assert not {"He", "Ne", "Ar", "Kr", "Xe", "Rn", "D", "Og"} & set(elements)
    assert {"H", "Li", "O", "Fe", "U"} <= set(elements)


def same(a: Crystal, b: Crystal) -> bool:
    return (
        a.id == b.id
        and a.species == b.species
        and a.group == b.group
        and a.lattice.tobytes() == b.lattice.tobytes()
        and a.positions.tobytes() == b.positions.tobytes()
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9 - 1), st.integers(0, 5000))
def test_a_crystal_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    small, large = Prototypes(index + 1, seed), Prototypes(9999, seed)
    one = next(r for r in small.records() if r.index == index)
    other = next(r for r in large.records() if r.index == index)
    assert same(small.parse(one), large.parse(other))


def test_seeds_differ() -> None:
    first, second = crystals(30, seed=0), crystals(30, seed=1)
    assert sum(a.species == b.species for a, b in zip(first, second, strict=True)) < 5


def test_the_word_names_count_and_seed() -> None:
    assert sum(1 for _ in open_source("prototypes").records()) == 2000
    source = open_source("prototypes:12:5")
    records = list(source.records())
    assert [r.id for r in records] == [f"aflow-{i:06d}" for i in range(12)]
    description = source.describe()
    assert (description["count"], description["seed"]) == (12, 5)
    assert description["prototypes"] + description["prototypes_left_out"] == 288
    assert len(str(description["sha256"])) == 64


@pytest.mark.parametrize(
    "spec", ["prototypes:", "prototypes:0", "prototypes:-1", "prototypes:5:x", "prototypes:1:2:3"]
)
def test_a_wrong_word_is_explained(spec: str) -> None:
    with pytest.raises(UserError, match="prototypes:COUNT:SEED"):
        open_source(spec)
