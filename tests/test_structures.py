"""Text and dicts → crystals, against pymatgen and brute force."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar

from featurization.crystal import Crystal, Reject, cell_volume
from featurization.geometry import close_pairs, motion
from featurization.structures import (
    crystal_from_cif,
    crystal_from_poscar,
    crystal_from_pymatgen,
    crystal_from_structure_dict,
)
from featurization.validation import (
    ELEMENTS,
    crystal_from_arrays,
    lattice_from_parameters,
    numbers,
)

ROCK_SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
QUARTZ = Structure.from_spacegroup(
    "P3_221",
    Lattice.hexagonal(4.913, 5.405),
    ["Si", "O"],
    [[0.4697, 0, 2 / 3], [0.4133, 0.2672, 0.7852]],
)
ALLOY = Structure(
    Lattice.from_parameters(4.1, 5.2, 6.3, 80, 95, 101),
    [{"Fe": 0.5, "Ni": 0.25}, {"Fe2+": 0.4, "Fe3+": 0.6}, "D"],
    [[0.1, 0.2, 0.3], [0.6, 0.7, 0.8], [0.3, 0.9, 0.5]],
)


def as_set(crystal: Crystal, digits: int = 3) -> list[tuple[Any, ...]]:
    """Rows as a sorted list of species, occupancy and wrapped coordinates."""
    places = np.round(crystal.positions % 1.0, digits) % 1.0
    return sorted(
        (name, round(float(o), 4), *place)
        for name, o, place in zip(crystal.species, crystal.occupancy, places.tolist(), strict=True)
    )


def assert_same_crystal(a: Crystal, b: Crystal, digits: int = 3) -> None:
    assert as_set(a, digits) == as_set(b, digits)
    # The orientation of a cell is free, its metric is not.
    assert np.allclose(a.lattice @ a.lattice.T, b.lattice @ b.lattice.T, atol=1e-3)


@pytest.mark.parametrize("structure", [ROCK_SALT, QUARTZ, ALLOY])
def test_dict_and_pymatgen_agree(structure: Structure) -> None:
    direct = crystal_from_pymatgen(structure, "x", {"a": 1.0})
    document = structure.as_dict()
    for entry, original in zip(document["sites"], structure, strict=True):
        if original.species.elements[0].name == "D":  # pymatgen writes deuterium as H
            entry["species"][0]["element"] = "D"
    assert_same_crystal(crystal_from_structure_dict(document, "x", {}), direct, 6)
    assert direct.volume == pytest.approx(structure.volume)
    assert direct.labels == {"a": 1.0}
    amounts: dict[str, float] = {}
    for entry in structure:
        for kind, amount in entry.species.items():
            name = getattr(kind, "element", kind).name
            amounts[name] = amounts.get(name, 0.0) + amount
    assert direct.composition == pytest.approx(amounts)


def test_equal_elements_of_a_site_become_one_row() -> None:
    crystal = crystal_from_pymatgen(ALLOY, "x", {})
    assert crystal.species == ("Fe", "Ni", "Fe", "D")
    assert crystal.site.tolist() == [0, 0, 1, 2]
    assert crystal.occupancy.tolist() == pytest.approx([0.5, 0.25, 1.0, 1.0])


def test_pymatgen_isotopes_and_dummies() -> None:
    for name in ("T", "X"):
        structure = Structure(Lattice.cubic(3.0), [name], [[0, 0, 0]])
        with pytest.raises(Reject, match=f"unknown element '{name}"):
            crystal_from_pymatgen(structure, "x", {})
    text = Poscar(QUARTZ).get_str().replace("Si O", "D O")
    assert set(crystal_from_poscar(text, "x", {}).species) == {"D", "O"}


def test_lattice_as_parameters_only_and_cartesian_sites() -> None:
    document = QUARTZ.as_dict()
    full = crystal_from_structure_dict(document, "x", {})
    del document["lattice"]["matrix"]
    assert_same_crystal(crystal_from_structure_dict(document, "x", {}), full, 6)
    document = QUARTZ.as_dict()
    for entry in document["sites"]:
        del entry["abc"]
    assert_same_crystal(crystal_from_structure_dict(document, "x", {}), full, 6)


def test_left_handed_lattices_are_kept() -> None:
    mirrored = Structure(QUARTZ.lattice.matrix * [1, 1, -1], QUARTZ.species, QUARTZ.frac_coords)
    crystal = crystal_from_pymatgen(mirrored, "x", {})
    assert np.linalg.det(crystal.lattice) < 0
    assert crystal.volume == pytest.approx(QUARTZ.volume)


@pytest.mark.parametrize("structure", [ROCK_SALT, QUARTZ])
@pytest.mark.parametrize("symprec", [None, 0.01])
def test_cif_from_pymatgen_comes_back(structure: Structure, symprec: float | None) -> None:
    text = str(CifWriter(structure, symprec=symprec))
    found = crystal_from_cif(text, "x", {})
    wanted = crystal_from_pymatgen(structure, "x", {})
    assert found.composition == wanted.composition
    assert found.volume == pytest.approx(wanted.volume, rel=1e-4)
    if symprec is None:
        assert_same_crystal(found, wanted)


CIF = """data_first
_cell_length_a 4
data_x
_cell_length_a 5.0(1)
_cell_length_b 6
_cell_length_c 7
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_symmetry_equiv_pos_as_xyz
{operations}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""


