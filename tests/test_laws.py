"""Laws of diffraction that hold for every crystal: no reference program is needed."""

from dataclasses import replace

import moyopy
import numpy as np
import pytest
from crystals import (
    bcc,
    crystal_of,
    crystals,
    diamond,
    fcc,
    full_cloud,
    hcp,
    perovskite,
    quartz,
    random_crystal,
    rock_salt,
    rutile,
    supercell,
    zinc_blende,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from featurization.cells import standardize
from featurization.cloud import Cloud, diffraction_cloud, structure_factors
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, FloatArray, Reject

RADIATIONS = ["xray", "xray_pymatgen", "neutron", "electron"]
few = settings(max_examples=25, deadline=None, derandomize=True)
radiations = st.sampled_from(RADIATIONS)
HKL = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


def close(f: np.ndarray, expected: np.ndarray, bound: FloatArray) -> bool:
    """Equal to rounding, relative to Σ_j o_j |f_j|."""
    return bool((np.abs(f - expected) <= 1e-11 * bound + 1e-300).all())


def config(selection: str = "sphere:0.8", **settings: object) -> FeaturizationConfig:
    return FeaturizationConfig(selection=selection, cell="as_given", **settings)


def same_cloud(one: Cloud, other: Cloud, rotation: FloatArray | None = None) -> bool:
    """Whether `other` is `one` (turned), as sets of points with intensities, to float32."""
    q, intensity = full_cloud(one)
    q_other, intensity_other = full_cloud(other)
    if len(q) != len(q_other):
        return False
    distance, partner = cKDTree(q_other).query(q if rotation is None else q @ rotation.T)
    scale = intensity.max()
    return bool(
        distance.max() < 2e-6
        and len(set(partner.tolist())) == len(q)
        and np.allclose(intensity_other[partner], intensity, rtol=1e-4, atol=1e-6 * scale)
    )


# --- the sum over atoms -----------------------------------------------------------------------


@few
@given(crystals(), radiations)
def test_friedel(crystal: Crystal, radiation: str) -> None:
    f, bound = structure_factors(crystal, HKL, radiation)
    minus, _ = structure_factors(crystal, -HKL, radiation)
    assert close(minus, f.conj(), bound)


@few
@given(crystals(), radiations, st.tuples(*[st.floats(-1, 1)] * 3))
def test_origin_changes_only_phases(
    crystal: Crystal, radiation: str, shift: tuple[float, float, float]
) -> None:
    f, bound = structure_factors(crystal, HKL, radiation)
    moved = replace(crystal, positions=crystal.positions + np.array(shift))
    shifted, _ = structure_factors(moved, HKL, radiation)
    assert close(shifted, f * np.exp(2j * np.pi * (HKL @ np.array(shift))), bound)
    assert close(np.abs(shifted), np.abs(f), bound)


@few
@given(crystals(), radiations, st.randoms(use_true_random=False))
def test_order_of_atoms_is_nothing(crystal: Crystal, radiation: str, random: object) -> None:
    order = list(range(len(crystal.species)))
    random.shuffle(order)
    shuffled = replace(
        crystal,
        positions=crystal.positions[order],
        species=tuple(crystal.species[row] for row in order),
        occupancy=crystal.occupancy[order],
        site=crystal.site[order],
    )
    f, bound = structure_factors(crystal, HKL, radiation)
    assert close(structure_factors(shuffled, HKL, radiation)[0], f, bound)


@few
@given(crystals(), radiations)
def test_bound_holds_and_is_reached_forwards_by_electrons(crystal: Crystal, radiation: str) -> None:
    f, bound = structure_factors(crystal, HKL, radiation)
    assert (np.abs(f) <= bound * (1 + 1e-12)).all()
    if radiation != "neutron":  # lengths of both signs cancel
        forward = ~HKL.any(axis=1)
        assert close(f[forward], bound[forward].astype(complex), bound[forward])


@few
@given(crystals(), st.integers(0, 2**32 - 1))
def test_rotation_turns_points_and_keeps_intensities(crystal: Crystal, seed: int) -> None:
    rotation = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    turned = replace(crystal, lattice=crystal.lattice @ rotation.T)
    one, other = (diffraction_cloud(c, config("miller:2")) for c in (crystal, turned))
    np.testing.assert_array_equal(one.hkl, other.hkl)
    np.testing.assert_allclose(other.q, one.q @ rotation.T, atol=1e-6)
    np.testing.assert_allclose(
        other.intensity, one.intensity, rtol=1e-4, atol=1e-6 * one.intensity.max()
    )


@few
@given(crystals(), st.floats(0.1, 8.0))
def test_debye_waller_damps_intensity(crystal: Crystal, b_iso: float) -> None:
    at_rest = diffraction_cloud(crystal, config("miller:3", absences="keep"))
    moving = diffraction_cloud(crystal, config("miller:3", absences="keep", b_iso=b_iso))
    q2 = (at_rest.q.astype(float) ** 2).sum(axis=1)
    expected = at_rest.intensity * np.exp(-b_iso * q2 / 2)
    np.testing.assert_allclose(moving.intensity, expected, rtol=2e-5, atol=1e-30)


@few
@given(crystals())
def test_forward_intensity_is_the_electron_density(crystal: Crystal) -> None:
    numbers = {"H": 1, "D": 1, "Li": 3, "C": 6, "O": 8, "Ti": 22, "Mn": 25, "Ga": 31, "In": 49}
    numbers["U"] = 92
    electrons = sum(numbers[name] * amount for name, amount in crystal.composition.items())
    for radiation, tolerance in (("xray", 2e-3), ("xray_pymatgen", 1e-6)):
        cloud = diffraction_cloud(crystal, config("miller:1", radiation=radiation))
        origin = cloud.multiplicity == 1
        assert origin.sum() == 1
        density = np.sqrt(float(cloud.intensity[origin][0]))
        assert density == pytest.approx(electrons / crystal.volume, rel=tolerance)


# --- which points -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_miller_cloud_is_half_of_the_cube(limit: int) -> None:
    cloud = diffraction_cloud(rutile(), config(f"miller:{limit}"))
    assert int(cloud.multiplicity.sum()) == (2 * limit + 1) ** 3  # 343 for limit 3
    half = {tuple(h) for h in cloud.hkl.tolist()}
    both = half | {tuple(h) for h in (-cloud.hkl).tolist()}
    side = range(-limit, limit + 1)
    assert both == {(h, k, l) for h in side for k in side for l in side}  # noqa: E741
    assert len(half) == len(cloud.hkl) == ((2 * limit + 1) ** 3 + 1) // 2


@few
@given(crystals(), st.floats(0.3, 0.9))
def test_sphere_is_complete(crystal: Crystal, q_max: float) -> None:
    cloud = diffraction_cloud(crystal, config(f"sphere:{q_max:.6f}", absences="keep"))
    reach = np.ceil(q_max * np.linalg.norm(crystal.lattice, axis=1)).astype(int) + 1
    box = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach]), axis=-1).reshape(-1, 3)
    length = np.linalg.norm(box @ np.linalg.inv(crystal.lattice).T, axis=1)
    limit = float(f"{q_max:.6f}")
    assume(np.abs(length - limit).min() > 1e-7)
    expected = {tuple(h) for h in box[length < limit].tolist()}
    half = {tuple(h) for h in cloud.hkl.tolist()}
    assert half | {tuple(-np.array(h)) for h in half} == expected
    assert int(cloud.multiplicity.sum()) == len(expected)


