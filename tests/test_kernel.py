"""The compiled sum over atoms against the plain formula in NumPy, and what it must survive."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import gemmi
import numba
import numpy as np
import pytest
from crystals import crystal_of, crystals, lattice_of, perovskite, random_crystal, real_crystals
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import process

from featurization import geometry, kernel, selection
from featurization.cloud import Cloud, diffraction_cloud, structure_factors
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, FloatArray, IntArray, Reject
from featurization.selection import sphere_half

RADIATIONS = ("xray", "neutron", "electron")
few = settings(max_examples=25, deadline=None, derandomize=True)

Calculator = Callable[[Crystal, IntArray, str, float], np.ndarray]


def config(selection: str, **settings: object) -> FeaturizationConfig:
    return FeaturizationConfig(selection=selection, cell="as_given", **settings)


def plain_form_factor(name: str, s2: FloatArray, radiation: str) -> FloatArray:
    """gemmi's coefficients, summed here in double precision."""
    element = gemmi.Element(name)
    if radiation == "neutron":
        return np.full(len(s2), element.neutron92.calculate_sf(0.0))
    fit = element.it92 if radiation == "xray" else element.c4322
    constant = fit.c if radiation == "xray" else 0.0
    return constant + np.array(fit.a) @ np.exp(-np.outer(fit.b, s2))


def plain(
    crystal: Crystal, hkl: IntArray, radiation: str, b_iso: float
) -> tuple[np.ndarray, FloatArray]:
    """F and Σ_j o_j |f_j| T_j from the phases of all atoms × points at once."""
    s2 = ((hkl @ np.linalg.inv(crystal.lattice).T) ** 2).sum(axis=1) / 4
    damping = np.exp(-b_iso * s2)
    f = np.array([plain_form_factor(n, s2, radiation) for n in crystal.species]) * damping
    f = f * crystal.occupancy[:, None]
    return (f * np.exp(2j * np.pi * (crystal.positions @ hkl.T))).sum(axis=0), np.abs(f).sum(axis=0)


def ours(crystal: Crystal, hkl: IntArray, radiation: str, b_iso: float) -> np.ndarray:
    return structure_factors(crystal, hkl, radiation, b_iso)[0]


def agrees(
    calculator: Calculator, crystal: Crystal, hkl: IntArray, radiation: str, b_iso: float
) -> bool:
    expected, bound = plain(crystal, hkl, radiation, b_iso)
    error = np.abs(calculator(crystal, hkl, radiation, b_iso) - expected)
    return bool((error <= 1e-12 * bound + 1e-300).all())


def scattered(seed: int, largest: int) -> IntArray:
    """Indices in no order, of all octants, some of them in ascending runs of l."""
    hkl = np.random.default_rng(seed).integers(-largest, largest + 1, (60, 3))
    hkl[10:20] = hkl[10] + np.arange(10)[:, None] * [0, 0, 1]
    hkl[20:24] = hkl[20]
    return hkl


@few
@given(
    crystals(),
    st.sampled_from(RADIATIONS),
    st.sampled_from([0.0, 0.7, 50.0]),
    st.integers(0, 1000),
    st.integers(1, 30),
)
def test_any_crystal_agrees_with_the_plain_formula(
    crystal: Crystal, radiation: str, b_iso: float, seed: int, largest: int
) -> None:
    hkl = scattered(seed, largest)
    assert agrees(ours, crystal, hkl, radiation, b_iso)
    expected = plain(crystal, hkl, radiation, b_iso)[1]
    bound = structure_factors(crystal, hkl, radiation, b_iso)[1]
    np.testing.assert_allclose(bound, expected, rtol=1e-12, atol=1e-300)


def test_large_indices_keep_their_phases() -> None:
    crystal = random_crystal(2)
    hkl = np.array([[32767, -32767, 32767], [20001, 3, -7], [0, 0, 0]])
    expected, bound = plain(crystal, hkl, "neutron", 0.0)
    f, _ = structure_factors(crystal, hkl, "neutron")
    assert (np.abs(f - expected) <= 1e-10 * bound).all()
    with pytest.raises(ValueError, match="32768"):
        structure_factors(crystal, hkl - 1, "neutron")