def cif(sites: str, operations: str = "x,y,z") -> str:
    return CIF.format(sites=sites, operations=operations)


def test_cif_special_positions_mixed_sites_and_deuterium() -> None:
    sites = "Fe1 Fe3+ 0 0 0 0.5\nNi1 Ni 0.001 0 0 0.25\nD1 D .1 .2 .3(1) 1\nO1 O .5 .5 .5 ."
    crystal = crystal_from_cif(cif(sites, "x,y,z\n-x,-y,-z"), "x", {})
    assert crystal.composition == pytest.approx({"Fe": 0.5, "Ni": 0.25, "D": 2.0, "O": 1.0})
    shared = crystal.site[crystal.species.index("Fe")]
    assert crystal.species[int(np.flatnonzero(crystal.site == shared)[1])] == "Ni"
    rows = crystal.positions[crystal.site == shared]
    assert np.array_equal(rows[0], rows[1])
    assert (np.diff(crystal.site) >= 0).all()


def test_cif_operations_of_a_setting_without_a_name_are_applied() -> None:
    crystal = crystal_from_cif(cif("Fe Fe 0 0 0 1", "x,y,z\nx+1/4,y,z+1/2\nx+1/2,y,z"), "x", {})
    assert len(crystal.species) == 3


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ("Fe Fe 0 0 0 1\nNi Ni 0.001 0 0 1", "apart"),
        ("Fe Fe 0 0 0 .5\nNi Ni 0.05 0 0 .5", "apart"),
        ("Fe Fe 0 0 0 1.2", "occupanc"),
        ("Fe Fe 0 0 0 0", "occupanc"),
        ("Fe Fe 0 0 0 .6\nNi Ni 0 0 0 .5", "apart"),
        ("Fe Fe 0 0 0 .4\nNi Ni 0 0 0 .4\nCo Co 0 0 0 .4", "sum to 1.2"),
        ("Wat Wat 0 0 0 1", "unknown element 'Wat'"),
        ("Fe Fe ? 0 0 1", "not a number"),
    ],
)
def test_cif_rejects(sites: str, reason: str) -> None:
    with pytest.raises(Reject, match=reason) as caught:
        crystal_from_cif(cif(sites), "x", {})
    assert caught.value.stage == "structure"


def test_cif_with_a_space_group_that_nobody_knows_is_rejected() -> None:
    text = cif("Fe Fe 0 0 0 1").replace(
        "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z", "_symmetry_space_group_name_H-M 'Q 7 8 9'"
    )
    with pytest.raises(Reject, match="unknown space group"):
        crystal_from_cif(text, "x", {})