def test_the_radius_keeps_its_digits() -> None:
    for text, radius in (("sphere:1.2345678901", 1.2345678901), ("sphere:2", 2.0)):
        assert config(text).q_max == radius
        assert config(text).selection == text


def test_points_on_the_sphere_are_inside_in_every_cell() -> None:
    # |q| = k/a: points whose rounding depends on how the cell is written and turned.
    crystal = perovskite()
    for seed in range(6):
        turn = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
        for matrix in ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[2, 1, 0], [1, 1, 0], [0, 3, 1]]):
            other = supercell(crystal, matrix)
            other = replace(other, lattice=other.lattice @ turn.T)
            # Points of a simple cubic lattice within 1 and within 3 of the origin.
            for radius, count in ((1, 7), (3, 123)):
                sphere = config(f"sphere:{radius / 3.905!r}")
                cloud = diffraction_cloud(other, sphere)
                assert int(cloud.multiplicity.sum()) == count


def test_too_many_points_are_rejected() -> None:
    with pytest.raises(Reject, match="max_points"):
        diffraction_cloud(rutile(), config("sphere:3", max_points=200))
    with pytest.raises(ValueError, match="365 points of every crystal, more than max_points = 200"):
        config("miller:4", max_points=200)


# --- the same crystal in another cell -----------------------------------------------------------

