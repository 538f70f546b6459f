"""Points of a cloud → the atoms of its cell: the structure is solved, as a crystallographer does.

Charge flipping (Oszlányi and Sütő, Acta Cryst. A 60, 134 (2004)) on normalized structure factors
finds phases. It starts from Patterson superpositions (Buerger 1959), which place nearly all atoms
of a small cell at once, and from random phases. Peaks of the electron density are atoms; `refining`
fits their places and electrons to the intensities. Nothing but the points is read; what a cell
holds is believed only where it reproduces them (`refining.SOLVED`).

Shape legend, besides that of `training.dataset`: A atoms of a cell, S starts, X × Y × Z a grid.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from training.models.peaks import maxima, peaks_of
from training.models.refining import SOLVED, Atoms, Reflections, placed, refined
from training.models.wilson import FloatArray

Grid = tuple[int, int, int]

MOST_POINTS = 2500  # stored; larger cells take a second and more
# Flips, random starts and best starts tried: few first, many for what is left.
_ATTEMPTS = ((40, 4, 2), (80, 12, 4))
_SUPERPOSED = 6
_RESOLUTION = 0.22  # Å, of the map whose peaks are atoms
_SHARP, _SOFT = 0.9, 0.6  # 1/Å; the window of E, that of `wilson`'s curve
_CLOSE = 1.0  # Å; nearer to its origin the Patterson function shows no distance
_POSITIVE = 0.6  # of the flips; in the others what is negative is removed instead
_PEAKS = 160
_TINY = 1e-12
_NOWHERE = np.array([0.1379, 0.2803, 0.3941])  # of a cell: on no element of symmetry


@dataclass(frozen=True, slots=True)
class _Phased:
    """What flipping leaves: structure factors on half a grid, the best starts first."""

    factors_SXYZ: NDArray[np.complex64]
    order_S: NDArray[np.int64]


def own_edges(edges: FloatArray, q_P3: FloatArray, weight_P: FloatArray) -> FloatArray:
    """Of all shortest edges of a lattice those that do not depend on how the crystal is turned.

    Several have the same lengths; which is taken is decided by the intensities (`weight_P`), so
    that what is left open is the crystal's own symmetry.
    """
    candidates = _unimodular() @ edges
    candidates = candidates * np.sign(np.linalg.det(candidates))[:, None, None]
    size = (candidates**2).sum(axis=(1, 2))
    candidates = candidates[size < (1 + 1e-4) * size.min()]
    phase = 2 * np.pi * np.einsum("k,nkc,pc->np", _NOWHERE, candidates, q_P3)
    best: FloatArray = candidates[np.argmax(np.cos(phase) @ weight_P)]
    return best


@cache
def _unimodular() -> NDArray[np.int64]:
    """(any, 3, 3) of elements −1, 0, 1 and determinant ±1."""
    every = np.array(list(product((-1, 0, 1), repeat=9))).reshape(-1, 3, 3)
    own: NDArray[np.int64] = every[np.abs(np.rint(np.linalg.det(every))) == 1]
    return own


def solved(reflections: Reflections, own_P: FloatArray) -> Atoms | None:
    """The atoms of the cell, or None where none were found that explain the intensities.

    Args:
        own_P: Σf²/V at each stored point, in e²/Å³ (`wilson`).
    """
    random = np.random.default_rng(0)
    best: Atoms | None = None
    for flips, starts, tries in _ATTEMPTS:
        phased = _flipped(reflections, own_P, flips, starts, random)
        for start in phased.order_S[:tries]:
            peaks = _density(reflections, phased.factors_SXYZ[start])
            heights, places = peaks_of(peaks, _PEAKS)
            found = refined(reflections, placed(reflections, heights, places), peaks.shape)
            if found is not None and (best is None or found.misfit < best.misfit):
                best = found
            if best is not None and best.misfit < SOLVED:
                return best
    return best


def _flipped(
    reflections: Reflections,
    own_P: FloatArray,
    flips: int,
    starts: int,
    random: np.random.Generator,
) -> _Phased:
    grid = reflections.grid
    # A flipping that begins a little otherwise ends elsewhere: orientations must begin alike.
    length_P = _coarse(reflections.length_P)
    window_P = np.exp(-0.5 * (length_P / _SHARP) ** 2)
    square_P = _coarse(reflections.amplitude_P**2 / np.maximum(own_P * reflections.volume, _TINY))
    inside_P = length_P > 0
    whole = reflections.on_grid(np.where(inside_P, np.sqrt(square_P) * window_P, 0.0))
    half = whole[:, :, : grid[2] // 2 + 1].astype(np.float32)
    there = reflections.on_grid(inside_P.astype(float))[:, :, : grid[2] // 2 + 1] > 0
    squares = reflections.on_grid(np.where(inside_P, (square_P - 1) * window_P**2, 0.0))
    patterson = scipy.fft.ifftn(squares).real.astype(np.float32)
    maps = [patterson]
    for shift in _shifts(reflections, patterson):
        maps.append(np.minimum(patterson, np.roll(patterson, shift, (0, 1, 2))))
    turns = np.exp(2j * np.pi * random.random((starts, *half.shape))) * half
    drawn = scipy.fft.irfftn(turns, s=grid, axes=(1, 2, 3)).astype(np.float32)
    density = np.concatenate([np.stack(maps), drawn])
    for flip in range(flips):
        limit = density.std(axis=(1, 2, 3), keepdims=True)
        kept = (density >= limit).astype(np.float32)
        if flip < _POSITIVE * flips:
            kept = 2 * kept - 1
        factors = scipy.fft.rfftn(density * kept, axes=(1, 2, 3))
        size = np.abs(factors)
        if flip < flips - 1:
            factors *= half / np.maximum(size, _TINY)
            density = scipy.fft.irfftn(factors, s=grid, axes=(1, 2, 3))
    ours, theirs = size[:, there], half[there]
    scale = (ours * theirs).sum(axis=1) / np.maximum((ours * ours).sum(axis=1), _TINY)
    misfit = np.abs(scale[:, None] * ours - theirs).sum(axis=1)
    return _Phased(factors, np.argsort(misfit, kind="stable"))


def _coarse(values: FloatArray) -> FloatArray:
    """To 10 bits, which differences of rounding seldom change."""
    mantissa, exponent = np.frexp(values)
    answer: FloatArray = np.ldexp(np.rint(mantissa * 1024) / 1024, exponent)
    return answer


def _shifts(reflections: Reflections, patterson: NDArray[np.float32]) -> list[Grid]:
    """Where the highest peaks of the Patterson function are, one of each ±."""
    index = maxima(patterson)[:40]
    place = index / np.array(patterson.shape)
    vector = (place - np.rint(place)) @ reflections.lattice
    found: list[int] = []
    for number in np.flatnonzero(np.linalg.norm(vector, axis=1) > _CLOSE):
        sums = place[number] + place[found]
        if not (np.abs(sums - np.rint(sums)) < 1e-6).all(axis=1).any():
            found.append(int(number))
        if len(found) == _SUPERPOSED:
            break
    return [(int(x), int(y), int(z)) for x, y, z in index[found]]


def _density(reflections: Reflections, factors_XYZ: NDArray[np.complex64]) -> FloatArray:
    """Electrons per Å³ under `refining.window`, of the measured amplitudes and the found phases."""
    index = tuple((reflections.hkl_P3 % np.array(reflections.grid)).T)
    mate = tuple((-reflections.hkl_P3 % np.array(reflections.grid)).T)
    last = factors_XYZ.shape[2]
    # Half the grid holds one of each ±q.
    direct = index[2] < last
    value_P = np.where(
        direct,
        factors_XYZ[index[0], index[1], np.minimum(index[2], last - 1)],
        factors_XYZ[mate[0], mate[1], np.minimum(mate[2], last - 1)].conj(),
    )
    phase_P = value_P / np.maximum(np.abs(value_P), _TINY)
    phase_P = np.where((reflections.length_P > 0) & (np.abs(value_P) > 0), phase_P, 1)
    fine = tuple(
        scipy.fft.next_fast_len(max(int(np.ceil(edge / _RESOLUTION)), points), real=True)
        for edge, points in zip(
            np.linalg.norm(reflections.lattice, axis=1), reflections.grid, strict=True
        )
    )
    return reflections.synthesis(
        (reflections.amplitude_P * phase_P).astype(np.complex128), (fine[0], fine[1], fine[2])
    )