MISTAKES: dict[str, Callable[[Crystal, IntArray, float], tuple[Crystal, IntArray, float]]] = {
    "sign of one index": lambda c, h, b: (c, np.abs(h), b),
    "two indices swapped": lambda c, h, b: (c, h[:, [1, 0, 2]], b),
    "occupancy": lambda c, h, b: (replace(c, occupancy=np.ones_like(c.occupancy)), h, b),
    "deuterium": lambda c, h, b: (
        replace(c, species=tuple("H" if s == "D" else s for s in c.species)),
        h,
        b,
    ),
    "an atom left out": lambda c, h, b: (
        replace(c, positions=c.positions[1:], species=c.species[1:], occupancy=c.occupancy[1:]),
        h,
        b,
    ),
    "displacement": lambda c, h, b: (c, h, 0.0),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_the_comparison_sees(mistake: str) -> None:
    def broken(crystal: Crystal, hkl: IntArray, radiation: str, b_iso: float) -> np.ndarray:
        crystal, hkl, b_iso = MISTAKES[mistake](crystal, hkl, b_iso)
        return ours(crystal, hkl, radiation, b_iso)

    arguments = random_crystal(4), scattered(0, 5), "neutron", 0.9
    assert agrees(ours, *arguments)
    assert not agrees(broken, *arguments)


# --- the whole cloud --------------------------------------------------------------------------


def plain_cloud(crystal: Crystal, settings: FeaturizationConfig) -> tuple[IntArray, FloatArray]:
    """hkl in their order, and intensities, from a box that holds the sphere."""
    if settings.miller_limit is not None:
        reach = np.full(3, settings.miller_limit)
    else:
        reach = np.floor(settings.q_max * np.linalg.norm(crystal.lattice, axis=1) + 1e-6)
    axes = [np.arange(-n, n + 1) for n in reach.astype(int)]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    h, k, l = hkl.T  # noqa: E741
    hkl = hkl[(l > 0) | ((l == 0) & ((k > 0) | ((k == 0) & (h >= 0))))]
    if settings.q_max is not None:
        length = np.linalg.norm(hkl @ np.linalg.inv(crystal.lattice).T, axis=1)
        hkl = hkl[length <= settings.q_max * (1 + 1e-9)]
    f, bound = plain(crystal, hkl, settings.radiation, settings.b_iso)
    absent = np.abs(f) ** 2 <= settings.absence_tolerance * bound**2
    intensity = np.where(absent, 0.0, np.abs(f) ** 2 / crystal.volume**2)
    keep = ~absent if settings.drops_absences else slice(None)
    return hkl[keep], intensity[keep]


def same(cloud: Cloud, expected: tuple[IntArray, FloatArray], crystal: Crystal) -> bool:
    hkl, intensity = expected
    if cloud.hkl.shape != hkl.shape or not (cloud.hkl == hkl).all():
        return False
    return bool(
        np.allclose(cloud.q, hkl @ np.linalg.inv(crystal.lattice).T, rtol=1e-6, atol=1e-7)
        and np.allclose(cloud.intensity, intensity, rtol=1e-6, atol=1e-12 * intensity.max())
        and (cloud.multiplicity == np.where(hkl.any(axis=1), 2, 1)).all()
        and [a.dtype for a in (cloud.hkl, cloud.q, cloud.intensity, cloud.multiplicity)]
        == [np.int16, np.float32, np.float32, np.uint8]
    )


@pytest.mark.parametrize("selection", ["miller:3", "sphere:0.9"])
@pytest.mark.parametrize("radiation", RADIATIONS)
def test_real_crystals_agree_with_the_plain_cloud(radiation: str, selection: str) -> None:
    settings = config(selection, radiation=radiation, b_iso=0.5)
    known = 0
    for crystal, _ in real_crystals(6, max_sites=20):
        try:
            cloud = diffraction_cloud(crystal, settings)
        except Reject:
            continue  # no scattering length
        assert same(cloud, plain_cloud(crystal, settings), crystal)
        known += 1
    assert known > 30


@few
@given(crystals(), st.floats(0.2, 0.9), st.sampled_from(["keep", "drop"]))
def test_any_sphere_agrees_with_the_plain_cloud(
    crystal: Crystal, q_max: float, absences: str
) -> None:
    settings = config(f"sphere:{q_max!r}", absences=absences)
    expected = plain_cloud(crystal, settings)
    cloud = diffraction_cloud(crystal, settings)
    assert same(cloud, expected, crystal)
    # Teeth: another order, and an intensity that is off by 1e-5.
    if len(cloud.hkl) > 1:
        assert not same(replace(cloud, hkl=cloud.hkl[::-1]), expected, crystal)
        louder = cloud.intensity * np.float32(1.00001)
        assert not same(replace(cloud, intensity=louder), expected, crystal)


def test_one_atom() -> None:
    crystal = crystal_of(lattice_of(3, 4, 5, 80, 95, 100), [({"W": 0.5}, (0.1, 0.2, 0.3))])
    settings = config("sphere:1.2")
    assert same(diffraction_cloud(crystal, settings), plain_cloud(crystal, settings), crystal)


@few
@given(
    crystals(),
    st.tuples(*[st.integers(-3, 3)] * 3),
    st.tuples(*[st.integers(0, 3)] * 3),
)
def test_a_point_on_the_sphere_is_inside(
    crystal: Crystal, shear: tuple[int, int, int], hkl: tuple[int, int, int]
) -> None:
    matrix = np.eye(3)
    matrix[0, 1], matrix[0, 2], matrix[1, 2] = shear
    lattice = np.ascontiguousarray(matrix @ crystal.lattice)
    q_max = float(np.linalg.norm(np.linalg.inv(lattice) @ np.array(hkl))) or 0.3
    longest = float(np.linalg.norm(lattice, axis=1).max())
    found = sphere_half(lattice, crystal.volume, longest, q_max, 10**7)
    shell = np.linalg.norm(found @ np.linalg.inv(lattice).T, axis=1)
    assert tuple(hkl) in {tuple(h) for h in found} | {tuple(-h) for h in found} or not any(hkl)
    # 1e-7 less, and the points of this shell are gone.
    fewer = sphere_half(lattice, crystal.volume, longest, q_max * (1 - 1e-7), 10**7)
    assert len(found) - len(fewer) == (shell > q_max * (1 - 1e-7)).sum()


# --- skewed cells -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [[[1, 0, 0], [2000, 1, 0], [3000, 1500, 1]], [[1, 200, 300], [0, 1, 150], [0, 0, 1]]]
)
def test_a_very_skewed_cell_gives_the_same_points(rows: list[list[int]]) -> None:
    # The box around these points would hold 2e9 and 2e7 indices.
    crystal, matrix = perovskite(), np.array(rows)
    skewed = replace(
        crystal,
        lattice=matrix @ crystal.lattice,
        positions=crystal.positions @ np.linalg.inv(matrix),
    )
    one, other = (diffraction_cloud(c, config("sphere:1.2")) for c in (crystal, skewed))
    # hkl turn as the axes do.
    expected = {tuple(h) for h in one.hkl.astype(int) @ matrix.T}
    expected |= {tuple(-np.array(h)) for h in expected}
    found = {tuple(h) for h in other.hkl.astype(int)}
    assert len(found) == len(one.hkl)
    assert found <= expected
    np.testing.assert_allclose(np.sort(other.intensity), np.sort(one.intensity), rtol=1e-5)


