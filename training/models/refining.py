"""Atoms of a cell, fitted to the intensities: places and electrons, by Gauss and Newton's steps.

A crystal's computed pattern has no noise, so that the right atoms reproduce it to rounding, and
others hardly ever do: of those with R < `SOLVED` 99.7 % are right. Up to `LIKELY` most atoms are,
but light ones are missing, or elements exchanged that are much alike.

Shape legend, besides that of `training.dataset`: A atoms of a cell, G nodes of half the reciprocal
lattice within `Q_MAX`, absent reflections among them, K lengths |q| of a table.
"""

from dataclasses import dataclass
from functools import cached_property

import gemmi
import numpy as np
import scipy.fft
from numpy.typing import NDArray

from training.models import kernel
from training.models.peaks import peaks_of
from training.models.wilson import FloatArray

Q_MAX = 1.2  # 1/Å
SOLVED = 0.0005  # Σ||F_o| − |F_c|| / Σ|F_o|; from here to 0.001 a third has wrong elements
LIKELY = 0.05  # what fits worse is nothing
_WINDOW = 0.45  # 1/Å, 1 σ: atoms become blobs that do not ripple into their neighbours
_HEAVIEST = 97
_CYCLES, _STEPS = 3, 7  # of adding and dropping atoms; of Gauss and Newton in each
_MERGED, _APART = 0.75, 0.8  # Å
_ADDED = 6  # atoms a cycle
_TINY = 1e-9

_LENGTHS_K = np.linspace(0, Q_MAX, 601)


def _tabulated() -> FloatArray:
    """(98, K) form factors f_Z (International Tables C, 1992), row 0 is nothing."""
    table = np.zeros((_HEAVIEST + 1, len(_LENGTHS_K)))
    for number in range(1, _HEAVIEST + 1):
        fit = gemmi.Element(number).it92
        table[number] = [fit.calculate_sf(q * q / 4) for q in _LENGTHS_K]
    return table


_FACTORS = _tabulated()
# Height in the windowed map by atomic number.
_HEIGHTS = (
    _FACTORS * (np.exp(-0.5 * (_LENGTHS_K / _WINDOW) ** 2) * 4 * np.pi * _LENGTHS_K**2)
).sum(axis=1) * _LENGTHS_K[1]


def form_factors(length_P: FloatArray) -> FloatArray:
    """(Z, P) f at some |q| up to `Q_MAX`, linear between those of the table: to 3e-5."""
    place_P = (length_P / _LENGTHS_K[1]).clip(0, len(_LENGTHS_K) - 1)
    row_P = np.minimum(place_P.astype(int), len(_LENGTHS_K) - 2)
    least = _FACTORS[:, row_P]
    factors: FloatArray = least + (place_P - row_P) * (_FACTORS[:, row_P + 1] - least)
    return factors


@dataclass(frozen=True, slots=True)
class Atoms:
    """What is in a cell."""

    lattice: FloatArray  # rows, Å
    place_A3: FloatArray  # fractional
    number_A: FloatArray  # atomic numbers; whole at the end
    misfit: float = np.inf  # R, of amplitudes