@pytest.mark.parametrize("direct", [True, False])
def test_poscar_comes_back(direct: bool) -> None:
    text = Poscar(QUARTZ).get_str(direct=direct)
    assert_same_crystal(
        crystal_from_poscar(text, "x", {}), crystal_from_pymatgen(QUARTZ, "x", {}), 4
    )


def test_poscar_with_selective_dynamics() -> None:
    poscar = Poscar(ROCK_SALT, selective_dynamics=[[True, False, True]] * len(ROCK_SALT))
    crystal = crystal_from_poscar(poscar.get_str(), "x", {})
    assert_same_crystal(crystal, crystal_from_pymatgen(ROCK_SALT, "x", {}))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Si O\n", "", "VASP 4|line 7"),
        ("3 6\n", "3 99999999999999\n", "atoms"),
        ("3 6\n", "3 -6\n", "line 7"),
        ("Si O\n", "Si Zz\n", "unknown|not POSCAR"),
        ("direct\n", "", "POSCAR"),
    ],
)
def test_poscar_rejects(old: str, new: str, reason: str) -> None:
    text = Poscar(QUARTZ).get_str()
    assert old in text
    with pytest.raises(Reject, match=reason):
        crystal_from_poscar(text.replace(old, new), "x", {})


def simple(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "lattice": {"matrix": [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]]},
        "sites": [
            {"species": [{"element": "Na", "occu": 1}], "abc": [0.0, 0.0, 0.0]},
            {"species": [{"element": "Cl", "occu": 1}], "abc": [0.5, 0.5, 0.5]},
        ],
    }
    return document | changes


def site(element: str = "Na", occu: Any = 1, abc: Any = (0, 0, 0)) -> dict[str, Any]:
    return {"species": [{"element": element, "occu": occu}], "abc": abc}


def cell(*rows: list[Any]) -> dict[str, Any]:
    return {"matrix": list(rows)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": []}, "0 atoms"),
        ({"sites": [site()] * 10_001}, "10001"),
        ({"sites": [site("X")]}, "unknown element 'X'"),
        ({"sites": [site("Zz")]}, "unknown element 'Zz'"),
        ({"sites": [site("T")]}, "unknown element 'T'"),
        ({"sites": [site("Xa0+")]}, "unknown element"),
        ({"sites": [site(abc=[float("nan"), 0, 0])]}, "finite"),
        ({"sites": [site(abc=[float("inf"), 0, 0])]}, "finite"),
        ({"sites": [site(abc=[None, 0, 0])]}, "finite"),
        ({"sites": [site(abc=[0, 0])]}, "shape"),
        ({"sites": [site(abc=["a", 0, 0])]}, "sites"),
        ({"sites": [site(occu=0)]}, "occupanc"),
        ({"sites": [site(occu=-1)]}, "occupanc"),
        ({"sites": [site(occu=1.01)]}, "occupanc"),
        ({"sites": [site(occu=None)]}, "occupanc"),
        ({"sites": [site(), site("Cl", abc=(0.1, 0, 0))]}, "0.400 Å apart"),
        ({"sites": [site(), site("Cl", abc=(0.9, 0, 0))]}, "0.400 Å apart"),
        ({"sites": [site(), site("Cl", abc=(0, 0, 5.0))]}, "0.000 Å apart"),
        ({"sites": [{"abc": [0, 0, 0]}]}, "malformed"),
        ({"sites": None}, "malformed"),
        ({"lattice": cell([4, 0, 0], [0, 4, 0], [8, 4, 0])}, "volume"),
        ({"lattice": cell([0.01, 0, 0], [0, 4, 0], [0, 0, 4])}, "volume 0.16|own image|skewed"),
        ({"lattice": cell([0.4, 0, 0], [0, 40, 0], [0, 0, 4])}, "own image"),
        ({"lattice": cell([4, 0, 0], [0, float("nan"), 0], [0, 0, 4])}, "finite"),
        ({"lattice": cell([4, 0, 0], [0, 1e200, 0], [0, 0, 4])}, "1e6"),
        ({"lattice": cell([4, 0, 0], [0, 4, 0])}, "shape"),
        ({"lattice": {"a": 1, "b": 1}}, "malformed"),
        ({"lattice": 7}, "malformed"),
    ],
)
def test_each_rule_has_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert crystal_from_structure_dict(simple(), "x", {}).species == ("Na", "Cl")
    with pytest.raises(Reject, match=reason) as caught:
        crystal_from_structure_dict(simple(**changes), "x", {})
    assert caught.value.stage == "structure"


