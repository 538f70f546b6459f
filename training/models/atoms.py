"""What trees see of a solved structure: its elements, its distances, its bonds.

The atoms are found from the points of the cloud alone (`solving`); what is known of their elements,
by atomic number, is that of `baselines.formula_columns`. One column says how well they explain the
points. Without a solution all is NaN.

Shape legend, besides those of `training.dataset` and `training.models.refining`: B pairs of
neighbours, K properties of an element.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cluster.descendants import end_with_parent
from cluster.errors import RunFailed
from training.dataset import CloudSet
from training.models import baselines, descriptors, wilson
from training.models.indexing import lattices
from training.models.refining import LIKELY, Q_MAX, SOLVED, Atoms, Reflections
from training.models.solving import MOST_POINTS, own_edges, solved
from training.models.steady import steady
from training.models.wilson import FloatArray

_REACH = 6.0  # Å
_BOND, _BOND_STEP = 1.28, 0.06  # of the sum of covalent radii
_NEAREST_STEP = 0.12  # relative to the nearest neighbour
_DIFFERENCES = (
    *("Mendeleev number", "electronegativity", "atomic radius", "melting point", "molar volume"),
    *("row", "group", "valence p", "unfilled d", "valence d", "valence", "unfilled p", "valence s"),
)
_NOTHING = 9.0  # Å, or sums of radii: farther than any neighbour
_BINS, _KNOTS, _SOFT = 240, 25, 0.6  # of the radial profile, of Σf², 1/Å as in `wilson`
_TINY = 1e-9
_DIGITS = 5  # decimals: what is nothing but rounding is 0
_LEAST_STORED = 0.5  # of the nodes within Q_MAX; of 3,000 whole spheres none holds less than 0.6
_STEP = 2.0**-13  # Å, more than rounding changes edges in, less than the amplitudes tell
_SHARE = 128  # crystals that are worth a process
_FIRST_SIGN = np.array([1 << 20, 1 << 10, 1])  # of ±q that is taken whose first index is positive


def description(data: CloudSet) -> NDArray[np.float32]:
    """(N, F): `steady_invariants`, then `contents` of the atoms found, rounded."""
    found_NF = np.round(contents(structures(data)).astype(np.float64), _DIGITS)
    columns = [steady(found_NF[:, [column]]) for column in range(found_NF.shape[1])]
    return np.concatenate([descriptors.steady_invariants(data), *columns], axis=1, dtype=np.float32)


def structures(data: CloudSet) -> list[Atoms | None]:
    """The atoms of each crystal; None where its points do not say which they are.

    As many processes as torch has threads share the work: each crystal is one of its own, and many
    small Fourier transforms leave a thread waiting for the interpreter.
    """
    _, radial = descriptors.profile(data)
    lengths_Q = np.linspace(0, Q_MAX, _KNOTS)
    own_NQ = radial @ wilson.own_scattering(np.linspace(0, Q_MAX, _BINS + 1), lengths_Q)
    solver = _Solver(data, lattices(data), lengths_Q, np.log(np.maximum(own_NQ, _TINY)))
    processes = min(torch.get_num_threads(), len(data) // _SHARE)
    if processes < 2 or sys.platform != "linux":  # elsewhere a fork may not use its matrices
        with _one_thread():
            return [*map(solver, range(len(data)))]
    forked = get_context("fork")  # what the processes share is not sent to them
    with ProcessPoolExecutor(processes, forked, _begin, (solver, os.getpid())) as pool:
        try:
            return [*pool.map(_solve, range(len(data)), chunksize=4)]
        except BrokenProcessPool:
            raise RunFailed(
                "a process that solves structures was killed, likely for want of memory",
                remedy="give it more memory, or fewer OMP_NUM_THREADS; go on with --resume",
            ) from None


@dataclass(frozen=True, slots=True)
class _Solver:
    """A row of a set → its atoms.

    Args:
        log_NQ: log of Σf²/V at some lengths, under the window of `wilson`.
    """

    data: CloudSet
    lattice_N33: FloatArray
    lengths_Q: FloatArray
    log_NQ: FloatArray

    def __call__(self, row: int) -> Atoms | None:
        data, lattice = self.data, self.lattice_N33[row]
        own = slice(int(data.offsets[row]), int(data.offsets[row + 1]))
        if own.stop - own.start > MOST_POINTS or not np.isfinite(lattice).all():
            return None
        q_P3 = data.q_P3[own].numpy().astype(np.float64)
        nodes = 2 / 3 * np.pi * Q_MAX**3 * abs(np.linalg.det(lattice))  # one of each ±q
        if (np.linalg.norm(q_P3, axis=1) <= Q_MAX).sum() < _LEAST_STORED * nodes:
            return None
        intensity_P = data.intensity_P[own].numpy().astype(np.float64)
        edges = own_edges(lattice, q_P3, intensity_P * data.multiplicity_P[own].numpy())
        hkl_P3 = np.rint(q_P3 @ edges.T).astype(np.int64)
        hkl_P3 *= np.where((hkl_P3 @ _FIRST_SIGN) < 0, -1, 1)[:, None]
        order = np.lexsort(hkl_P3.T)
        # The same edges and angles, whatever the orientation.
        turned = np.asarray(np.linalg.cholesky(edges @ edges.T), dtype=np.float64)
        turned = np.round(turned / _STEP) * _STEP
        reflections = Reflections(turned, hkl_P3[order], np.sqrt(intensity_P[order]))
        log_P = np.interp(reflections.length_P, self.lengths_Q, self.log_NQ[row])
        return solved(reflections, np.exp(log_P + 0.5 * (reflections.length_P / _SOFT) ** 2))


def _one_thread() -> threadpool_limits:
    """Matrices of one crystal are so small that threads take longer, beside others far longer."""
    return threadpool_limits(1, "blas")


_solver: _Solver | None = None  # of a forked process


def _begin(solver: _Solver, parent: int) -> None:
    end_with_parent(parent)
    global _solver
    _solver = solver
    _one_thread()


def _solve(row: int) -> Atoms | None:
    assert _solver is not None
    return _solver(row)


def contents(found: list[Atoms | None]) -> NDArray[np.float32]:
    """(N, F) of the atoms of each crystal, NaN where there are none.

    - Geometry and atomic numbers: coordination by radii and by the nearest neighbour, distances,
      their spread, volume an atom, packing, counts of electrons, the commonest elements.
    - Differences of elements' properties between neighbours (Ward et al., PRB 96, 024104 (2017)),
      sums over bonds that go with hardness (Šimůnek and Vackář, PRL 96, 085501 (2006)).
    - `baselines.formula_columns` of the formula found.
    - R of the fit, not less than `refining.SOLVED`, below which nearly all are right.
    """
    known = np.array([number for number, atoms in enumerate(found) if atoms is not None], dtype=int)
    shown = [atoms for atoms in found if atoms is not None]
    rows = np.array([_columns(atoms) for atoms in [*shown, _one_atom()]])[: len(shown)]
    formulas = np.array([*map(_formula, shown), "H"])
    chemistry = baselines.table(baselines.formula_columns(formulas))[: len(shown)]
    misfit = np.array([[atoms.misfit] for atoms in shown]).reshape(-1, 1).clip(SOLVED, LIKELY)
    told = np.concatenate([rows, chemistry, misfit], axis=1)
    answer = np.full((len(found), told.shape[1]), np.nan, dtype=np.float32)
    answer[known] = told
    return answer


def _one_atom() -> Atoms:
    """For the number of columns."""
    return Atoms(3.0 * np.eye(3), np.zeros((1, 3)), np.ones(1))


def _formula(atoms: Atoms) -> str:
    numbers, counts = np.unique(atoms.number_A.astype(int), return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
    return "".join(f"{gemmi.Element(number).name}{count}" for number, count in pairs)


@dataclass(frozen=True, slots=True)
class _Bonds:
    first_B: NDArray[np.int64]
    second_B: NDArray[np.int64]
    vector_B3: FloatArray  # Å
    length_B: FloatArray


def _neighbours(atoms: Atoms) -> _Bonds:
    """All pairs within `_REACH`, each in both directions."""
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.lattice), axis=0)
    sides = [np.arange(-n, n + 1) for n in np.minimum(np.ceil(_REACH / heights), 4).astype(int)]
    cells = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3) @ atoms.lattice
    apart = atoms.place_A3[None] - atoms.place_A3[:, None]
    vector = ((apart - np.rint(apart)) @ atoms.lattice)[:, :, None] + cells
    length = np.linalg.norm(vector, axis=3)
    near = np.nonzero((length < _REACH) & (length > 0.3))
    return _Bonds(near[0], near[1], vector[near], length[near])


def _columns(atoms: Atoms) -> list[float]:
    number = atoms.number_A.astype(int)
    count = len(number)
    volume = abs(float(np.linalg.det(atoms.lattice)))
    bonds = _neighbours(atoms)
    radius = _radii()[number - 1]
    first, second, length = bonds.first_B, bonds.second_B, bonds.length_B
    relative = length / (radius[first] + radius[second])
    closest, nearest = np.full(count, _NOTHING), np.full(count, _NOTHING)
    np.minimum.at(closest, first, relative)
    np.minimum.at(nearest, first, length)
    columns: list[float] = []
    for weight in (
        1 / (1 + np.exp((relative - _BOND) / _BOND_STEP)),
        np.exp(-(relative / closest[first] - 1) / _NEAREST_STEP),
    ):
        columns += _surroundings(number, bonds, relative, weight, volume)
    columns += [*_summary(nearest), *_summary(closest), float(count), volume / count]
    columns += [float((4 / 3 * np.pi * radius**3).sum()) / volume]
    return columns + _elements(number, bonds, volume)


def _surroundings(
    number: NDArray[np.int64],
    bonds: _Bonds,
    relative: FloatArray,
    weight: FloatArray,
    volume: float,
) -> list[float]:
    first, second, length = bonds.first_B, bonds.second_B, bonds.length_B
    count, total = len(number), float(weight.sum()) + _TINY
    coordination = np.bincount(first, weight, count)
    columns = _summary(coordination)
    for value in (length, relative):
        mean = float((weight * value).sum()) / total
        columns += [mean, float(np.sqrt((weight * (value - mean) ** 2).sum() / total))]
    unlike = np.abs(number[first] - number[second])
    columns += [total / 2 / volume, float((weight * (unlike > 0)).sum()) / total]
    direction = bonds.vector_B3 / length[:, None]
    tensor = np.zeros((count, 3, 3))
    outer = direction[:, :, None] * direction[:, None]
    np.add.at(tensor, first, weight[:, None, None] * outer)
    spread = np.linalg.eigvalsh(tensor / (coordination + _TINY)[:, None, None])
    columns += [float((spread[:, 2] - spread[:, 0]).mean()), float(np.ptp(spread, axis=1).max())]
    columns.append(float((weight * unlike).sum()) / total)
    mean_A = np.bincount(first, weight * length, count) / (coordination + _TINY)
    columns += [float(mean_A.min()), float(mean_A.max()), float(mean_A.std())]
    names, table = _properties()
    for name in _DIFFERENCES:
        value = table[number - 1, names.index(name)]
        difference = weight * np.abs(value[first] - value[second])
        columns += _summary(np.bincount(first, difference, count) / (coordination + _TINY))
    electronegativity = table[number - 1, names.index("electronegativity")]
    share = table[number - 1, names.index("valence")] / (coordination + 0.5)
    strength = weight * np.sqrt(share[first] * share[second]) / length
    attraction = np.sqrt(electronegativity[first] * electronegativity[second]) / length
    ionic = np.abs(electronegativity[first] - electronegativity[second])
    for value in (weight * attraction, strength, strength * np.exp(-ionic)):
        columns.append(float(value.sum()) / volume)
    return columns


def _elements(number: NDArray[np.int64], bonds: _Bonds, volume: float) -> list[float]:
    """Atomic numbers, and the least distances between the lightest and the heaviest atoms."""
    kinds, counts = np.unique(number, return_counts=True)
    part = counts / len(number)
    columns = [float(len(kinds)), *_summary(number.astype(np.float64)), float(np.median(number))]
    columns += [float(part.max()), float(-(part * np.log(part)).sum())]
    columns += [number.sum() / volume, float(number.sum() % 2), float(number.sum())]
    columns += _padded(kinds[np.argsort(-counts, kind="stable")], 4)
    columns += [*_padded(np.sort(part)[::-1], 4), *_padded(kinds, 4), *_padded(kinds[::-1], 2)]
    for one, other in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        own = number[bonds.first_B] == kinds[one]
        own &= number[bonds.second_B] == kinds[other]
        columns.append(float(bonds.length_B[own].min(initial=_NOTHING)))
    return columns


def _summary(value: NDArray[Any]) -> list[float]:
    return [float(value.mean()), float(value.std()), float(value.min()), float(value.max())]


def _padded(values: NDArray[np.generic], size: int) -> list[float]:
    return [*map(float, values[:size]), *[float("nan")] * (size - len(values))]


@cache
def _radii() -> FloatArray:
    return np.array([gemmi.Element(number).covalent_r for number in range(1, 98)])


@cache
def _properties() -> tuple[list[str], FloatArray]:
    """As `baselines.properties`, the median where one is unknown."""
    names, values = baselines.properties()
    values = values[:97]
    return names, np.where(np.isnan(values), np.nanmedian(values, axis=0), values)
