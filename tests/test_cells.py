"""Symmetry labels against spglib and the textbook; every cell holds the same crystal."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import gemmi
import moyopy
import numpy as np
import pytest
import spglib
from crystals import (
    SHARED,
    bcc,
    crystal_of,
    diamond,
    fcc,
    hcp,
    perovskite,
    quartz,
    random_crystal,
    read_cif,
    real_crystals,
    rock_salt,
    rutile,
    supercell,
    zinc_blende,
)
from scipy.spatial.transform import Rotation

from featurization import cells
from featurization.cells import standardize, symmetry_of
from featurization.crystal import CRYSTAL_SYSTEMS, Crystal, FloatArray, Reject

CELL_NAMES = ("primitive", "conventional", "niggli", "as_given")


# --- an independent view of a crystal: its list of interatomic distances ----------------------


def distances(crystal: Crystal, reach: float) -> dict[tuple[str, str], FloatArray]:
    """Sorted distances ≤ `reach` (Å) between every ordered pair of kinds of site, by brute force.

    A kind is the content of a site: species with occupancies.
    """
    first = np.unique(crystal.site, return_index=True)[1]
    kinds = []
    for row in first:
        rows = np.flatnonzero(crystal.site == crystal.site[row])
        np.testing.assert_array_equal(
            crystal.positions[rows], crystal.positions[rows[:1]].repeat(len(rows), 0)
        )
        kinds.append(
            " ".join(sorted(f"{crystal.species[r]}{crystal.occupancy[r]:.5f}" for r in rows))
        )
    positions = crystal.positions[first] % 1.0
    # Fractions in [0, 1) differ by less than 1: one image more than the planes' spacing asks.
    images = np.ceil(reach * np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)).astype(int) + 1
    grid = [np.arange(-n, n + 1) for n in images]
    shifts = np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 3)
    found: dict[tuple[str, str], list[FloatArray]] = {}
    for i, kind in enumerate(kinds):
        for j, other in enumerate(kinds):
            length = np.linalg.norm(
                (positions[j] - positions[i] + shifts) @ crystal.lattice, axis=1
            )
            found.setdefault((kind, other), []).append(length[(length > 1e-9) & (length <= reach)])
    return {pair: np.sort(np.concatenate(lists)) for pair, lists in found.items()}


def sites(crystal: Crystal) -> int:
    return len(set(crystal.site.tolist()))


def same_crystal(one: Crystal, other: Crystal, tolerance: float, reach: float = 4.5) -> bool:
    """Whether composition, volume an atom and all sorted distances agree.

    If every atom moves by at most t, sorted distances change by at most 2t, element by element,
    so that lists are compared whole; `other` is searched further out to complete the tail.
    """
    n, m = sites(one), sites(other)
    if abs(other.volume / m / (one.volume / n) - 1) > tolerance:
        return False
    if set(one.composition) != set(other.composition) or any(
        abs(amount / n - other.composition[name] / m) > 1e-6
        for name, amount in one.composition.items()
    ):
        return False
    first, second = distances(one, reach), distances(other, reach + 0.7)
    if set(first) != set(second):
        return False
    for pair, short in first.items():
        expected = np.repeat(short, m)  # m × the list of n sites against n × the list of m
        found = np.repeat(second[pair], n)[: len(expected)]
        if len(found) < len(expected) or (np.abs(found - expected) > tolerance).any():
            return False
    return True


KNOWN = {
    "bcc": (bcc(), 229, 1, 2),
    "fcc": (fcc(), 225, 1, 4),
    "hcp": (hcp(), 194, 2, 2),
    "diamond": (diamond(), 227, 2, 8),
    "zinc_blende": (zinc_blende(), 216, 2, 8),
    "rock_salt": (rock_salt(), 225, 2, 8),
    "perovskite": (perovskite(), 221, 5, 5),
    "rutile": (rutile(), 136, 6, 6),
    "quartz": (quartz(), 154, 9, 9),
    "triclinic": (random_crystal(11), 1, 5, 5),
}
SKEW = [[1, 1, 0], [-1, 1, 0], [1, 0, 2]]


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_structures(name: str) -> None:
    crystal, number, primitive, conventional = KNOWN[name]
    big = supercell(crystal, SKEW)
    for cell, count in zip(
        CELL_NAMES, (primitive, conventional, primitive, sites(big)), strict=True
    ):
        standard, symmetry = standardize(big, cell, 1e-3)
        assert symmetry.number == number
        assert sites(standard) == count
        assert same_crystal(crystal, standard, 1e-4)
        assert standard.reduced_formula == crystal.reduced_formula
        assert ((standard.positions >= 0) & (standard.positions < 1)).all() or cell == "as_given"
    assert standardize(big, "as_given", 1e-3)[0] is big


def test_niggli_cell_is_reduced() -> None:
    for seed in range(8):
        crystal = supercell(random_crystal(seed), [[1, 2, 0], [0, 1, 3], [0, 0, 1]])
        lattice = standardize(crystal, "niggli", 1e-3)[0].lattice
        gram = lattice @ lattice.T
        a, b, c = np.diag(gram)
        assert a <= b * (1 + 1e-9) <= c * (1 + 1e-9) ** 2
        # Main conditions of Křivý and Gruber: 2|b·c| ≤ b², 2|a·c| ≤ a², 2|a·b| ≤ a².
        for product, limit in ((gram[1, 2], b), (gram[0, 2], a), (gram[0, 1], a)):
            assert 2 * abs(product) <= limit * (1 + 1e-9)
        signs = np.sign([gram[1, 2], gram[0, 2], gram[0, 1]])
        assert (signs > 0).all() or (signs <= 0).all()
        volume = abs(np.linalg.det(lattice))
        assert volume == pytest.approx(abs(np.linalg.det(random_crystal(seed).lattice)), rel=1e-6)


def test_mixed_sites_survive() -> None:
    big = supercell(random_crystal(2), SKEW)
    for cell in CELL_NAMES:
        standard, _ = standardize(big, cell, 1e-3)
        for row, name in enumerate(standard.species):
            here = {
                standard.species[r]: standard.occupancy[r]
                for r in np.flatnonzero(standard.site == standard.site[row])
            }
            if name in ("Mg", "D"):
                partner = {"Mg": {"Mg": 0.55, "Fe": 0.3}, "D": {"D": 0.7, "H": 0.1}}[name]
                assert here == pytest.approx(partner)
            elif len(here) == 1:
                assert here[name] == 1.0


def test_a_mixture_is_not_the_element_that_dominates_it() -> None:
    # Cu on one corner, a mixture on the other three: L1₂ order, not fcc.
    order = [({"Cu": 0.5, "Au": 0.5}, x) for x in [(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]]
    crystal = crystal_of(np.eye(3) * 3.8, [("Cu", (0, 0, 0)), *order])
    assert standardize(crystal, "primitive", 0.01)[1].number == 221
    alike = crystal_of(np.eye(3) * 3.8, [({"Cu": 0.5, "Au": 0.5}, (0, 0, 0)), *order])
    standard, symmetry = standardize(alike, "primitive", 0.01)
    assert symmetry.number == 225
    assert standard.composition == pytest.approx({"Cu": 0.5, "Au": 0.5})
    vacant = crystal_of(np.eye(3) * 3.8, [({"Cu": 0.5, "Au": 0.49}, (0, 0, 0)), *order])
    assert standardize(vacant, "primitive", 0.01)[1].number == 221


@pytest.mark.parametrize("name", ["quartz", "zinc_blende", "rutile", "triclinic"])
def test_left_handed_lattice(name: str) -> None:
    crystal, number, _, _ = KNOWN[name]
    # Exchanged axes describe the same crystal in a left-handed basis.
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    left = replace(crystal, lattice=swap @ crystal.lattice, positions=crystal.positions @ swap)
    assert np.linalg.det(left.lattice) < 0
    for cell in CELL_NAMES:
        standard, symmetry = standardize(left, cell, 1e-3)
        assert symmetry.number == number
        assert same_crystal(crystal, standard, 1e-4)
        if cell != "as_given":
            assert np.linalg.det(standard.lattice) > 0


def test_noise_below_the_tolerance_is_idealized_away() -> None:
    rng = np.random.default_rng(0)
    crystal = supercell(rutile(), [[1, 0, 0], [0, 2, 0], [0, 0, 2]])
    turn = Rotation.from_rotvec([0.2, 0.5, -0.4]).as_matrix()
    noise = rng.uniform(-0.008, 0.008, crystal.positions.shape) @ np.linalg.inv(crystal.lattice)
    noisy = replace(crystal, lattice=crystal.lattice @ turn.T, positions=crystal.positions + noise)
    standard, symmetry = standardize(noisy, "primitive", 0.1)
    assert (symmetry.number, sites(standard)) == (136, 6)
    assert same_crystal(noisy, standard, 0.04)
    assert standardize(noisy, "primitive", 1e-4)[1].number == 1


# --- real crystals ------------------------------------------------------------------------------


def spglib_number(crystal: Crystal, symprec: float) -> int:
    kinds = sorted(set(crystal.species))
    numbers = [kinds.index(name) + 1 for name in crystal.species]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = spglib.get_symmetry_dataset(
            (crystal.lattice, crystal.positions, numbers), symprec=symprec
        )
    return int(dataset.number)


def test_space_groups_agree_with_spglib() -> None:
    chosen = real_crystals(48)
    assert len(chosen) >= 300
    found = [standardize(crystal, "as_given", 0.1)[1].number for crystal, _ in chosen]
    theirs = [spglib_number(crystal, 0.1) for crystal, _ in chosen]
    published = [number for _, number in chosen]
    # Structures at the edge of the tolerance are decided by each program's way of searching.
    for expected in (theirs, published):
        differing = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
        assert len(differing) <= 0.01 * len(chosen), differing


def test_every_cell_of_real_crystals_is_the_same_crystal() -> None:
    for crystal, _ in real_crystals(9, max_sites=12):
        for cell in CELL_NAMES[:3]:
            standard, symmetry = standardize(crystal, cell, 0.1)
            assert same_crystal(crystal, standard, 0.1), (crystal.reduced_formula, cell)
            again, same = standardize(standard, cell, 0.1)
            assert same.number == symmetry.number
            assert sites(again) == sites(standard)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Aluminium", 225),
        ("Copper", 225),
        ("Silicon", 227),
        ("Diamond", 227),
        ("KCl", 225),
        ("Sapphire", 167),
        ("Rutile", 136),
    ],
)
def test_space_groups_of_reference_cifs(name: str, number: int) -> None:
    crystal = read_cif(SHARED / "reference" / "vesta" / f"{name}.cif")
    for symprec in (0.1, 0.001):
        assert standardize(crystal, "primitive", symprec)[1].number == number


# --- what is rejected -----------------------------------------------------------------------------


def forged(crystal: Crystal, **changes: object) -> SimpleNamespace:
    """moyo's dataset of a crystal with some of its fields replaced."""
    kinds = sorted(set(crystal.species))
    cell = moyopy.Cell(
        crystal.lattice.tolist(),
        crystal.positions.tolist(),
        [kinds.index(name) + 1 for name in crystal.species],
    )
    dataset = moyopy.MoyoDataset(cell, symprec=0.01)
    names = ["number", "std_cell", "prim_std_cell", "prim_std_linear", "prim_std_origin_shift"]
    fields = {name: getattr(dataset, name) for name in [*names, "mapping_std_prim"]}
    return SimpleNamespace(**{**fields, **changes})