UNIMODULAR = [[1, 1, 0], [0, 1, 1], [1, 1, 1]]
CELLS = [
    [[2, 0, 0], [0, 1, 0], [0, 0, 3]],
    UNIMODULAR,
    [[1, 1, 0], [-1, 1, 0], [1, 0, 2]],
]
KNOWN = {
    "bcc": bcc(),
    "fcc": fcc(),
    "hcp": hcp(),
    "diamond": diamond(),
    "zinc_blende": zinc_blende(),
    "rock_salt": rock_salt(),
    "rutile": rutile(),
    "quartz": quartz(),
    "perovskite": perovskite(),
    **{f"triclinic{seed}": random_crystal(seed) for seed in range(4)},
}


@pytest.mark.parametrize("matrix", CELLS, ids=["supercell", "unimodular", "skew_supercell"])
@pytest.mark.parametrize("name", list(KNOWN))
def test_sphere_does_not_depend_on_the_cell(name: str, matrix: list[list[int]]) -> None:
    crystal, other = KNOWN[name], supercell(KNOWN[name], matrix)
    assert other.volume > 0.99 * crystal.volume
    setting = config("sphere:1.05")
    assert same_cloud(diffraction_cloud(crystal, setting), diffraction_cloud(other, setting))


@pytest.mark.parametrize("radiation", ["neutron", "electron"])
def test_sphere_does_not_depend_on_the_cell_for_other_radiations(radiation: str) -> None:
    setting = config("sphere:0.95", radiation=radiation, b_iso=0.5)
    for crystal in (quartz(), random_crystal(5)):
        clouds = [diffraction_cloud(c, setting) for c in (crystal, supercell(crystal, CELLS[2]))]
        assert same_cloud(*clouds)


def rotation_to_standard(crystal: Crystal, symprec: float) -> FloatArray:
    """The turn that standardization makes; the test only proposes it, the points confirm it."""
    first = np.unique(crystal.site, return_index=True)[1]
    names = sorted(set(crystal.species))
    cell = moyopy.Cell(
        crystal.lattice.tolist(),
        crystal.positions[first].tolist(),
        [names.index(crystal.species[row]) for row in first],
    )
    return np.array(moyopy.MoyoDataset(cell, symprec=symprec).std_rotation_matrix)


@pytest.mark.parametrize("name", list(KNOWN))
def test_every_choice_of_cell_gives_one_sphere(name: str) -> None:
    symprec, setting = 1e-3, config("sphere:1.05")
    crystal = KNOWN[name]
    given_cloud = diffraction_cloud(crystal, setting)
    rotation = rotation_to_standard(crystal, symprec)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    for cell in ("primitive", "conventional", "niggli"):
        standard, _ = standardize(crystal, cell, symprec)
        assert same_cloud(given_cloud, diffraction_cloud(standard, setting), rotation), cell
    # And from a supercell in a turned frame: the same |q| with the same intensities.
    turn = Rotation.from_rotvec([0.3, -0.7, 0.4]).as_matrix()
    big = supercell(crystal, CELLS[2])
    big = replace(big, lattice=big.lattice @ turn.T)
    for cell in ("primitive", "niggli"):
        cloud = diffraction_cloud(standardize(big, cell, symprec)[0], setting)
        assert same_invariants(given_cloud, cloud), cell


def same_invariants(one: Cloud, other: Cloud) -> bool:
    """Equal |q|, I, and I-weighted second moments and lengths of sums of pairs of points."""
    described = []
    for q, intensity in (full_cloud(one), full_cloud(other)):
        length = np.linalg.norm(q, axis=1)
        strong = intensity > 1e-3 * intensity.max()
        weight = intensity[strong] / intensity.max()
        pairs = np.linalg.norm(q[strong][:, None] + q[strong][None, :], axis=2)
        weights = np.multiply.outer(weight, weight)
        histogram = [(weights * np.exp(-(((pairs - r) / 0.05) ** 2))).sum() for r in HISTOGRAM]
        moments = np.linalg.eigvalsh((q * intensity[:, None]).T @ q)
        shells = [(intensity * np.exp(-(((length - r) / 0.01) ** 2))).sum() for r in HISTOGRAM]
        described.append((len(q), np.sort(length), histogram, moments, shells))
    (n, lengths, *rest), (n_other, lengths_other, *rest_other) = described
    return n == n_other and bool(
        np.allclose(lengths, lengths_other, atol=2e-6)
        and all(
            np.allclose(a, b, rtol=1e-3, atol=1e-5 * np.max(a))
            for a, b in zip(rest, rest_other, strict=True)
        )
    )


