"""Structure factors against gemmi, pymatgen, VESTA and a measured crystal; and the check itself.

The error of F is taken relative to Σ_j o_j |f_j| T_j, the largest |F| that the atoms could give:
relative to |F| itself it means nothing at an absence.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pytest
from crystals import (
    SHARED,
    crystal_of,
    fcc,
    gemmi_bound,
    gemmi_factors,
    gemmi_scattering,
    gemmi_structure,
    hcp,
    lattice_of,
    quartz,
    random_crystal,
    read_cif,
    real_crystals,
    rock_salt,
    rutile,
    zinc_blende,
)
from pymatgen.analysis.diffraction.xrd import XRDCalculator
from pymatgen.core import Lattice, Structure

from featurization.cloud import Cloud, diffraction_cloud, structure_factors
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, FloatArray

Calculator = Callable[[Crystal, np.ndarray, str, float], np.ndarray]
RADIATIONS = ("xray", "neutron", "electron")
REFERENCE = SHARED / "reference"
# gemmi evaluates its Gaussians in float32 (we in float64 from the same coefficients), which shows
# as up to 2.5e-7; scattering lengths are constants, so there the phases alone are compared.
TOLERANCE = {"xray": 1e-6, "neutron": 1e-12, "electron": 1e-6}


def ours(crystal: Crystal, hkl: np.ndarray, radiation: str, b_iso: float) -> np.ndarray:
    return structure_factors(crystal, hkl, radiation, b_iso)[0]


def indices(seed: int, count: int = 40, largest: int = 7) -> np.ndarray:
    """Random hkl of every octant, the origin among them."""
    hkl = np.random.default_rng(seed).integers(-largest, largest + 1, (count, 3))
    hkl[0] = 0
    return hkl


def disagreement(
    calculator: Calculator, crystals: list[Crystal], radiation: str, b_iso: float
) -> float:
    """Worst |F − F(gemmi)| / Σ|f| of a calculator over crystals and random reflections."""
    worst = 0.0
    for seed, crystal in enumerate(crystals):
        hkl = indices(seed)
        difference = calculator(crystal, hkl, radiation, b_iso)
        difference = difference - gemmi_factors(crystal, hkl, radiation, b_iso)
        bound = gemmi_bound(crystal, hkl, radiation, b_iso)
        worst = max(worst, float((np.abs(difference) / bound).max()))
    return worst


def synthetic() -> list[Crystal]:
    """Triclinic crystals with mixed, partly empty and deuterated sites, and two without centre."""
    return [random_crystal(seed) for seed in range(10)] + [quartz(), zinc_blende()]


@pytest.mark.parametrize("b_iso", [0.0, 1.7])
@pytest.mark.parametrize("radiation", RADIATIONS)
def test_synthetic_crystals_agree_with_gemmi(radiation: str, b_iso: float) -> None:
    assert disagreement(ours, synthetic(), radiation, b_iso) < TOLERANCE[radiation]


@pytest.mark.parametrize("radiation", RADIATIONS)
def test_real_crystals_agree_with_gemmi(radiation: str) -> None:
    known = [
        (crystal, number)
        for crystal, number in real_crystals(12, max_sites=24)
        if all(gemmi_scattering(s, np.zeros(1), radiation)[0] for s in crystal.species)
    ]
    numbers = [number for _, number in known]
    assert len(known) >= 50
    assert sum(number <= 2 for number in numbers) >= 5
    assert sum(3 <= number <= 15 for number in numbers) >= 5
    assert (
        disagreement(ours, [crystal for crystal, _ in known], radiation, 0.6) < TOLERANCE[radiation]
    )


# --- the check itself: it must reject calculators with one mistake each ---------------------


def by_hand(
    crystal: Crystal,
    hkl: np.ndarray,
    radiation: str,
    b_iso: float,
    *,
    sign: float = 1.0,
    form_factor: bool = True,
    occupancy: bool = True,
    q_factor: float = 1.0,
    deuterium: str = "D",
    displacement: bool = True,
) -> np.ndarray:
    """The sum over atoms with loops, and a switch for each classical mistake."""
    q = q_factor * np.linalg.norm(hkl @ np.linalg.inv(crystal.lattice).T, axis=1)
    total = np.zeros(len(hkl), dtype=complex)
    for name, x, o in zip(crystal.species, crystal.positions, crystal.occupancy, strict=True):
        s2 = q * q / 4 if form_factor else np.zeros(len(q))
        f = gemmi_scattering(deuterium if name == "D" else name, s2, radiation)
        f = f * np.exp(-b_iso * q * q / 4) if displacement else f
        total += (o if occupancy else 1.0) * f * np.exp(sign * 2j * np.pi * (hkl @ x))
    return total


def test_the_correct_sum_by_hand_passes_the_check() -> None:
    for radiation in RADIATIONS:
        assert disagreement(by_hand, synthetic(), radiation, 1.7) < TOLERANCE[radiation]


@pytest.mark.parametrize(
    ("radiation", "mistake"),
    [
        ("xray", {"sign": -1.0}),
        ("neutron", {"sign": -1.0}),
        ("electron", {"sign": -1.0}),
        ("xray", {"form_factor": False}),
        ("electron", {"form_factor": False}),
        ("xray", {"occupancy": False}),
        ("neutron", {"occupancy": False}),
        ("electron", {"occupancy": False}),
        ("xray", {"q_factor": 2.0 * np.pi}),
        ("neutron", {"q_factor": 2.0 * np.pi}),
        ("electron", {"q_factor": 2.0 * np.pi}),
        ("neutron", {"deuterium": "H"}),
        ("xray", {"displacement": False}),
    ],
)
def test_a_wrong_calculator_fails_the_check(radiation: str, mistake: dict[str, object]) -> None:
    def broken(crystal: Crystal, hkl: np.ndarray, kind: str, b_iso: float) -> np.ndarray:
        return by_hand(crystal, hkl, kind, b_iso, **mistake)

    assert disagreement(broken, synthetic(), radiation, 1.7) > 1e-2


def cloud_is_right(cloud: Cloud, crystal: Crystal, b_iso: float) -> bool:
    """Whether |q| = 1/d and I = |F|²/V² with gemmi's d, V and F, and each ±hkl counts once."""
    cell = gemmi_structure(crystal).cell
    hkl = cloud.hkl.astype(int)
    squared_q = np.array([cell.calculate_1_d2(h) for h in hkl.tolist()])
    expected = np.abs(gemmi_factors(crystal, hkl, "xray", b_iso)) ** 2 / cell.volume**2
    return bool(
        np.allclose(np.linalg.norm(cloud.q, axis=1), np.sqrt(squared_q), rtol=1e-6, atol=1e-7)
        and np.allclose(cloud.intensity, expected, rtol=1e-5, atol=1e-6 * expected.max())
        and (cloud.multiplicity == np.where(hkl.any(axis=1), 2, 1)).all()
        and len({min(tuple(h), tuple(-h)) for h in hkl}) == len(hkl)
    )