@dataclass(frozen=True)
class Reflections:
    """A crystal's stored points, indexed."""

    lattice: FloatArray  # rows, Å; reduced
    hkl_P3: NDArray[np.int64]
    amplitude_P: FloatArray  # |F|/V

    @cached_property
    def volume(self) -> float:
        """Å³."""
        return float(abs(np.linalg.det(self.lattice)))

    @cached_property
    def length_P(self) -> FloatArray:
        """|q|, 0 for the origin."""
        answer: FloatArray = np.linalg.norm(self.hkl_P3 @ np.linalg.inv(self.lattice).T, axis=1)
        return answer

    @cached_property
    def electrons(self) -> float:
        """Of a cell, V √I(0); infinite where the origin is missing."""
        origin = self.amplitude_P[self.length_P == 0]
        return float(origin[0]) * self.volume if len(origin) else np.inf

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Points along each edge that hold all reflections."""
        most = 2 * np.abs(self.hkl_P3).max(axis=0) + 2
        x, y, z = (scipy.fft.next_fast_len(max(int(m), 4), real=True) for m in most)
        return x, y, z

    def on_grid(
        self, value_P: NDArray[np.float64], grid: tuple[int, int, int] | None = None
    ) -> FloatArray:
        """(X, Y, Z) values at the points and their mates, 0 elsewhere."""
        whole = np.zeros(grid or self.grid)
        for sign in (1, -1):
            whole[tuple((sign * self.hkl_P3 % np.array(whole.shape)).T)] = value_P
        return whole

    def synthesis(self, factor_P: NDArray[np.complex128], grid: tuple[int, int, int]) -> FloatArray:
        """(X, Y, Z) the map of some structure factors over V, under a window."""
        window_P = np.exp(-0.5 * (self.length_P / _WINDOW) ** 2)
        whole = np.zeros(grid, dtype=np.complex128)
        size = np.array(grid)
        whole[tuple((-self.hkl_P3 % size).T)] = (factor_P * window_P).conj()
        whole[tuple((self.hkl_P3 % size).T)] = factor_P * window_P
        density: FloatArray = scipy.fft.ifftn(whole, norm="forward").real
        return density

    @cached_property
    def factors_ZP(self) -> FloatArray:
        """Form factors at the stored points, in electrons."""
        return form_factors(self.length_P)

    @cached_property
    def nodes(self) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
        """(G, 3) indices, (Z, G) form factors, (G,) |F|, 0 where nothing is stored."""
        most = np.floor(Q_MAX * np.linalg.norm(self.lattice, axis=1)).astype(int) + 1
        sides = [np.arange(-m, m + 1) for m in most]
        hkl = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
        length = np.linalg.norm(hkl @ np.linalg.inv(self.lattice).T, axis=1)
        there = np.zeros(tuple(2 * most + 1))
        stored = (np.abs(self.hkl_P3) <= most).all(axis=1)
        for sign in (1, -1):
            index = (sign * self.hkl_P3[stored] + most).T
            there[tuple(index)] = self.amplitude_P[stored] * self.volume
        # One of each ±q: the later half of the box, which is in order of the indices.
        half = np.arange(len(hkl)) > len(hkl) // 2
        # A shell that was cut away is not absent: none beyond the last that is stored.
        keep = half & (length <= min(Q_MAX, self.length_P.max(initial=0) * (1 + 1e-9)))
        return hkl[keep], form_factors(length[keep]), there.ravel()[keep]


def placed(
    reflections: Reflections,
    height_N: FloatArray,
    place_N3: FloatArray,
    beside: Atoms | None = None,
) -> Atoms:
    """Peaks of a map as atoms, the highest first, until all electrons are used up.

    Args:
        beside: atoms that are there already; at most 6 are added.
    """
    number_N = np.interp(height_N, _HEIGHTS[1:], np.arange(1, _HEAVIEST + 1))
    places = [] if beside is None else list(beside.place_A3)
    numbers = [] if beside is None else list(beside.number_A)
    most = len(height_N) if beside is None else len(numbers) + _ADDED
    left = max(reflections.electrons - sum(numbers), 1.0)
    for height, place, number in zip(height_N, place_N3, number_N, strict=True):
        if height < 0.45 * _HEIGHTS[1] or left <= 0.5 or len(places) >= most:
            break
        if places:
            apart = place - np.array(places)
            apart -= np.rint(apart)
            if np.linalg.norm(apart @ reflections.lattice, axis=1).min() < _APART:
                continue
        places.append(place)
        numbers.append(number)
        left -= number
    return Atoms(reflections.lattice, np.array(places).reshape(-1, 3), np.array(numbers))


def refined(reflections: Reflections, atoms: Atoms, grid: tuple[int, ...]) -> Atoms | None:
    """The atoms that explain the amplitudes, from some that nearly do; None where R > `LIKELY`.

    Args:
        grid: of the maps in which missing atoms are looked for.
    """
    best: Atoms | None = None
    for cycle in range(_CYCLES):
        if not len(atoms.number_A):
            break
        atoms = _fitted(reflections, atoms, _STEPS)
        if atoms.misfit < LIKELY:
            whole = _settled(reflections, atoms)
            if whole.misfit < (LIKELY if best is None else best.misfit):
                best = whole
            if whole.misfit < SOLVED:
                break
        if cycle < _CYCLES - 1:
            atoms = _with_missing(reflections, _merged(_heavier(atoms, 0.35)), grid)
    return best


def _settled(reflections: Reflections, atoms: Atoms) -> Atoms:
    """Without those that are nothing, with whole numbers of electrons."""
    fewer = _merged(_heavier(atoms, 0.3))
    if not len(fewer.number_A):
        return fewer
    if len(fewer.number_A) < len(atoms.number_A):
        fewer = _fitted(reflections, fewer, 4)
    number_A = np.rint(fewer.number_A).clip(1, _HEAVIEST)
    return _fitted(reflections, Atoms(fewer.lattice, fewer.place_A3, number_A), 3, places_only=True)


def _heavier(atoms: Atoms, least: float) -> Atoms:
    kept = atoms.number_A > least
    return Atoms(atoms.lattice, atoms.place_A3[kept], atoms.number_A[kept])


def _merged(atoms: Atoms) -> Atoms:
    """Those that are too close to one another, as one."""
    if len(atoms.number_A) < 2:
        return atoms
    apart = atoms.place_A3[None] - atoms.place_A3[:, None]
    apart -= np.rint(apart)
    close = np.linalg.norm(apart @ atoms.lattice, axis=2) < _MERGED
    done = np.zeros(len(close), dtype=bool)
    places, numbers = [], []
    for first in np.argsort(-atoms.number_A, kind="stable"):
        if done[first]:
            continue
        own = close[first] & ~done
        done |= own
        numbers.append(atoms.number_A[own].sum())
        share = atoms.number_A[own] / numbers[-1]
        places.append(atoms.place_A3[first] + share @ apart[first][own])
    return Atoms(atoms.lattice, np.array(places), np.array(numbers))


def _with_missing(reflections: Reflections, atoms: Atoms, grid: tuple[int, ...]) -> Atoms:
    if not len(atoms.number_A):
        return atoms
    real, imaginary, _ = kernel.waves(
        reflections.hkl_P3, atoms.place_A3, atoms.number_A, reflections.factors_ZP
    )
    computed = (real + 1j * imaginary) / reflections.volume
    size = np.maximum(np.abs(computed), _TINY)
    rest = np.asarray((reflections.amplitude_P - size) * computed / size, dtype=np.complex128)
    heights, places = peaks_of(reflections.synthesis(rest, (grid[0], grid[1], grid[2])), 30)
    # Where the phases are those of the others, a missing atom shows half of its height.
    return placed(reflections, 2 * heights, places, atoms)


def _fitted(
    reflections: Reflections, atoms: Atoms, steps: int, *, places_only: bool = False
) -> Atoms:
    """Those of the step that fits best."""
    hkl_G3, factors_ZG, size_G = reflections.nodes
    node_3G = hkl_G3.T.astype(np.float32, order="C")
    place, number = atoms.place_A3, atoms.number_A
    best = atoms
    for step in range(steps + 1):
        real, imaginary, part_A4G = kernel.waves(hkl_G3, place, number, factors_ZG)
        computed = np.hypot(real, imaginary) + _TINY
        misfit = float(np.abs(size_G - computed).sum() / max(size_G.sum(), _TINY))
        if misfit < best.misfit:
            best = Atoms(atoms.lattice, place, number, misfit)
        if step == steps or misfit < 2e-5:
            break
        u, v = (real / computed).astype(np.float32), (imaginary / computed).astype(np.float32)
        jacobian_JG = kernel.derivatives(node_3G, u, v, part_A4G, 3 if places_only else 4)
        change = _least_squares(jacobian_JG, (size_G - computed).astype(np.float32))
        change = change.reshape(-1, len(number))
        place = place + change[:3].T.clip(-0.06, 0.06)
        if not places_only:
            number = (number + change[3].clip(-8, 8)).clip(0, _HEAVIEST + 0.9)
    return best


def _least_squares(
    jacobian_JG: NDArray[np.float32], residual_G: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Slightly damped, of many by conjugate gradients; brings unknowns to one scale, in place."""
    size = np.sqrt(np.einsum("jg,jg->j", jacobian_JG, jacobian_JG))
    size += np.float32(1e-6) * np.sqrt((size**2).sum()) + np.float32(_TINY)
    jacobian_JG /= size[:, None]
    towards = jacobian_JG @ residual_G
    if len(size) <= 64:
        normal = (jacobian_JG @ jacobian_JG.T).astype(np.float64)
        answer = np.linalg.solve(normal + 1e-4 * np.eye(len(size)), towards.astype(np.float64))
        return np.asarray(answer / size)
    answer, direction, square = np.zeros_like(towards), towards, float(towards @ towards)
    left = residual_G.copy()
    first = square
    for _ in range(12):
        image = direction @ jacobian_JG
        along = np.float32(square / float(image @ image + 1e-4 * (direction @ direction) + 1e-30))
        answer = answer + along * direction
        left -= along * image
        towards = jacobian_JG @ left - np.float32(1e-4) * answer
        before, square = square, float(towards @ towards)
        if square <= 1e-10 * first:
            break
        direction = towards + np.float32(square / before) * direction
    return np.asarray(answer / size, dtype=np.float64)
