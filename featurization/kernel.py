"""The sum over atoms, compiled by Numba: what NumPy would spend on arrays and calls.

Plain arithmetic in double precision without `fastmath`: equal input gives equal bits. Arrays must
be contiguous, since every other layout is compiled anew. Units as in `featurization.cloud`.

The compiled code is kept beside this file (or where NUMBA_CACHE_DIR says), as `.pyc` files are;
where no folder can be written, each process compiles it again. It is taken from there as long as
the file of the function is unchanged: a compiled function calls only those of its own file.
"""

import math
from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from featurization.crystal import FloatArray, IntArray

GAUSSIANS = 5
# Numbers that describe one species' scattering: constant, slope, amplitudes, widths.
COEFFICIENTS = 2 + 2 * GAUSSIANS

ComplexArray = NDArray[np.complex128]
Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile at the first call; with a cache, if there is a folder for one."""
    try:
        made = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # Numba found no folder that it may write to
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, made)


@compiled
def reciprocal_cell(lattice: FloatArray) -> tuple[FloatArray, float, float]:
    """Rows a*, b*, c* (1/Å, no 2π), volume (Å³) and longest edge (Å) of rows a, b, c (Å)."""
    reciprocal = np.empty((3, 3))
    volume = longest = 0.0
    for i in range(3):
        b, c = lattice[(i + 1) % 3], lattice[(i + 2) % 3]
        for x in range(3):
            y, z = (x + 1) % 3, (x + 2) % 3
            reciprocal[i, x] = b[y] * c[z] - b[z] * c[y]
            volume += lattice[i, x] * reciprocal[i, x] / 3.0
        longest = max(longest, b[0] ** 2 + b[1] ** 2 + b[2] ** 2)
    for i in range(3):
        for x in range(3):
            reciprocal[i, x] /= volume
    return reciprocal, abs(volume), math.sqrt(longest)


# --- scattering of one atom -------------------------------------------------------------------

_LOG2_E = 1.0 / math.log(2.0)
# ln 2 in two parts, of which the first has few enough digits that n × it is exact.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# Added and taken away again, this rounds to an integer, which stays in the last bits meanwhile.
_ROUND = 1.5 * 2.0**52
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12 = (
    1.0 / math.factorial(n) for n in range(2, 13)
)


@compiled
def exponential(x: float) -> float:
    """eˣ for x ≤ 0 to 5e-16, with −700 in place of anything below.

    2ⁿ times the Taylor series of the rest. Several times as fast as the C library's, for without
    a call and a branch the compiler takes several x at once.
    """
    x = x if x > -700.0 else -700.0
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = r * _C12 + _C11
    y = y * r + _C10
    y = y * r + _C9
    y = y * r + _C8
    y = y * r + _C7
    y = y * r + _C6
    y = y * r + _C5
    y = y * r + _C4
    y = y * r + _C3
    y = y * r + _C2
    y = (y * r + 1.0) * r + 1.0
    bits = np.int64((np.float64(shifted).view(np.int64) + 1023) << 52)
    power: float = bits.view(np.float64)
    return y * power


@compiled
def form_factor(coefficients: FloatArray, s2: FloatArray, f: FloatArray) -> None:
    """Fill f with constant + (s² if slope else 1) Σ amplitude exp(−width s²); all (P,)."""
    slope = coefficients[1]
    for p in range(len(s2)):
        f[p] = 0.0
    for g in range(GAUSSIANS):
        amplitude, width = coefficients[2 + g], coefficients[2 + GAUSSIANS + g]
        if amplitude != 0.0:
            for p in range(len(s2)):
                f[p] += amplitude * exponential(-width * s2[p])
    for p in range(len(s2)):
        f[p] = coefficients[0] + (1.0 - slope + slope * s2[p]) * f[p]


# --- the sum over atoms -----------------------------------------------------------------------


@compiled
def _phases(x: float, phase: ComplexArray) -> None:
    """Fill with exp(2πi n x) for n = −m … m; (2m + 1,)."""
    m = len(phase) // 2
    angle = 2.0 * math.pi * (x - np.rint(x))
    step = complex(math.cos(angle), math.sin(angle))
    phase[m] = 1.0
    for n in range(1, m + 1):
        phase[m + n] = phase[m + n - 1] * step
        phase[m - n] = phase[m + n].conjugate()


@compiled
def structure_factors(
    hkl: IntArray,
    s2: FloatArray,
    positions: FloatArray,
    occupancy: FloatArray,
    kind: IntArray,
    table: FloatArray,
    b_iso: float,
) -> tuple[ComplexArray, FloatArray]:
    """F and its bound for R radiations at once.

    Args:
        hkl: (P, 3), |hkl| small enough for tables of 2 max|h| + 1 numbers.
        s2: (P,) s² = |q|²/4.
        positions, occupancy: (A, 3) and (A,).
        kind: (A,) row of each scatterer in `table`.
        table: (R, S, COEFFICIENTS) of `form_factor`.
        b_iso: B in Å².

    Returns:
        (R, P) F = Σ_j o_j f_j T_j exp(2πi h·x_j), and (R, P) Σ_j o_j |f_j| T_j.
    """
    points, radiations = len(hkl), len(table)
    reach = np.zeros(3, dtype=np.int64)
    for p in range(points):
        for x in range(3):
            reach[x] = max(reach[x], abs(hkl[p, x]))
    h_phase = np.empty(2 * reach[0] + 1, dtype=np.complex128)
    k_phase = np.empty(2 * reach[1] + 1, dtype=np.complex128)
    l_phase = np.empty(2 * reach[2] + 1, dtype=np.complex128)
    # Places in these tables; unsigned, since an index that may be negative costs a branch.
    h_at, k_at = np.empty(points, dtype=np.uint64), np.empty(points, dtype=np.uint64)
    l_at, column_at = np.empty(points, dtype=np.uint64), np.empty(points, dtype=np.uint64)
    columns = 0
    for p in range(points):
        if p == 0 or hkl[p, 0] != hkl[p - 1, 0] or hkl[p, 1] != hkl[p - 1, 1]:
            h_at[columns], k_at[columns] = hkl[p, 0] + reach[0], hkl[p, 1] + reach[1]
            columns += 1
        l_at[p], column_at[p] = hkl[p, 2] + reach[2], columns - 1
    column = np.empty(columns, dtype=np.complex128)
    unit, one = np.empty(points, dtype=np.complex128), np.empty(points)
    f = np.zeros((radiations, points), dtype=np.complex128)
    bound = np.zeros((radiations, points))
    for s in range(table.shape[1]):
        amount = 0.0
        for j in range(len(kind)):
            if kind[j] != s:
                continue
            if amount == 0.0:
                for p in range(points):
                    unit[p] = 0.0
            amount += occupancy[j]
            _phases(positions[j, 0], h_phase)
            _phases(positions[j, 1], k_phase)
            _phases(positions[j, 2], l_phase)
            for n in range(columns):
                column[n] = occupancy[j] * (h_phase[h_at[n]] * k_phase[k_at[n]])
            for p in range(points):
                unit[p] += column[column_at[p]] * l_phase[l_at[p]]
        if amount == 0.0:
            continue
        for r in range(radiations):
            form_factor(table[r, s], s2, one)
            for p in range(points):
                f[r, p] += one[p] * unit[p]
                bound[r, p] += amount * abs(one[p])
    if b_iso > 0.0:
        for p in range(points):
            damping = exponential(-b_iso * s2[p])
            for r in range(radiations):
                f[r, p] *= damping
                bound[r, p] *= damping
    return f, bound


@compiled
def lengths(hkl: IntArray, reciprocal: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(P, 3) q in 1/Å and (P,) s² = |q|²/4."""
    q, s2 = np.empty((len(hkl), 3)), np.empty(len(hkl))
    for p in range(len(hkl)):
        squared = 0.0
        for x in range(3):
            component = 0.0
            for i in range(3):
                component += hkl[p, i] * reciprocal[i, x]
            q[p, x] = component
            squared += component * component
        s2[p] = 0.25 * squared
    return q, s2


