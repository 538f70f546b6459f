"""Crystals for the physics tests, and gemmi's own structure factors of them.

Nothing here uses the project's readers: prototypes are written out, CIFs are read by gemmi, and
documents of the real data straight from their JSON.
"""

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import gemmi
import numpy as np
import orjson
import pytest
from hypothesis import strategies as st

from featurization.cloud import Cloud
from featurization.crystal import CRYSTAL_SYSTEMS, Crystal, FloatArray, IntArray

SHARED = Path(__file__).parents[2] / "shared"

Content = str | Mapping[str, float]


def crystal_of(lattice: FloatArray, sites: Sequence[tuple[Content, Sequence[float]]]) -> Crystal:
    """One site a pair (element, or element → occupancy; fractional position)."""
    rows = [
        (number, name, occupancy, position)
        for number, (content, position) in enumerate(sites)
        for name, occupancy in ({content: 1.0} if isinstance(content, str) else content).items()
    ]
    return Crystal(
        id="test",
        lattice=np.asarray(lattice, dtype=float),
        positions=np.array([row[3] for row in rows], dtype=float),
        species=tuple(row[1] for row in rows),
        occupancy=np.array([row[2] for row in rows], dtype=float),
        site=np.array([row[0] for row in rows]),
    )


def lattice_of(a: float, b: float, c: float, *degrees: float) -> FloatArray:
    """Rows a, b, c (Å) with a along x and b in the plane xy; angles α, β, γ."""
    cos = np.cos(np.radians(degrees))
    sin_gamma = np.sin(np.radians(degrees[2]))
    x, y = cos[1], (cos[0] - cos[1] * cos[2]) / sin_gamma
    rows = [
        [a, 0, 0],
        [b * cos[2], b * sin_gamma, 0],
        [c * x, c * y, c * np.sqrt(1 - x * x - y * y)],
    ]
    return np.array(rows, dtype=float)


def random_crystal(seed: int, atoms: int = 5, *, partial: bool = True) -> Crystal:
    """A triclinic crystal without symmetry whose atoms keep 1.3 Å apart."""
    rng = np.random.default_rng(seed)
    lattice = lattice_of(*rng.uniform(4.0, 7.0, 3), *rng.uniform(70.0, 110.0, 3))
    images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    positions: list[FloatArray] = []
    while len(positions) < atoms:
        trial = rng.random(3)
        vectors = [(trial - other + images) @ lattice for other in positions]
        if all(np.linalg.norm(vector, axis=1).min() > 1.3 for vector in vectors):
            positions.append(trial)
    contents: list[Content] = [str(n) for n in rng.choice(["O", "Si", "Ti", "Fe", "La"], atoms)]
    if partial:
        contents[0] = {"Mg": 0.55, "Fe": 0.3}  # a mixed site with 15 % vacancies
        contents[1] = {"D": 0.7, "H": 0.1}
    return crystal_of(lattice, list(zip(contents, [p.tolist() for p in positions], strict=True)))


@st.composite
def crystals(draw: st.DrawFn) -> Crystal:
    """Any cell, any atoms: overlaps and vacancies included. For laws of the sum over atoms."""
    length, angle = st.floats(3.0, 8.0), st.floats(65.0, 115.0)
    cell = [draw(length) for _ in range(3)] + [draw(angle) for _ in range(3)]
    content = st.one_of(
        st.sampled_from(["H", "D", "C", "O", "Ti", "Mn", "U"]),
        st.builds(lambda x: {"Ga": x, "In": 1.0 - x}, st.floats(0.01, 0.99)),
        st.builds(lambda x: {"Li": x}, st.floats(0.01, 0.99)),
    )
    position = st.tuples(*[st.floats(-1.0, 2.0)] * 3)
    sites = draw(st.lists(st.tuples(content, position), min_size=1, max_size=6))
    return crystal_of(lattice_of(*cell), sites)


CENTRED = {
    "P": [(0.0, 0.0, 0.0)],
    "I": [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5)],
    "F": [(0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0)],
}


def cubic(a: float, centring: str, *basis: tuple[Content, Sequence[float]]) -> Crystal:
    """A cubic crystal in its conventional cell."""
    return crystal_of(
        np.eye(3) * a,
        [(c, np.add(x, shift).tolist()) for c, x in basis for shift in CENTRED[centring]],
    )