def test_cells_too_skewed_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    long = crystal_of([[5, 0, 0], [0, 5, 0], [4e5, 0, 5]], [("Fe", (0, 0, 0))])
    with pytest.raises(Reject, match=r"edge of 4e\+05 Å; use cell = niggli"):
        diffraction_cloud(long, config("sphere:0.5"))
    # It gives up before it looks for points.
    assert selection._sphere(perovskite().lattice, 0.9, 100, 10)[1] == 0
    assert selection._sphere(perovskite().lattice, 0.9, 100, 1000)[1] > 0
    monkeypatch.setattr(selection, "_MOST_COLUMNS", 10)
    with pytest.raises(Reject, match="10 columns of points; use cell = niggli"):
        diffraction_cloud(perovskite(), config("sphere:0.9"))


def test_a_cell_without_volume_is_rejected() -> None:
    flat = crystal_of([[3, 0, 0], [0, 3, 0], [3, 3, 0]], [("Fe", (0, 0, 0))])
    for lattice in (flat.lattice, flat.lattice * np.nan):
        with pytest.raises(Reject, match="cell volume"):
            diffraction_cloud(replace(flat, lattice=lattice), config("sphere:0.5"))


def test_an_intensity_that_is_not_finite_is_rejected() -> None:
    crystal = random_crystal(0)
    for value in (np.nan, np.inf):
        positions = crystal.positions.copy()
        positions[-1, 1] = value
        with pytest.raises(Reject, match="not finite"):
            diffraction_cloud(replace(crystal, positions=positions), config("sphere:0.5"))


