"""Points of a cloud → the reciprocal lattice that they lie on, from their positions alone.

This is indexing as a diffractometer does it: no cell, no Miller index is read. A cloud whose points
lie on no lattice, as when an ablation has turned their directions at random, has none.
"""

import numpy as np
from numpy.typing import NDArray

from featurization.kernel import compiled
from training.dataset import CloudSet

_NEAR = 0.02  # of an edge; points this close to a node of the lattice lie on it
_FLAT = 1e-3  # vectors within this sine of a line or plane do not leave it
_LEAST = 1e-9  # Å⁻³: no crystal has a cell of 10⁹ Å³
_MOST = 64  # each refinement at least halves the cell


def volumes(data: CloudSet) -> NDArray[np.float64]:
    """(N,) volume in Å³ of the cell whose reciprocal lattice the points span; NaN without one."""
    return _found(data.q_P3.double().numpy(), data.offsets.numpy())[0]


def lattices(data: CloudSet) -> NDArray[np.float64]:
    """(N, 3, 3) that cell, short edges as rows in Å, ascending; NaN without one."""
    reciprocal_N33 = _found(data.q_P3.double().numpy(), data.offsets.numpy())[1]
    answer = np.full(reciprocal_N33.shape, np.nan)
    for row in np.flatnonzero(np.isfinite(reciprocal_N33).all(axis=(1, 2))):
        answer[row] = _reduced(np.linalg.inv(reciprocal_N33[row]).T)
    return answer


def _reduced(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same lattice by edges, none of which another, or two others together, can shorten."""
    edges = edges.copy()
    for _ in range(_MOST):
        edges = edges[np.argsort((edges**2).sum(axis=1), kind="stable")]
        changed = False
        for i, j in ((1, 0), (2, 0), (2, 1)):
            if times := np.rint(edges[i] @ edges[j] / (edges[j] @ edges[j])):
                edges[i] -= times * edges[j]
                changed = True
        for one in (1, -1):
            for other in (1, -1):
                diagonal = edges[2] + one * edges[0] + other * edges[1]
                if diagonal @ diagonal < edges[2] @ edges[2] - _LEAST:
                    edges[2] = diagonal
                    changed = True
        if not changed:
            break
    return edges


@compiled
def _found(
    q_P3: NDArray[np.float64], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each crystal: three short vectors, refined until all its points are whole combinations.

    Volumes of the cells and (N, 3, 3) the vectors, 1/Å.
    """
    answer = np.full(len(offsets) - 1, np.nan)
    bases = np.full((len(offsets) - 1, 3, 3), np.nan)
    basis, inverse, cross = np.empty((3, 3)), np.empty((3, 3)), np.empty(3)
    part, rest = np.empty(3), np.empty(3)
    for row in range(len(answer)):
        points = q_P3[offsets[row] : offsets[row + 1]]
        lengths = np.empty(len(points))
        for j in range(len(points)):
            lengths[j] = np.sqrt(points[j, 0] ** 2 + points[j, 1] ** 2 + points[j, 2] ** 2)
        found = 0
        for j in np.argsort(lengths):
            if lengths[j] < 1e-6:  # the origin
                continue
            if found == 2:
                height = abs(
                    cross[0] * points[j, 0] + cross[1] * points[j, 1] + cross[2] * points[j, 2]
                )
                area = np.sqrt(cross[0] ** 2 + cross[1] ** 2 + cross[2] ** 2)
                leaves = height > _FLAT * area * lengths[j]
            elif found == 1:
                for k in range(3):
                    one, two = (k + 1) % 3, (k + 2) % 3
                    cross[k] = basis[0, one] * points[j, two] - basis[0, two] * points[j, one]
                area = np.sqrt(cross[0] ** 2 + cross[1] ** 2 + cross[2] ** 2)
                edge = np.sqrt(basis[0, 0] ** 2 + basis[0, 1] ** 2 + basis[0, 2] ** 2)
                leaves = area > _FLAT * edge * lengths[j]
            else:
                leaves = True
            if leaves:
                basis[found] = points[j]
                found += 1
                if found == 3:
                    break
        if found < 3:
            continue
        for _ in range(_MOST):
            # Columns of the inverse: cross products of two vectors over the volume.
            volume = 0.0
            for k in range(3):
                one, two = (k + 1) % 3, (k + 2) % 3
                for c in range(3):
                    a, b = (c + 1) % 3, (c + 2) % 3
                    inverse[c, k] = basis[one, a] * basis[two, b] - basis[one, b] * basis[two, a]
            for c in range(3):
                volume += basis[0, c] * inverse[c, 0]
            if abs(volume) < _LEAST:
                break
            strayed = -1
            for j in range(len(points)):
                farthest = _NEAR
                for k in range(3):
                    place = 0.0
                    for c in range(3):
                        place += points[j, c] * inverse[c, k]
                    place /= volume
                    part[k] = place - np.rint(place)
                    if abs(part[k]) > farthest:
                        farthest, strayed = abs(part[k]), k
                if strayed >= 0:
                    break
            if strayed < 0:
                answer[row] = 1 / abs(volume)
                bases[row] = basis
                break
            # What is left of the point beside the nearest node makes the cell smaller.
            for c in range(3):
                rest[c] = 0.0
                for k in range(3):
                    rest[c] += part[k] * basis[k, c]
            basis[strayed] = rest
    return answer, bases