@pytest.mark.parametrize("selection", ["sphere:0.9", "miller:3"])
def test_cloud_agrees_with_gemmi(selection: str) -> None:
    config = FeaturizationConfig(selection=selection, cell="as_given", b_iso=0.9, absences="keep")
    for crystal in (random_crystal(3), quartz(), rutile()):
        cloud = diffraction_cloud(crystal, config)
        assert cloud_is_right(cloud, crystal, 0.9)
        for broken in (
            replace(cloud, q=cloud.q * np.float32(2 * np.pi)),
            replace(cloud, intensity=cloud.intensity * np.float32(crystal.volume)),
            replace(cloud, intensity=np.sqrt(cloud.intensity)),
            replace(cloud, multiplicity=np.full_like(cloud.multiplicity, 2)),
            replace(cloud, hkl=np.abs(cloud.hkl)),
        ):
            assert not cloud_is_right(broken, crystal, 0.9)


# --- pymatgen: the form factors of the paper and its powder patterns -------------------------


def powder(two_theta: FloatArray, intensity: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Peaks (merged where closer than 0.001°), strongest = 100."""
    order = np.argsort(two_theta)
    two_theta, intensity = two_theta[order], intensity[order]
    groups = np.cumsum(np.diff(two_theta, prepend=two_theta[0]) > 1e-3)
    total = np.bincount(groups, weights=intensity)
    centre = np.bincount(groups, weights=two_theta) / np.bincount(groups)
    return centre, 100.0 * total / total.max()


def powder_of_cloud(
    crystal: Crystal, wavelength: float, radiation: str = "xray_pymatgen"
) -> tuple[FloatArray, FloatArray]:
    """Our intensities × V² × multiplicity × Lorentz–polarization factor, up to 2θ = 90°."""
    config = FeaturizationConfig(
        radiation=radiation,
        cell="as_given",
        selection=f"sphere:{2 * np.sin(np.pi / 4) / wavelength:.9f}",
        absences="keep",
    )
    cloud = diffraction_cloud(crystal, config)
    # float32 |q| would smear the shells by some 1e-5°.
    q = np.linalg.norm(cloud.hkl @ np.linalg.inv(crystal.lattice).T, axis=1)
    away = q > 0
    theta = np.arcsin(wavelength * q[away] / 2)
    lorentz = (1 + np.cos(2 * theta) ** 2) / (np.sin(theta) ** 2 * np.cos(theta))
    intensity = cloud.intensity[away].astype(float) * crystal.volume**2 * lorentz
    return powder(np.degrees(2 * theta), intensity * cloud.multiplicity[away])


MONOCLINIC = crystal_of(
    lattice_of(5.15, 5.21, 5.32, 90, 99.2, 90),
    [
        (content, position)
        for content, (x, y, z) in [
            ({"Zr": 0.8, "Hf": 0.15}, (0.275, 0.04, 0.208)),
            ("O", (0.07, 0.332, 0.345)),
            ("O", (0.45, 0.757, 0.479)),
        ]
        for position in [
            (x, y, z),
            (-x, -y, -z),
            (-x, y + 0.5, 0.5 - z),
            (x, 0.5 - y, z + 0.5),
        ]
    ],
)


@pytest.mark.parametrize(
    "crystal",
    [
        rock_salt(),
        fcc(),
        hcp(),
        quartz(),
        rutile(),
        MONOCLINIC,
        random_crystal(1, 4, partial=False),
        random_crystal(7, 6, partial=False),
    ],
    ids=["rock_salt", "fcc", "hcp", "quartz", "rutile", "monoclinic", "triclinic", "triclinic2"],
)
def test_powder_pattern_agrees_with_pymatgen(crystal: Crystal) -> None:
    calculator = XRDCalculator("CuKa")
    first = np.unique(crystal.site, return_index=True)[1]
    species = [
        {crystal.species[r]: crystal.occupancy[r] for r in np.flatnonzero(crystal.site == site)}
        for site in crystal.site[first]
    ]
    structure = Structure(Lattice(crystal.lattice), species, crystal.positions[first])
    pattern = calculator.get_pattern(structure, scaled=True)
    theirs_x, theirs_y = powder(np.array(pattern.x), np.array(pattern.y))
    ours_x, ours_y = powder_of_cloud(crystal, calculator.wavelength)
    # pymatgen drops peaks below 0.001 % of the strongest, before shells within 0.001° merge.
    matched = np.abs(ours_x[:, None] - theirs_x[None, :]).argmin(axis=0)
    assert np.abs(ours_x[matched] - theirs_x).max() < 1e-3
    assert len(set(matched.tolist())) == len(theirs_x)
    np.testing.assert_allclose(ours_y[matched], theirs_y, atol=5e-3)
    missing = np.delete(ours_y, matched)
    assert missing.size == 0 or missing.max() < 5e-3


def test_powder_check_tells_the_form_factors_apart() -> None:
    wavelength = XRDCalculator("CuKa").wavelength
    paper, tables = (
        powder_of_cloud(quartz(), wavelength, radiation)[1]
        for radiation in ("xray_pymatgen", "xray")
    )
    assert np.abs(paper - tables).max() > 3e-2  # six times the tolerance above


# --- VESTA 3.5.8 --------------------------------------------------------------------------


def vesta(name: str) -> FloatArray:
    """Rows of a VESTA table: h k l d F(real) F(imag) |F| 2θ I M."""
    path = REFERENCE / "vesta" / f"vesta_{name}.txt"
    if not path.exists():
        pytest.skip(f"reference data absent: {path.name}")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return np.array([line.split() for line in lines if line.strip()], dtype=float)


def test_rutile_x_ray_agrees_with_vesta() -> None:
    # VESTA takes Waasmaier–Kirfel (1995) factors, we IT92: for neutral Ti and O the two fits
    # differ by less than 0.1 % of Σ|f| in VESTA's range (sin θ/λ < 0.65 1/Å).
    table = vesta("Rutile_xray")
    f, bound = structure_factors(rutile(), table[:, :3].astype(int), "xray")
    assert (np.abs(f - (table[:, 4] + 1j * table[:, 5])) / bound).max() < 1e-3


def test_rutile_neutron_agrees_with_vesta() -> None:
    # F is linear in b, so each species' share, divided by our b and multiplied by VESTA's,
    # gives VESTA's F to the digits of its table.
    table = vesta("Rutile_neutron")
    hkl = table[:, :3].astype(int)
    crystal = rutile()
    total = np.zeros(len(hkl), dtype=complex)
    for name, b_ours, b_vesta in (("Ti", -3.438, -3.370), ("O", 5.803, 5.803)):
        rows = [row for row, species in enumerate(crystal.species) if species == name]
        share = crystal_of(crystal.lattice, [(name, crystal.positions[row]) for row in rows])
        total += structure_factors(share, hkl, "neutron")[0] * (b_vesta / b_ours)
    np.testing.assert_allclose(total, table[:, 4] + 1j * table[:, 5], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("cubic", (3.92, 3.92, 3.92, 90, 90, 90)),
        ("hexagonal", (2.85, 2.85, 10.8, 90, 90, 120)),
        ("tetragonal", (5.9, 5.9, 8.7, 90, 90, 90)),
        ("monoclinic", (4.5, 4.5, 4.5, 90, 65, 90)),
        ("rhombohedral", (4.9, 4.9, 4.9, 85, 85, 85)),
        ("triclinic", (6.867, 16.706, 5.399, 62.98, 42.25, 52.16)),
    ],
)
def test_lattice_tables_agree_with_vesta(name: str, cell: tuple[float, ...]) -> None:
    table = vesta(name)
    smallest = table[:, 3].min()
    config = FeaturizationConfig(
        cell="as_given", selection=f"sphere:{1 / (smallest - 1e-6):.9f}", b_iso=8 * np.pi**2 * 0.05
    )
    crystal = crystal_of(lattice_of(*cell), [("Fe", (0, 0, 0))])
    cloud = diffraction_cloud(crystal, config)
    rows = {tuple(row[:3].astype(int)): row for row in table}
    points = cloud.multiplicity == 2
    hkl, q = cloud.hkl[points].astype(int), np.linalg.norm(cloud.q[points], axis=1)
    # The same reflections: ours are half of VESTA's.
    both = {tuple(h) for h in hkl} | {tuple(-h) for h in hkl}
    assert both == set(rows)
    assert len(table) == 2 * len(hkl)
    found = np.array([rows[tuple(h)] for h in hkl])
    np.testing.assert_allclose(1 / q, found[:, 3], rtol=3e-7, atol=6e-7)
    # The atom of these tables is Fe with U = 0.05 Å²; Waasmaier–Kirfel against IT92 again.
    modulus = np.sqrt(cloud.intensity[points]) * crystal.volume
    np.testing.assert_allclose(modulus, found[:, 6], atol=1e-3 * 26)


# --- a measurement: FeN4 at 180 GPa, COD 2242624 ----------------------------------------------


def fen4() -> tuple[gemmi.SmallStructure, FloatArray, FloatArray]:
    """The published atoms, the lattice of the measurement, rows h k l F²(calc) F²(meas)."""
    cif, hkl = (REFERENCE / "FeN4" / f"2242624.{kind}" for kind in ("cif", "hkl"))
    if not (cif.exists() and hkl.exists()):
        pytest.skip("reference data absent: FeN4")
    block = gemmi.cif.read(str(hkl)).sole_block()
    keys = [f"_cell_length_{x}" for x in "abc"]
    keys += [f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")]
    tags = ["index_h", "index_k", "index_l", "F_squared_calc", "F_squared_meas"]
    columns = [[float(x) for x in block.find_values(f"_refln_{tag}")] for tag in tags]
    lattice = lattice_of(*[float(block.find_value(key)) for key in keys])
    return gemmi.read_small_structure(str(cif)), lattice, np.array(columns).T


def fen4_squares(
    atoms: list[tuple[str, FloatArray, float]],
    lattice: FloatArray,
    hkl: np.ndarray,
    dispersion: dict[str, complex],
) -> FloatArray:
    """|F|² as a sum of single-atom structure factors, each with its own T and f′ + i f″."""
    q = np.linalg.norm(hkl @ np.linalg.inv(lattice).T, axis=1)
    total = np.zeros(len(hkl), dtype=complex)
    for name, x, u in atoms:
        alone = structure_factors(crystal_of(lattice, [(name, x)]), hkl, "xray")[0]
        alone = alone + dispersion.get(name, 0) * np.exp(2j * np.pi * (hkl @ x))
        total += alone * np.exp(-2 * np.pi**2 * u * q * q)
    return np.abs(total) ** 2


def r_factor(found: FloatArray, expected: FloatArray) -> float:
    return float(np.abs(found - expected).sum() / expected.sum())


def test_fen4_measurement_is_reproduced() -> None:
    small, lattice, table = fen4()
    atoms = [
        (site.element.name, np.array(site.fract.tolist()), site.u_iso)
        for site in small.get_all_unit_cell_sites()
    ]
    assert [name for name, _, _ in atoms] == ["Fe", "N", "N", "N", "N"]
    squares = fen4_squares(atoms, lattice, table[:, :3].astype(int), {})
    # Published positions have three digits and the refinement had anomalous dispersion, which
    # we leave out: 2.0 % of the calculated column, 6.5 % of the measured one.
    assert r_factor(squares, table[:, 3]) < 0.025
    assert r_factor(squares, table[:, 4]) < 0.08
    # Teeth: N for Fe, or no displacement, is far off.
    wrong = [("N", x, u) for _, x, u in atoms]
    still = [(name, x, 0.0) for name, x, _ in atoms]
    for other in (wrong, still):
        assert (
            r_factor(fen4_squares(other, lattice, table[:, :3].astype(int), {}), table[:, 4]) > 0.1
        )


def test_fen4_refinement_is_reproduced_exactly() -> None:
    # With all digits of the refinement's .res file (inside the CIF) and the dispersion of Fe
    # and N at 0.30996 Å, the calculated column comes out to its own digits.
    _, lattice, table = fen4()
    res = Path(REFERENCE / "FeN4" / "2242624.cif").read_text(encoding="utf-8")
    atoms = []
    for name, label in (("Fe", "FE "), ("N", "N1 "), ("N", "N2 ")):
        line = next(line for line in res.splitlines() if line.startswith(label + "   "))
        fields = [float(x) for x in line.split()[2:]]
        x, u = np.array(fields[:3]), fields[4]
        atoms += [(name, x, u)] if name == "Fe" else [(name, x, u), (name, -x, u)]
    dispersion = {"Fe": 0.1197 + 0.1747j, "N": -0.0010 + 0.0005j}
    squares = fen4_squares(atoms, lattice, table[:, :3].astype(int), dispersion)
    assert r_factor(squares, table[:, 3]) < 1e-4
    assert r_factor(squares, table[:, 4]) == pytest.approx(0.0602, abs=5e-4)


def test_reference_cifs_hold_the_expected_atoms() -> None:
    expected = {
        "Aluminium": {"Al": 4},
        "Copper": {"Cu": 4},
        "Silicon": {"Si": 8},
        "Diamond": {"C": 8},
        "KCl": {"K": 4, "Cl": 4},
        "Sapphire": {"Al": 12, "O": 18},
        "Rutile": {"Ti": 2, "O": 4},
    }
    for name, composition in expected.items():
        assert read_cif(REFERENCE / "vesta" / f"{name}.cif").composition == composition
