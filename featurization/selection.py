"""Which points of the reciprocal lattice a cloud holds: a box of Miller indices, or a sphere.

Of each pair ±hkl one is held, l > 0, or l = 0 and k > 0, or l = k = 0 ≤ h, and the origin, in
ascending order of h, then k, then l.
"""

import math
from functools import lru_cache

import numpy as np

from featurization.crystal import FloatArray, IntArray, Reject
from featurization.kernel import compiled

# The largest that a cloud can hold.
MOST_INDEX = int(np.iinfo(np.int16).max)
# Columns (h, k) that a sphere may have before the cell is called too skewed: under a second.
_MOST_COLUMNS = 20_000_000


@lru_cache(maxsize=8)
def miller_half(limit: int) -> IntArray:
    """One of each pair ±hkl and the origin, in the order of `sphere_half`."""
    side = np.arange(-limit, limit + 1)
    hkl = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
    h, k, l = hkl.T  # noqa: E741
    half: IntArray = hkl[(l > 0) | ((l == 0) & ((k > 0) | ((k == 0) & (h >= 0))))]
    return half


def sphere_half(
    lattice: FloatArray, volume: float, longest: float, q_max: float, max_points: int
) -> IntArray:
    """One of each pair ±hkl with |q| ≤ q_max (1/Å), and the origin.

    Args:
        lattice: (3, 3), rows a, b, c in Å.
        volume, longest: cell volume (Å³) and longest edge (Å).

    Memory is 24 bytes a point that a cloud may have, however skewed the cell.

    Raises:
        Reject: more points than `max_points`, or a cell so skewed that finding them is costly.
    """
    expected = 2.0 / 3.0 * math.pi * q_max**3 * volume
    if expected > 2 * max_points + 1000:
        raise Reject("diffraction", f"about {expected:.3g} points exceed max_points = {max_points}")
    # The relative margin keeps points that lie on the sphere, whatever the rounding of the cell
    # they are written in. h = q·a, hence |h| ≤ q_max |a|.
    radius = q_max * (1.0 + 1e-9)
    if radius * longest > MOST_INDEX + 1:
        raise Reject("diffraction", f"cell too skewed: edge of {longest:.3g} Å; use cell = niggli")
    room = min(int(1.2 * expected) + 200, max_points)
    hkl, found, columns = _sphere(lattice, radius, room, _MOST_COLUMNS)
    if columns > _MOST_COLUMNS:
        reason = f"cell too skewed: over {_MOST_COLUMNS} columns of points; use cell = niggli"
        raise Reject("diffraction", reason)
    if found > max_points:
        raise Reject("diffraction", f"{found} points exceed max_points = {max_points}")
    if found > len(hkl):
        hkl, _, _ = _sphere(lattice, radius, found, _MOST_COLUMNS)
    return hkl[:found]


@compiled
def _interval(centre: float, squared: float) -> tuple[int, int]:
    """Integers within √squared of the centre; wider by more than rounding, never narrower."""
    half = math.sqrt(max(squared, 0.0)) + 1e-6
    return math.ceil(centre - half), math.floor(centre + half)


@compiled
def _sphere(
    lattice: FloatArray, radius: float, room: int, most_columns: int
) -> tuple[IntArray, int, int]:
    """One hkl of each pair ±hkl within a sphere, in ascending order of h, then k, then l.

    The half is l > 0, or l = 0 and k > 0, or l = k = 0 ≤ h. For given h the sphere leaves an
    interval of k, for given h and k one of l, so the work grows with the columns (h, k) that the
    sphere's shadow covers: in a skewed cell they can be many more than the points.

    Args:
        lattice: (3, 3), rows a, b, c in Å, no edge above 32767 / radius.
        radius: in 1/Å.
        room: points to store at most.
        most_columns: where to give up.

    Returns:
        (room, 3) hkl, of which the first are filled; the number of points (more than `room` where
        that was too small); and the number of columns (no points where more than `most_columns`).
    """
    # Gram–Schmidt: a = r₀₀ e₀, b = r₀₁ e₀ + r₁₁ e₁, c = r₀₂ e₀ + r₁₂ e₁ + r₂₂ e₂. With h = q·a,
    # k = q·b and l = q·c this gives one component of q in the frame e after the other.
    e, r = lattice.copy(), np.zeros((3, 3))
    for i in range(3):
        for j in range(i):
            for x in range(3):
                r[j, i] += e[j, x] * lattice[i, x]
            for x in range(3):
                e[i, x] -= r[j, i] * e[j, x]
        r[i, i] = math.sqrt(e[i, 0] ** 2 + e[i, 1] ** 2 + e[i, 2] ** 2)
        for x in range(3):
            e[i, x] /= r[i, i]
    squared = radius * radius

    hkl = np.empty((room, 3), dtype=np.int64)
    columns = found = 0
    h_low, h_high = _interval(0.0, squared * r[0, 0] ** 2)
    for h in range(h_low, h_high + 1):
        q0 = h / r[0, 0]
        k_low, k_high = _interval(r[0, 1] * q0, (squared - q0 * q0) * r[1, 1] ** 2)
        columns += max(k_high - k_low + 1, 0)
        if columns > most_columns:
            return hkl, 0, columns
    for h in range(h_low, h_high + 1):
        q0 = h / r[0, 0]
        k_low, k_high = _interval(r[0, 1] * q0, (squared - q0 * q0) * r[1, 1] ** 2)
        for k in range(k_low, k_high + 1):
            q1 = (k - r[0, 1] * q0) / r[1, 1]
            left, centre = squared - q0 * q0 - q1 * q1, r[0, 2] * q0 + r[1, 2] * q1
            l_low, l_high = _interval(centre, left * r[2, 2] ** 2)
            first = 0 if k > 0 or (k == 0 and h >= 0) else 1
            for l in range(max(l_low, first), l_high + 1):  # noqa: E741
                if ((l - centre) / r[2, 2]) ** 2 <= left:
                    if found < room:
                        hkl[found, 0], hkl[found, 1], hkl[found, 2] = h, k, l
                    found += 1
    return hkl, found, columns