def test_rounded_occupancies_are_clipped() -> None:
    crystal = crystal_from_structure_dict(simple(sites=[site(occu=1.0005)]), "x", {})
    assert crystal.occupancy.tolist() == [1.0]


lengths = st.floats(1.0, 9.0)
angles = st.floats(40.0, 140.0)


@settings(max_examples=100, deadline=None)
@given(st.tuples(lengths, lengths, lengths), st.tuples(angles, angles, angles))
def test_lattice_parameters_against_their_definition(
    abc: tuple[float, float, float], degrees: tuple[float, float, float]
) -> None:
    try:
        lattice = lattice_from_parameters(np.array([*abc, *degrees]))
    except Reject:
        cosines = np.cos(np.radians(degrees))
        assert 1 - (cosines**2).sum() + 2 * cosines.prod() <= 1e-9
        return
    assert np.linalg.norm(lattice, axis=1) == pytest.approx(abc)
    for k, degree in enumerate(degrees):
        u, v = lattice[(k + 1) % 3], lattice[(k + 2) % 3]
        cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        assert cosine == pytest.approx(np.cos(np.radians(degree)), abs=1e-9)
    assert cell_volume(lattice) == pytest.approx(abs(np.linalg.det(lattice)), rel=1e-9)


def brute_force(lattice: np.ndarray, positions: np.ndarray, cutoff: float) -> dict[Any, float]:
    """Least distance of each close pair, from far more images than any such cell needs."""
    images = np.array(list(itertools.product(range(-9, 10), repeat=3)), dtype=float)
    found: dict[Any, float] = {}
    for i in range(len(positions)):
        for j in range(i, len(positions)):
            distances = np.linalg.norm((positions[i] - positions[j] + images) @ lattice, axis=1)
            if i == j:
                distances[np.all(images == 0, axis=1)] = np.inf
            if distances.min() < cutoff:
                found[(i, j) if i != j else (0, 0)] = distances.min()
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.3, 2.5), st.floats(0.0, 3.0))
def test_close_pairs_against_brute_force(seed: int, count: int, cutoff: float, skew: float) -> None:
    random = np.random.default_rng(seed)
    lattice = np.diag(random.uniform(1.5, 5.0, 3))
    lattice[np.tril_indices(3, -1)] = skew * random.uniform(-2.0, 2.0, 3)
    positions = random.uniform(-1.5, 1.5, (count, 3))
    found: dict[Any, float] = {}
    for i, j, d in zip(*close_pairs(lattice, positions, cutoff), strict=True):
        key = (int(i), int(j))
        found[key] = min(d, found.get(key, np.inf))
    assert found == pytest.approx(brute_force(lattice, positions, cutoff))


def test_a_crowd_of_sites_is_rejected_before_its_pairs_fill_the_memory() -> None:
    count = 800
    crowd = (np.full((count, 3), 0.3), ["Cu"] * count, np.full(count, 1e-3), np.arange(count), {})
    with pytest.raises(Reject, match="more than 262144 pairs"):
        crystal_from_arrays("x", np.eye(3) * 5.0, *crowd)