def changed_cell(crystal: Crystal, **changes: object) -> moyopy.Cell:
    cell = forged(crystal).prim_std_cell
    fields = {"basis": cell.basis, "positions": cell.positions, "numbers": cell.numbers, **changes}
    return moyopy.Cell(
        *[np.array(fields[key]).tolist() for key in ("basis", "positions", "numbers")]
    )


def test_an_unforged_dataset_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    crystal = rutile()
    same = forged(crystal, prim_std_cell=changed_cell(crystal))
    monkeypatch.setattr(cells.moyopy, "MoyoDataset", lambda *_, **__: same)
    assert same_crystal(crystal, standardize(crystal, "primitive", 0.01)[0], 1e-4)


@pytest.mark.parametrize("cell", ["primitive", "conventional", "niggli"])
def test_a_standard_cell_that_is_another_crystal_is_rejected(
    monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    crystal = perovskite()
    true = forged(crystal).prim_std_cell
    displaced = np.array(true.positions)
    displaced[0] += [0.02, 0.0, 0.0]  # 0.08 Å; three tolerances are 0.03 Å
    swapped = np.array(true.numbers)
    first, second = (np.flatnonzero(swapped == kind)[0] for kind in (2, 3))  # Sr and Ti
    swapped[[first, second]] = swapped[[second, first]]
    other_amounts = np.array(true.numbers)
    other_amounts[first] = 3
    forgeries = {
        "atoms moved": {"positions": displaced},
        "lattice differs": {"basis": np.array(true.basis) * 1.02},
        "species": {"numbers": swapped},
        "puts other": {"numbers": other_amounts},
    }
    lies = {
        message: forged(crystal, prim_std_cell=changed_cell(crystal, **change))
        for message, change in forgeries.items()
    }
    for message, lie in lies.items():
        monkeypatch.setattr(cells.moyopy, "MoyoDataset", lambda *_, lie=lie, **__: lie)
        with pytest.raises(Reject, match=message) as caught:
            standardize(crystal, cell, 0.01)
        assert caught.value.stage == "cell"
        # Only labelled, nothing is replaced.
        assert standardize(crystal, "as_given", 0.01)[0] is crystal


@pytest.mark.parametrize("cell", ["primitive", "conventional", "niggli"])
def test_a_standard_cell_with_other_amounts_is_rejected(
    monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    # An atom that no atom of the input maps to, in both standardized cells.
    crystal = perovskite()
    true = forged(crystal).prim_std_cell
    extra = {
        "positions": [*true.positions, [0.25, 0.25, 0.25]],
        "numbers": [*true.numbers, true.numbers[0]],
    }
    lying_cell = changed_cell(crystal, **extra)
    lie = forged(crystal, prim_std_cell=lying_cell, std_cell=lying_cell)
    monkeypatch.setattr(cells.moyopy, "MoyoDataset", lambda *_, **__: lie)
    with pytest.raises(Reject, match="changes the amount of"):
        standardize(crystal, cell, 0.01)


def test_a_conventional_cell_of_another_volume_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    crystal = perovskite()
    larger = changed_cell(crystal, basis=np.array(forged(crystal).prim_std_cell.basis) * 1.05)
    lie = forged(crystal, std_cell=larger)
    monkeypatch.setattr(cells.moyopy, "MoyoDataset", lambda *_, **__: lie)
    with pytest.raises(Reject, match="volume per atom"):
        standardize(crystal, "conventional", 0.01)


def test_a_conventional_cell_that_is_no_centering_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crystal = rock_salt()
    true = forged(crystal).std_cell
    moved, doubled = np.array(true.positions), np.array(true.positions)
    moved[1] += [0.002, 0.0, 0.0]
    doubled[1] = doubled[0]
    shear = [[1.0, 0.001, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    forgeries = [
        {"positions": moved},
        {"positions": doubled},
        {"numbers": true.numbers[::-1]},
        {"basis": np.array(true.basis) @ shear},
    ]
    for change in [{}, *forgeries]:
        fields = {"basis": true.basis, "positions": true.positions, "numbers": true.numbers}
        arrays = [np.array(values).tolist() for values in (fields | change).values()]
        lie = forged(crystal, std_cell=moyopy.Cell(*arrays))
        monkeypatch.setattr(cells.moyopy, "MoyoDataset", lambda *_, lie=lie, **__: lie)
        assert sites(standardize(crystal, "primitive", 0.01)[0]) == 2
        if change:
            with pytest.raises(Reject, match="with a centering"):
                standardize(crystal, "conventional", 0.01)
        else:
            assert sites(standardize(crystal, "conventional", 0.01)[0]) == 8


def test_a_sheared_lattice_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    crystal = perovskite()
    sheared = np.array(forged(crystal).prim_std_cell.basis) @ [[1, 0.02, 0], [0, 1, 0], [0, 0, 1]]
    lie = forged(crystal, prim_std_cell=changed_cell(crystal, basis=sheared))
    monkeypatch.setattr(cells.moyopy, "MoyoDataset", lambda *_, **__: lie)
    with pytest.raises(Reject, match="lattice differs"):
        standardize(crystal, "primitive", 0.01)


def test_a_failed_search_is_a_reject() -> None:
    # Two atoms on one place have no symmetry.
    crystal = crystal_of(np.eye(3) * 4.0, [("Fe", (0, 0, 0)), ("Fe", (0, 0, 1e-9))])
    for cell in ("primitive", "as_given"):
        with pytest.raises(Reject, match=r"symmetry search failed at symprec 0\.1"):
            standardize(crystal, cell, 0.1)


def test_the_comparison_sees_another_crystal() -> None:
    crystal = perovskite()
    moved = crystal.positions.copy()
    moved[0] += [0.05, 0, 0]
    assert same_crystal(crystal, crystal, 1e-9)
    assert not same_crystal(crystal, replace(crystal, positions=moved), 0.1)
    exchanged = replace(crystal, species=("Ti", "Sr", "O", "O", "O"))
    assert not same_crystal(crystal, exchanged, 0.1)
    assert not same_crystal(crystal, replace(crystal, lattice=crystal.lattice * 1.1), 0.1)
    assert not same_crystal(crystal, fcc(), 0.1)


# --- labels of the 230 space groups ---------------------------------------------------------------


def test_crystal_systems_have_the_textbook_ranges() -> None:
    ranges = {
        "triclinic": (1, 2),
        "monoclinic": (3, 15),
        "orthorhombic": (16, 74),
        "tetragonal": (75, 142),
        "trigonal": (143, 167),
        "hexagonal": (168, 194),
        "cubic": (195, 230),
    }
    assert tuple(ranges) == CRYSTAL_SYSTEMS
    for system, (first, last) in ranges.items():
        for number in range(first, last + 1):
            assert symmetry_of(number).crystal_system == system
            assert symmetry_of(number).number == number


def test_point_groups_and_bravais_classes_agree_with_gemmi() -> None:
    letters = {"A": "S", "B": "S", "C": "S"}
    families = {"triclinic": "a", "monoclinic": "m", "orthorhombic": "o", "tetragonal": "t"}
    families |= {"trigonal": "h", "hexagonal": "h", "cubic": "c"}
    point_groups, bravais = set(), set()
    for number in range(1, 231):
        symmetry, group = symmetry_of(number), gemmi.find_spacegroup_by_number(number)
        centring = letters.get(group.centring_type(), group.centring_type())
        if symmetry.crystal_system == "monoclinic" and centring == "S":
            centring = "C"
        assert symmetry.bravais == families[symmetry.crystal_system] + centring
        assert unordered(symmetry.point_group) == unordered(group.point_group_hm())
        point_groups.add(symmetry.point_group)
        bravais.add(symmetry.bravais)
    assert (len(point_groups), len(bravais)) == (32, 14)


def unordered(point_group: str) -> str:
    """One name for the two orientations of a point group."""
    twins = {"31m": "3m", "3m1": "3m", "312": "32", "321": "32", "-31m": "-3m", "-3m1": "-3m"}
    twins |= {"-4m2": "-42m", "-62m": "-6m2", "m2m": "mm2", "2mm": "mm2"}
    return twins.get(point_group, point_group)