@compiled
def cloud(
    hkl: IntArray,
    reciprocal: FloatArray,
    volume: float,
    positions: FloatArray,
    occupancy: FloatArray,
    kind: IntArray,
    table: FloatArray,
    b_iso: float,
    tolerance: float,
    drop: bool,
) -> tuple[
    NDArray[np.int16], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8], float, float
]:
    """The fields of a cloud, of which intensity is (R, P); the largest |q|; the sum of intensity.

    A point whose |F|² is at most `tolerance` × bound² has intensity 0 and, if it is so for all
    radiations, leaves the cloud where `drop` is set. The other arguments are those of
    `structure_factors`.
    """
    q, s2 = lengths(hkl, reciprocal)
    f, bound = structure_factors(hkl, s2, positions, occupancy, kind, table, b_iso)
    radiations, points = f.shape
    intensity = np.empty((radiations, points), dtype=np.float32)
    kept = np.empty(points, dtype=np.uint64)
    count, farthest, total = 0, 0.0, 0.0
    for p in range(points):
        present = not drop
        for r in range(radiations):
            squared = f[r, p].real ** 2 + f[r, p].imag ** 2
            absent = squared <= tolerance * bound[r, p] ** 2
            intensity[r, p] = 0.0 if absent else squared / volume**2
            total += intensity[r, p]
            present = present or not absent
        farthest = max(farthest, s2[p])
        if present:
            kept[count] = p
            count += 1
    hkl_kept, q_kept = np.empty((count, 3), dtype=np.int16), np.empty((count, 3), dtype=np.float32)
    intensity_kept = np.empty((radiations, count), dtype=np.float32)
    multiplicity = np.empty(count, dtype=np.uint8)
    for n in range(count):
        p = kept[n]
        for x in range(3):
            hkl_kept[n, x], q_kept[n, x] = hkl[p, x], q[p, x]
        for r in range(radiations):
            intensity_kept[r, n] = intensity[r, p]
        multiplicity[n] = 1 if hkl[p, 0] == 0 and hkl[p, 1] == 0 and hkl[p, 2] == 0 else 2
    return hkl_kept, q_kept, intensity_kept, multiplicity, 2.0 * math.sqrt(farthest), total