def bcc() -> Crystal:
    return cubic(2.866, "I", ("Fe", (0, 0, 0)))


def fcc() -> Crystal:
    return cubic(3.615, "F", ("Cu", (0, 0, 0)))


def diamond() -> Crystal:
    return cubic(3.567, "F", ("C", (0, 0, 0)), ("C", (0.25, 0.25, 0.25)))


def zinc_blende() -> Crystal:
    return cubic(5.409, "F", ("Zn", (0, 0, 0)), ("S", (0.25, 0.25, 0.25)))


def rock_salt() -> Crystal:
    return cubic(5.64, "F", ("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5)))


def perovskite() -> Crystal:
    oxygen: list[tuple[Content, Sequence[float]]] = [
        ("O", (0.5, 0.5, 0)),
        ("O", (0.5, 0, 0.5)),
        ("O", (0, 0.5, 0.5)),
    ]
    return cubic(3.905, "P", ("Sr", (0, 0, 0)), ("Ti", (0.5, 0.5, 0.5)), *oxygen)


def hcp() -> Crystal:
    sites = [("Mg", (1 / 3, 2 / 3, 0.25)), ("Mg", (2 / 3, 1 / 3, 0.75))]
    return crystal_of(lattice_of(3.209, 3.209, 5.211, 90, 90, 120), sites)


def rutile() -> Crystal:
    """VESTA's: a = 4.587, c = 2.954 Å, x = 0.3051."""
    x, y = 0.3051, 0.5 - 0.3051
    sites = [
        ("Ti", (0, 0, 0)),
        ("Ti", (0.5, 0.5, 0.5)),
        ("O", (x, x, 0)),
        ("O", (-x, -x, 0)),
        ("O", (0.5 + x, y, 0.5)),
        ("O", (y, 0.5 + x, 0.5)),
    ]
    return crystal_of(np.diag([4.587, 4.587, 2.954]), sites)


def quartz() -> Crystal:
    """α-quartz, P3₂21: no centre of symmetry, hence complex F."""
    third, u = 1 / 3, 0.4697
    x, y, z = 0.4133, 0.2672, 0.1188 + 2 * third
    silicon = [(u, 0, 2 * third), (0, u, third), (-u, -u, 0)]
    oxygen = [(x, y, z), (-y, x - y, z + 2 * third), (y - x, -x, z + third)]
    oxygen += [(y, x, -z), (x - y, -y, third - z), (-x, y - x, 2 * third - z)]
    sites = [("Si", p) for p in silicon] + [("O", p) for p in oxygen]
    return crystal_of(lattice_of(4.916, 4.916, 5.4054, 90, 90, 120), sites)


def supercell(crystal: Crystal, matrix: Sequence[Sequence[int]]) -> Crystal:
    """The same crystal in the cell whose vectors are the rows of `matrix` × (a, b, c)."""
    rows = np.array(matrix)
    count = abs(round(float(np.linalg.det(rows))))
    reach = np.abs(rows).sum(axis=0)
    shifts = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach]), axis=-1).reshape(-1, 3)
    # Of the translations, keep those in the half-open new cell; the nudge settles its faces.
    inside = shifts @ np.linalg.inv(rows) + 1e-9
    shifts = shifts[((inside >= 0) & (inside < 1)).all(axis=1)]
    assert len(shifts) == count
    sites = len(set(crystal.site.tolist()))
    return Crystal(
        id=crystal.id,
        lattice=rows @ crystal.lattice,
        positions=np.concatenate([(crystal.positions + t) @ np.linalg.inv(rows) for t in shifts]),
        species=crystal.species * count,
        occupancy=np.tile(crystal.occupancy, count),
        site=np.concatenate([crystal.site + sites * k for k in range(count)]),
    )


def read_cif(path: Path) -> Crystal:
    """Every atom of the cell of a CIF, by gemmi; skips the test where the file is absent."""
    if not path.exists():
        pytest.skip(f"reference data absent: {path.name}")
    # Level 0: Sapphire.cif has one tag twice (the chemical formula).
    document = gemmi.cif.read_string(path.read_text(encoding="utf-8"), check_level=0)
    small = gemmi.make_small_structure_from_block(document.sole_block())
    sites = [
        ({site.element.name: site.occ}, site.fract.tolist())
        for site in small.get_all_unit_cell_sites()
    ]
    return crystal_of(lattice_of(*small.cell.parameters), sites)


