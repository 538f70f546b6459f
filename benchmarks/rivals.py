"""What featurization could have been built on, and the least that diffraction must compute."""

import time
from collections.abc import Callable
from typing import Any

import gemmi
import moyopy
import numba
import numpy as np
from numpy.typing import NDArray
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Structure
from pymatgen.io.cif import CifParser, CifWriter
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from featurization.crystal import Crystal, FloatArray, IntArray
from featurization.kernel import reciprocal_cell
from featurization.radiation import scattering
from featurization.selection import miller_half

SYMPREC = 0.1  # Å
POINTS = 172  # miller:3, one of each pair ±hkl


def p1_cif(crystal: Crystal) -> str:
    """As the CSV files of MP-20 hold it."""
    lattice = Lattice(crystal.lattice)
    return str(CifWriter(Structure(lattice, list(crystal.species), crystal.positions)))


def pymatgen_parse(text: str) -> Structure:
    return CifParser.from_str(text).parse_structures(primitive=False)[0]


def gemmi_parse(text: str) -> gemmi.SmallStructure:
    return gemmi.make_small_structure_from_block(gemmi.cif.read_string(text).sole_block())


def pymatgen_primitive(structure: Structure) -> Any:
    return SpacegroupAnalyzer(structure, SYMPREC).get_primitive_standard_structure()


def moyo_search(cell: moyopy.Cell) -> moyopy.MoyoDataset:
    return moyopy.MoyoDataset(cell, symprec=SYMPREC, setting=moyopy.Setting.standard())


# --- intensities |F|²/V² at (P, 3) hkl --------------------------------------------------------


def kernel_input(crystal: Crystal) -> tuple[Any, ...]:
    """Arguments of `featurization.kernel.cloud`."""
    reciprocal, volume, _ = reciprocal_cell(crystal.lattice)
    scatterers = crystal.positions, crystal.occupancy, *scattering(crystal.species, ("xray",))
    return miller_half(3), reciprocal, volume, *scatterers, 0.0, 1e-6, False


def loop(crystal: Crystal, hkl: IntArray) -> FloatArray:
    """One expression a reflection, as programs do that draw powder patterns."""
    kind, table = scattering(crystal.species, ("xray",))
    rows = table[0, kind]
    reciprocal = np.linalg.inv(crystal.lattice).T
    intensity = np.empty(len(hkl))
    for p, index in enumerate(hkl):
        q = index @ reciprocal
        f = rows[:, 0] + (rows[:, 2:6] * np.exp(-rows[:, 7:11] * (0.25 * (q @ q)))).sum(axis=1)
        phases = np.exp(2j * np.pi * (crystal.positions @ index))
        intensity[p] = abs((f * crystal.occupancy * phases).sum()) ** 2
    return intensity / crystal.volume**2


def vectorized(crystal: Crystal, hkl: IntArray) -> FloatArray:
    """One expression a crystal, form factors once a species."""
    kind, table = scattering(crystal.species, ("xray",))
    used, inverse = np.unique(kind, return_inverse=True)
    rows = table[0, used, :, None]
    q = hkl @ np.linalg.inv(crystal.lattice).T
    s2 = 0.25 * (q * q).sum(axis=1)
    f = rows[:, 0] + (rows[:, 2:6] * np.exp(-rows[:, 7:11] * s2)).sum(axis=1)
    phases = np.exp(2j * np.pi * (crystal.positions @ hkl.T))
    total = (crystal.occupancy[:, None] * f[inverse] * phases).sum(axis=0)
    intensity: FloatArray = np.abs(total) ** 2 / crystal.volume**2
    return intensity


def gemmi_structure(crystal: Crystal, atoms: bool = True) -> gemmi.SmallStructure:
    small = gemmi.SmallStructure()
    small.cell = gemmi.UnitCell(*Lattice(crystal.lattice).parameters)
    for n in range(len(crystal.species) if atoms else 0):
        site = gemmi.SmallStructure.Site()
        site.type_symbol, site.element = crystal.species[n], gemmi.Element(crystal.species[n])
        site.fract, site.occ = gemmi.Fractional(*crystal.positions[n]), crystal.occupancy[n]
        small.add_site(site)
    return small


def gemmi_sum(small: gemmi.SmallStructure, hkl: list[list[int]]) -> NDArray[np.complex128]:
    calculator = gemmi.StructureFactorCalculatorX(small.cell)
    return np.array([calculator.calculate_sf_from_small_structure(small, each) for each in hkl])


# --- the floor --------------------------------------------------------------------------------


@numba.njit(error_model="numpy")
def _multiply_add(a: Any, b: Any, total: Any, repeats: int) -> None:
    for _ in range(repeats):
        for p in range(len(total)):
            total[p] += a[p] * b[p]


@numba.njit(error_model="numpy")
def _horner(x: Any, total: Any, repeats: int) -> None:
    for _ in range(repeats):
        for p in range(len(total)):
            y = 1e-3
            for n in range(12):
                y = y * x[p] + 1.0 / (n + 1.0)
            total[p] += y


def rates() -> tuple[float, float]:
    """Operations a second of complex sums and of polynomials in loops of Numba, in cache."""
    z, x, repeats = np.full(POINTS, 0.6 + 0.8j), np.full(POINTS, -0.3), 20_000
    loops: list[tuple[Callable[[], None], int]] = [
        (lambda: _multiply_add(z, z, np.zeros(POINTS, np.complex128), repeats), 8),
        (lambda: _horner(x, np.zeros(POINTS), repeats), 25),
    ]
    fastest = []
    for work, count in loops:
        work()
        seconds = []
        for _ in range(10):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        fastest.append(count * POINTS * repeats / min(seconds))
    return fastest[0], fastest[1]


def operations(crystal: Crystal, hkl: IntArray) -> NDArray[np.int64]:
    """(3,) floating-point operations: sums; exponentials of each point; of each distinct |q|.

    Sums: 8 an atom and point (a complex product and sum), 8 an atom and column (h, k) of points, 6
    a species and point (F and its bound), 28 a point (q, s², |F|²). Exponentials: 4 Gaussians a
    species, 32 for the power of e and 3 for its width, its amplitude and the sum.
    """
    atoms, species, points = len(crystal.species), len(set(crystal.species)), len(hkl)
    columns = len(np.unique(hkl[:, :2], axis=0))
    squared = np.sort(((hkl @ np.linalg.inv(crystal.lattice).T) ** 2).sum(axis=1))
    distinct = 1 + int((np.diff(squared) > 1e-9 * squared[1:]).sum())
    sums = 8 * atoms * (points + columns) + 6 * species * points + 28 * points
    return np.array([sums, 4 * 35 * species * points, 4 * 35 * species * distinct])