HISTOGRAM = np.linspace(0.1, 2.0, 39)


def test_the_comparison_of_clouds_sees_a_displaced_atom_and_a_missing_point() -> None:
    setting = config("sphere:1.05")
    crystal = random_crystal(0)
    big = supercell(crystal, CELLS[0])
    cloud = diffraction_cloud(crystal, setting)
    assert same_invariants(cloud, diffraction_cloud(big, setting))
    positions = big.positions.copy()
    positions[-1, 0] += 0.01
    assert not same_cloud(cloud, diffraction_cloud(replace(big, positions=positions), setting))
    changed = crystal.positions.copy()
    changed[-1, 0] += 0.01
    other = diffraction_cloud(replace(crystal, positions=changed), setting)
    assert not same_cloud(cloud, other)
    assert not same_invariants(cloud, other)
    shorter = Cloud(cloud.hkl[1:], cloud.q[1:], cloud.intensity[1:], cloud.multiplicity[1:])
    assert not same_cloud(cloud, shorter)
    mirrored = replace(cloud, q=cloud.q * np.array([-1, 1, 1], dtype=np.float32))
    assert not same_cloud(cloud, mirrored)
    # A box of Miller indices is no property of the crystal.
    box = config("miller:2", absences="drop")
    assert not same_cloud(diffraction_cloud(crystal, box), diffraction_cloud(big, box))


# --- systematic absences ------------------------------------------------------------------------


def present(crystal: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """All hkl of a sphere and whether each survives `absences = drop`."""
    every = diffraction_cloud(crystal, config("sphere:1.2", absences="keep"))
    kept = diffraction_cloud(crystal, config("sphere:1.2", absences="drop"))
    assert (kept.intensity > 0).all()
    survivors = {tuple(h) for h in kept.hkl.tolist()}
    survives = np.array([tuple(h) in survivors for h in every.hkl.tolist()])
    # An absence that is kept is exactly zero.
    np.testing.assert_array_equal(every.intensity > 0, survives)
    return every.hkl.astype(int), survives


def test_absences_of_bcc() -> None:
    hkl, survives = present(bcc())
    np.testing.assert_array_equal(survives, hkl.sum(axis=1) % 2 == 0)


def unmixed(hkl: np.ndarray) -> np.ndarray:
    return np.asarray((hkl % 2 == hkl[:, :1] % 2).all(axis=1))


def test_absences_of_fcc_and_rock_salt() -> None:
    for crystal in (fcc(), rock_salt(), zinc_blende()):
        hkl, survives = present(crystal)
        np.testing.assert_array_equal(survives, unmixed(hkl))


def test_absences_of_diamond() -> None:
    hkl, survives = present(diamond())
    np.testing.assert_array_equal(survives, unmixed(hkl) & (hkl.sum(axis=1) % 4 != 2))


def test_absences_of_hcp() -> None:
    hkl, survives = present(hcp())
    h, k, l = hkl.T  # noqa: E741
    np.testing.assert_array_equal(survives, ~((l % 2 == 1) & ((h + 2 * k) % 3 == 0)))


def test_absences_of_rutile() -> None:
    hkl, survives = present(rutile())
    h, k, l = hkl.T  # noqa: E741
    glide = ((h == 0) & ((k + l) % 2 == 1)) | ((k == 0) & ((h + l) % 2 == 1))
    assert glide.any()
    np.testing.assert_array_equal(survives, ~glide)


def test_auto_absences_are_kept_in_miller_and_dropped_in_sphere() -> None:
    assert (diffraction_cloud(bcc(), config("miller:2")).intensity == 0).sum() == 31
    assert (diffraction_cloud(bcc(), config("sphere:1.2")).intensity > 0).all()


def test_absence_is_relative_to_what_the_atoms_could_scatter() -> None:
    # 1 % more of one end of a bcc pair: h + k + l odd has |U| = 0.005, |U|² = 2.5e-5.
    sites = [({"Fe": 0.99}, (0, 0, 0)), ("Fe", (0.5, 0.5, 0.5))]
    crystal = crystal_of(np.eye(3) * 2.866, sites)
    weak = {
        tolerance: config("miller:2", absence_tolerance=tolerance) for tolerance in (1e-6, 1e-4)
    }
    zeros = {t: (diffraction_cloud(crystal, c).intensity == 0).sum() for t, c in weak.items()}
    assert zeros == {1e-6: 0, 1e-4: 31}