@cache
def _documents() -> list[dict[str, object]]:
    path = SHARED / "data" / "mp_elastic.jsonl.gz"
    if not path.exists():
        return []
    with gzip.open(path) as stream:
        return [orjson.loads(line) for line in stream]


def real_crystals(per_system: int, max_sites: int = 40) -> list[tuple[Crystal, int]]:
    """Real crystals with their published space-group number, evenly from each crystal system."""
    documents = _documents()
    if not documents:
        pytest.skip("real data absent: ../shared/data/mp_elastic.jsonl.gz")
    chosen: list[tuple[Crystal, int]] = []
    for system in CRYSTAL_SYSTEMS:
        fitting = [
            d
            for d in documents
            if d["symmetry"]["crystal_system"].lower() == system and d["nsites"] <= max_sites
        ]
        for document in fitting[:: max(1, len(fitting) // per_system)][:per_system]:
            structure = document["structure"]
            sites = [
                ({s["element"]: s["occu"] for s in site["species"]}, site["abc"])
                for site in structure["sites"]
            ]
            crystal = crystal_of(np.array(structure["lattice"]["matrix"]), sites)
            chosen.append((crystal, document["symmetry"]["number"]))
    return chosen


def full_cloud(cloud: Cloud) -> tuple[FloatArray, FloatArray]:
    """Both points of each Friedel pair: (P′, 3) q in 1/Å and (P′,) intensities, in float64."""
    mirrored = cloud.multiplicity == 2
    q = np.concatenate([cloud.q, -cloud.q[mirrored]]).astype(float)
    return q, np.concatenate([cloud.intensity, cloud.intensity[mirrored]]).astype(float)


def gemmi_structure(crystal: Crystal, b_iso: float = 0.0) -> gemmi.SmallStructure:
    """The crystal in P1, every atom written out."""
    lengths = np.linalg.norm(crystal.lattice, axis=1)
    unit = crystal.lattice / lengths[:, None]
    cosines = [unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]]
    small = gemmi.SmallStructure()
    small.cell = gemmi.UnitCell(*lengths, *np.degrees(np.arccos(cosines)))
    small.spacegroup_hm = "P 1"
    for number, name in enumerate(crystal.species):
        site = gemmi.SmallStructure.Site()
        site.label = f"{name}{number}"
        site.element = gemmi.Element(name)
        site.type_symbol = name
        site.fract = gemmi.Fractional(*crystal.positions[number])
        site.occ = float(crystal.occupancy[number])
        site.u_iso = b_iso / (8.0 * np.pi**2)
        small.add_site(site)
    small.setup_cell_images()
    return small


_CALCULATORS = {
    "xray": gemmi.StructureFactorCalculatorX,
    "neutron": gemmi.StructureFactorCalculatorN,
    "electron": gemmi.StructureFactorCalculatorE,
}


def gemmi_factors(
    crystal: Crystal, hkl: IntArray, radiation: str, b_iso: float = 0.0
) -> FloatArray:
    """(P,) complex F by gemmi."""
    small = gemmi_structure(crystal, b_iso)
    calculator = _CALCULATORS[radiation](small.cell)
    factors = [calculator.calculate_sf_from_small_structure(small, h) for h in hkl.tolist()]
    return np.array(factors)


def gemmi_scattering(name: str, s2: FloatArray, radiation: str) -> FloatArray:
    """(P,) f of one element by gemmi at s² = (sin θ / λ)²; zero where its table has no value."""
    element = gemmi.Element(name)
    table = {"xray": element.it92, "neutron": element.neutron92, "electron": element.c4322}
    if table[radiation] is None:
        return np.zeros(len(s2))
    return np.array([table[radiation].calculate_sf(float(x)) for x in s2])


def gemmi_bound(crystal: Crystal, hkl: IntArray, radiation: str, b_iso: float = 0.0) -> FloatArray:
    """(P,) Σ_j o_j |f_j| T_j, the largest |F| that any positions can give."""
    cell = gemmi_structure(crystal).cell
    s2 = np.array([cell.calculate_1_d2(h) / 4.0 for h in hkl.tolist()])
    total = sum(
        amount * np.abs(gemmi_scattering(name, s2, radiation))
        for name, amount in crystal.composition.items()
    )
    return np.asarray(total * np.exp(-b_iso * s2))
