"""Which atoms of a periodic structure are closer to each other than they can be."""

import math

import numpy as np

from featurization.crystal import FloatArray, IntArray, Reject
from featurization.kernel import compiled

# Images that the search may need before the cell is called too skewed; a sane cell needs one.
_MAX_IMAGES = 2000
# Images times pairs (both ways): seconds of searching a large and skewed cell.
_MAX_TRIALS = 2e9
# Pairs that are listed; bounds memory at a few tens of MiB.
_MAX_PAIRS = 1 << 18
_NONE = np.empty(0, dtype=np.int64)
_NOWHERE = np.empty((0, 3))


def close_pairs(
    lattice: FloatArray, positions: FloatArray, cutoff: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """All pairs of atoms (periodic images included) closer than `cutoff`.

    A difference with fractional component f_k is at least |f_k| / |b_k| long, where 1/|b_k| is
    the spacing of the lattice planes of axis k. This leaves an interval of images along each axis,
    nearly always an empty one, which makes the search exact for every cell and fast for most.

    Args:
        lattice: (3, 3) rows in Å, volume not 0.
        positions: (A, 3) fractional, A > 0.
        cutoff: in Å.

    Returns:
        First atoms i, second atoms j and distances in Å; i < j, or i = j = 0 for an atom and its
        own image. A pair occurs once for each of its images within the cutoff.

    Raises:
        Reject: the cell is so skewed that the search would need thousands of images (tens, for
            ten thousand atoms), or more than 262,144 pairs are that close.
    """
    lattice, positions = np.ascontiguousarray(lattice), np.ascontiguousarray(positions)
    found = _search(lattice, positions, cutoff, _NONE, _NONE, _NOWHERE)
    if found < 0:
        raise Reject("structure", "lattice planes are too close together: cell too skewed or thin")
    if found > _MAX_PAIRS:
        raise Reject("structure", f"more than {_MAX_PAIRS} pairs of sites within {cutoff:g} Å")
    if found == 0:
        return _NONE, _NONE, _NOWHERE[:, 0]
    first, second = np.empty(found, dtype=np.int64), np.empty(found, dtype=np.int64)
    delta = np.empty((found, 3))
    _search(lattice, positions, cutoff, first, second, delta)
    vector = delta @ lattice
    return first, second, np.sqrt(np.einsum("pi,pi->p", vector, vector))


@compiled
def within(values: FloatArray, limit: float) -> bool:
    """Whether every |value| of a contiguous array is a number ≤ `limit`."""
    for value in values.flat:  # noqa: SIM110
        if not abs(value) <= limit:
            return False
    return True


@compiled
def inverse(matrix: FloatArray) -> FloatArray:
    """Inverse of a contiguous (3, 3) matrix; of a singular one, infinities and NaN."""
    cofactors = np.empty((3, 3))
    determinant = 0.0
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        for x in range(3):
            y, z = (x + 1) % 3, (x + 2) % 3
            cofactors[x, i] = matrix[j, y] * matrix[k, z] - matrix[j, z] * matrix[k, y]
            determinant += matrix[i, x] * cofactors[x, i] / 3.0
    for i in range(3):
        for x in range(3):
            cofactors[i, x] /= determinant
    return cofactors


@compiled
def motion(
    lattice: FloatArray,
    positions: FloatArray,
    rows: FloatArray,
    shift: FloatArray,
    ideal: FloatArray,
    images: FloatArray,
) -> tuple[float, float]:
    """How far an idealized cell is from the same cell cut out of the crystal as given, in Å.

    All arrays are contiguous.

    Args:
        lattice, positions: (3, 3) rows and (A, 3), the crystal as given.
        rows, shift: (3, 3) and (3,), the cell: its vectors in units of those given, its origin.
        ideal: (3, 3), rows of the cell, idealized and perhaps rotated.
        images: (A, 3), positions in the cell, idealized.

    Returns:
        The largest polar stretch of the lattice, expressed as the motion of the tip of its longest
        vector, and the largest motion of an atom; infinite if a number is not finite.
    """
    selected, longest = _product(rows, lattice), 0.0
    for i in range(3):
        a, b, c = selected[i]
        longest = max(longest, math.sqrt(a * a + b * b + c * c))
    back = inverse(rows)
    farthest = 0.0
    d = np.empty(3)
    for n in range(len(positions)):
        for k in range(3):
            d[k] = -images[n, k]
            for l in range(3):  # noqa: E741
                d[k] += (positions[n, l] - shift[l]) * back[l, k]
            d[k] -= np.rint(d[k])
        squared = _squared_length(d, ideal)
        farthest = max(farthest, squared if squared == squared else math.inf)
    stretch = _stretch(_product(inverse(selected), ideal))
    tip = stretch * longest if stretch < math.inf else math.inf
    return tip, math.sqrt(farthest)


@compiled
def _product(a: FloatArray, b: FloatArray) -> FloatArray:
    product = np.empty((3, 3))
    for i in range(3):
        for x in range(3):
            product[i, x] = a[i, 0] * b[0, x] + a[i, 1] * b[1, x] + a[i, 2] * b[2, x]
    return product


@compiled
def _stretch(m: FloatArray) -> float:
    """max |s − 1| of the singular values s of a (3, 3) matrix, infinite if it is not finite."""
    # Eigenvalues of the symmetric M Mᵀ by the trigonometric solution of the cubic equation.
    e = np.empty((3, 3))
    for i in range(3):
        for k in range(3):
            e[i, k] = m[i, 0] * m[k, 0] + m[i, 1] * m[k, 1] + m[i, 2] * m[k, 2]
    mean = (e[0, 0] + e[1, 1] + e[2, 2]) / 3.0
    spread = 0.0
    for i in range(3):
        e[i, i] -= mean
        for k in range(3):
            spread += e[i, k] * e[i, k] / 6.0
    if not spread < math.inf:
        return math.inf
    spread = math.sqrt(spread)
    cosine = 1.0
    if spread > 0.0:
        determinant = (
            e[0, 0] * (e[1, 1] * e[2, 2] - e[1, 2] * e[1, 2])
            - e[0, 1] * (e[0, 1] * e[2, 2] - e[1, 2] * e[0, 2])
            + e[0, 2] * (e[0, 1] * e[1, 2] - e[1, 1] * e[0, 2])
        )
        cosine = min(1.0, max(-1.0, determinant / (2.0 * spread**3)))
    angle = math.acos(cosine) / 3.0
    largest = 0.0
    for turn in (0.0, 2.0 * math.pi / 3.0):
        eigenvalue = mean + 2.0 * spread * math.cos(angle + turn)
        largest = max(largest, abs(math.sqrt(max(eigenvalue, 0.0)) - 1.0))
    return largest


@compiled
def _squared_length(d: FloatArray, lattice: FloatArray) -> float:
    squared = 0.0
    for k in range(3):
        component = d[0] * lattice[0, k] + d[1] * lattice[1, k] + d[2] * lattice[2, k]
        squared += component * component
    return squared


@compiled
def _search(
    lattice: FloatArray,
    positions: FloatArray,
    cutoff: float,
    first: IntArray,
    second: IntArray,
    delta: FloatArray,
) -> int:
    """Fill in the pairs of `close_pairs` and their fractional differences, as many as there fit.

    Returns:
        The number of pairs, `_MAX_PAIRS` + 1 standing for more; −1 if the cell is too skewed.
    """
    reach, images, x = np.empty(3), 1.0, 0
    reciprocal = inverse(lattice)
    for k in range(3):
        b0, b1, b2 = reciprocal[0, k], reciprocal[1, k], reciprocal[2, k]
        reach[k] = cutoff * math.sqrt(b0 * b0 + b1 * b1 + b2 * b2)
        images *= 2.0 * math.floor(reach[k] + 0.5) + 1.0
        x = k if reach[k] < reach[x] else x
    if not (images <= _MAX_IMAGES and images * len(positions) ** 2 <= _MAX_TRIALS):
        return -1
    y, z = (x + 1) % 3, (x + 2) % 3
    column = np.empty(len(positions))
    for i in range(len(positions)):
        column[i] = positions[i, x]
    d = np.empty(3)
    found = 0
    for i in range(len(positions)):
        for j in range(i + 1 if i else 0, len(positions)):
            u = column[i] - column[j]
            if abs(u - np.rint(u)) > reach[x]:  # the axis that separates best decides nearly all
                continue
            v, w = positions[i, y] - positions[j, y], positions[i, z] - positions[j, z]
            for a in range(math.ceil(-reach[x] - u), math.floor(reach[x] - u) + 1):
                for b in range(math.ceil(-reach[y] - v), math.floor(reach[y] - v) + 1):
                    for c in range(math.ceil(-reach[z] - w), math.floor(reach[z] - w) + 1):
                        d[x], d[y], d[z] = u + a, v + b, w + c
                        itself = i == j and a == 0 and b == 0 and c == 0
                        if itself or _squared_length(d, lattice) >= cutoff * cutoff:
                            continue
                        if found < len(first):
                            first[found], second[found] = i, j
                            for k in range(3):
                                delta[found, k] = d[k]
                        found += 1
                        if found > _MAX_PAIRS:
                            return found
    return found