def test_a_large_and_skewed_cell_is_rejected_not_searched_for_minutes() -> None:
    grid = np.array(list(itertools.product(range(20), repeat=3))) / 20
    arrays = (["Cu"] * len(grid), np.ones(len(grid)), np.arange(len(grid)), {})
    lattice = np.eye(3) * 50.0
    for skew in (3, 19_000):  # one crystal, its c longer by `skew` a
        sheared = lattice + skew * np.outer([0, 0, 1], lattice[0])
        positions = grid - skew * np.outer(grid[:, 2], [1, 0, 0])
        if skew < 10:
            assert crystal_from_arrays("x", sheared, positions % 1.0, *arrays).volume > 1e5
        else:
            with pytest.raises(Reject, match="skewed"):
                crystal_from_arrays("x", sheared, positions % 1.0, *arrays)


def test_many_species_on_one_place_become_one_site() -> None:
    names = sorted(ELEMENTS)[:80]
    # Site 0 is alone; places of the others differ by less than 0.01 Å, also across the boundary.
    positions = np.array([[0.5, 0.5, 0.5], *([1e-4 * (n % 2) - 1e-4, 0, 0] for n in range(79))])
    occupancy = np.array([1.0, *[1.0 / 79] * 79])
    crystal = crystal_from_arrays(
        "x", np.eye(3) * 5.0, positions, names, occupancy, np.arange(80), {}
    )
    assert crystal.site.tolist() == [0] + [1] * 79
    assert set(crystal.species[1:]) == set(names[1:])
    assert (crystal.positions[1:] == positions[1]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-8.0, -0.5))
def test_motion_against_linear_algebra(seed: int, strain_exponent: float) -> None:
    random = np.random.default_rng(seed)
    lattice = np.diag(random.uniform(2.0, 6.0, 3)) + random.uniform(-0.5, 0.5, (3, 3))
    rows = np.tril(random.integers(-2, 3, (3, 3)), -1) + np.diag([1.0, 2.0, 1.0])
    positions, shift = random.uniform(-1.5, 1.5, (7, 3)), random.uniform(size=3)
    cut = rows @ lattice
    strain = np.eye(3) + random.normal(size=(3, 3)) * 10.0**strain_exponent
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    ideal = cut @ strain @ turn
    noise = random.uniform(-0.05, 0.05, (7, 3))
    images = (positions - shift) @ np.linalg.inv(rows) + noise + random.integers(-3, 4, (7, 3))
    found = motion(lattice, positions, rows, shift, ideal, images)
    stretch = np.abs(np.linalg.svd(np.linalg.inv(cut) @ ideal, compute_uv=False) - 1.0).max()
    longest = np.linalg.norm(cut, axis=1).max()
    assert found[0] == pytest.approx(stretch * longest, rel=1e-6, abs=1e-12)
    assert found[1] == pytest.approx(np.linalg.norm(noise @ ideal, axis=1).max(), rel=1e-9)


@pytest.mark.parametrize("argument", range(6))
def test_motion_of_what_is_no_number_is_infinite(argument: int) -> None:
    arrays = [np.eye(3), np.zeros((2, 3)), np.eye(3), np.zeros(3), np.eye(3), np.zeros((2, 3))]
    assert motion(*arrays) == (0.0, 0.0)
    arrays[argument].flat[0] = np.nan
    assert max(motion(*arrays)) == np.inf
    assert max(motion(*arrays[:2], np.zeros((3, 3)), *arrays[3:])) == np.inf


def test_a_large_cell_is_searched() -> None:
    side = 14
    grid = np.array(list(itertools.product(range(side), repeat=3))) / side
    arrays = (["Cu"] * len(grid), np.ones(len(grid)), np.arange(len(grid)), {})
    lattice = np.eye(3) * side * 2.5
    assert len(crystal_from_arrays("x", lattice, grid, *arrays).species) == 2744
    grid[2743] = grid[17] + 0.005
    with pytest.raises(Reject, match="sites 17 and 2743"):
        crystal_from_arrays("x", lattice, grid, *arrays)


@pytest.mark.parametrize("values", [[[1, 2], [3]], {"a": 1}, "abc", [10**400], [[[]]], object()])
def test_numbers_only_takes_numbers(values: Any) -> None:
    with pytest.raises(Reject):
        numbers(values, (3, 3), "lattice")