def test_memory_does_not_grow_with_atoms_times_points() -> None:
    # 10,000 atoms × 6,895 points: one array of their phases would take 1.1 GB.
    script = """
import resource, numpy as np
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal
rng = np.random.default_rng(0)
def run(atoms, limit):
    crystal = Crystal("", np.eye(3) * 50, rng.random((atoms, 3)), ("O", "Si") * (atoms // 2),
        np.ones(atoms), np.arange(atoms))
    cloud = diffraction_cloud(crystal, FeaturizationConfig(selection=f"miller:{limit}"))
    return len(cloud.hkl), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(2, 1)[1]
points, after = run(10_000, 11)
print(points, after - before)
"""
    done = process([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    points, kib = map(int, done.stdout.split())
    assert points == (23**3 + 1) // 2
    assert kib < 50_000


# --- several radiations at once ---------------------------------------------------------------

SEVERAL = config("sphere:0.9", also_radiation=("neutron", "electron"), b_iso=0.4)


@few
@given(crystals())
def test_several_radiations_at_once_are_each_alone(crystal: Crystal) -> None:
    together = diffraction_cloud(crystal, SEVERAL.model_copy(update={"absences": "keep"}))
    assert together.also.shape == (2, len(together.hkl))
    columns = [together.intensity, *together.also]
    for radiation, column in zip(RADIATIONS, columns, strict=True):
        alone = diffraction_cloud(
            crystal, config("sphere:0.9", radiation=radiation, b_iso=0.4, absences="keep")
        )
        assert alone.also.shape == (0, len(alone.hkl))
        np.testing.assert_array_equal(alone.hkl, together.hkl)
        np.testing.assert_array_equal(alone.intensity, column)
    assert not np.array_equal(columns[0], columns[1])


def test_a_point_leaves_only_if_it_is_absent_for_all() -> None:
    # D and H are one to X-rays and two to neutrons: h + k + l odd is absent for X-rays alone.
    cell = np.eye(3) * 3.0
    iron = crystal_of(cell, [("Fe", (0, 0, 0)), ("Fe", (0.5, 0.5, 0.5))])
    isotopes = crystal_of(cell, [("D", (0, 0, 0)), ("H", (0.5, 0.5, 0.5))])
    both = config("miller:1", also_radiation=("neutron",), absences="drop")
    cloud = diffraction_cloud(iron, both)
    assert (cloud.hkl.sum(axis=1) % 2 == 0).all()
    assert (cloud.also > 0).all()
    cloud = diffraction_cloud(isotopes, both)
    odd = cloud.hkl.sum(axis=1) % 2 == 1
    assert len(cloud.hkl) == 14
    assert (cloud.intensity[odd] == 0).all()
    assert (cloud.intensity[~odd] > 0).all()
    assert (cloud.also > 0).all()
    assert len(diffraction_cloud(isotopes, config("miller:1", absences="drop")).hkl) < 14


def test_a_species_must_be_known_to_all_radiations() -> None:
    crystal = crystal_of(np.eye(3) * 3.0, [("Po", (0, 0, 0))])
    assert len(diffraction_cloud(crystal, config("miller:1")).hkl) == 14
    with pytest.raises(Reject, match="no neutron scattering length for Po"):
        diffraction_cloud(crystal, config("miller:1", also_radiation=("neutron",)))


# --- compiled functions -----------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-700.0, 0.0))
def test_exponential(x: float) -> None:
    assert kernel.exponential(x) == pytest.approx(math.exp(x), rel=6e-16, abs=0)


def test_exponential_at_its_ends() -> None:
    assert kernel.exponential(0.0) == 1.0
    assert 0.0 <= kernel.exponential(-1e6) < 1e-300


def test_layout_and_type_of_the_arrays_do_not_matter() -> None:
    crystal = random_crystal(1)
    other = replace(
        crystal,
        lattice=np.asfortranarray(crystal.lattice),
        positions=np.repeat(crystal.positions, 2, axis=0)[::2],
        occupancy=crystal.occupancy.astype(object).astype(np.float64),
    )
    one, two = (diffraction_cloud(c, config("sphere:0.9")) for c in (crystal, other))
    np.testing.assert_array_equal(one.intensity, two.intensity)
    assert len(kernel.cloud.signatures) == 1  # none was compiled anew


def test_compiles_without_a_place_for_the_cache() -> None:
    # What has no file cannot be cached, as where no folder can be written.
    namespace: dict[str, Callable[[int], int]] = {}
    exec("def twice(x): return 2 * x", namespace)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(namespace["twice"], cache=True)
    assert kernel.compiled(namespace["twice"])(3) == 6


@pytest.mark.parametrize("module", [kernel, selection, geometry])
def test_compiled_functions_call_those_of_their_own_file_only(module: object) -> None:
    # Numba takes compiled code from its cache as long as the file of the caller is unchanged.
    dispatchers = {n: f for n, f in vars(module).items() if hasattr(f, "py_func")}
    for dispatcher in dispatchers.values():
        if dispatcher.__module__ == module.__name__:
            called = set(dispatcher.py_func.__code__.co_names) & set(dispatchers)
            assert all(dispatchers[name].__module__ == module.__name__ for name in called)
