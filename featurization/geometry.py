"""Which atoms of a periodic structure are closer to each other than they can be."""

import math

import numpy as np

from featurization.crystal import FloatArray, IntArray, Reject

# Pairs of one block of the distance search; bounds memory at a few tens of MiB.
_BLOCK = 1 << 20
# Images that the search may need before the cell is called too skewed; a sane cell needs one.
_MAX_IMAGES = 2000
# Up to so many atoms all pairs at once are faster than sifting them first.
_SMALL = 48
_NO_PAIR = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))


def cell_volume(lattice: FloatArray) -> float:
    """|a · (b × c)| in Å³ of (3, 3) rows."""
    # Plain floats: for one 3 × 3 matrix ten times faster than numpy.linalg, and no warnings.
    a, (bx, by, bz), (cx, cy, cz) = lattice.tolist()
    volume: float = (
        a[0] * (by * cz - bz * cy) + a[1] * (bz * cx - bx * cz) + a[2] * (bx * cy - by * cx)
    )
    return abs(volume)


def close_pairs(
    lattice: FloatArray, positions: FloatArray, cutoff: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """All pairs of atoms (periodic images included) closer than `cutoff`.

    A difference with fractional component f_k is at least |f_k| / |b_k| long, where 1/|b_k| is
    the spacing of the lattice planes of axis k. Differences wrapped to −½ … ½ therefore need no
    further images along an axis whose planes are more than 2 × cutoff apart, which makes this
    exact for every cell and fast for almost every one.

    Args:
        lattice: (3, 3) rows in Å, volume not 0.
        positions: (A, 3) fractional, A > 0.
        cutoff: in Å.

    Returns:
        First atoms i, second atoms j and distances in Å; i < j, or i = j = 0 for an atom and its
        own image. A pair occurs once for each of its images within the cutoff.

    Raises:
        Reject: the cell is so skewed that the search would need thousands of images.
    """
    reach = _reach(lattice, cutoff)
    images = _images(reach)
    if len(images) == 1 and len(positions) <= _SMALL and not _any_pair(lattice, positions, cutoff):
        return _NO_PAIR
    first, second = _near_along_one_axis(positions, reach)
    delta = positions[first] - positions[second]
    delta -= np.rint(delta)
    if len(images) > 1:
        lengths = np.linalg.norm(images @ lattice, axis=1)
        own = lengths[(lengths < cutoff) & images.any(axis=1)]
        parts = [(np.zeros(len(own), dtype=np.int64), np.zeros(len(own), dtype=np.int64), own)]
    else:
        parts = []
    for image in images:
        vector = (delta + image) @ lattice
        squared = np.einsum("pi,pi->p", vector, vector)
        near = np.flatnonzero(squared < cutoff * cutoff)
        if len(near):
            parts.append((first[near], second[near], np.sqrt(squared[near])))
    if not parts:
        return _NO_PAIR
    i, j, distance = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return i, j, distance


def _any_pair(lattice: FloatArray, positions: FloatArray, cutoff: float) -> bool:
    """Whether two different atoms are closer than `cutoff`, looking at wrapped differences only."""
    delta = positions[:, None] - positions
    delta -= np.rint(delta)
    vector = delta.reshape(-1, 3) @ lattice
    squared = np.einsum("pi,pi->p", vector, vector)
    squared[:: len(positions) + 1] = np.inf
    return bool(squared.min() < cutoff * cutoff)


def _reach(lattice: FloatArray, cutoff: float) -> list[float]:
    """cutoff × |b_k| for each axis: the largest |f_k| of a difference within the cutoff."""
    rows = lattice.tolist()
    scale = cutoff / cell_volume(lattice)
    reach = []
    for k in range(3):
        (bx, by, bz), (cx, cy, cz) = rows[(k + 1) % 3], rows[(k + 2) % 3]
        reach.append(scale * math.hypot(by * cz - bz * cy, bz * cx - bx * cz, bx * cy - by * cx))
    return reach


def _images(reach: list[float]) -> FloatArray:
    """(M, 3) lattice translations that a wrapped difference may need."""
    if max(reach) < 0.5:
        return np.zeros((1, 3))
    counts = [math.floor(r + 0.5) for r in reach]
    if math.prod(2 * n + 1 for n in counts) > _MAX_IMAGES:
        raise Reject("structure", "lattice planes are too close together: cell too skewed or thin")
    axes = [np.arange(-n, n + 1.0) for n in counts]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _near_along_one_axis(positions: FloatArray, reach: list[float]) -> tuple[IntArray, IntArray]:
    """Pairs i < j that are within reach along the axis that separates best."""
    limit = min(reach)
    u = np.ascontiguousarray(positions[:, reach.index(limit)])
    first, second = [], []
    step = max(1, _BLOCK // len(u))
    for start in range(0, len(u), step):
        delta = u[start : start + step, None] - u[None, start:]
        delta -= np.rint(delta)
        i, j = np.nonzero(np.abs(delta) <= limit)
        upper = i < j
        first.append(i[upper] + start)
        second.append(j[upper] + start)
    return np.concatenate(first), np.concatenate(second)
