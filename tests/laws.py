"""The laws that an arm can claim to keep, each as a judge of two sets of clouds."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial import cKDTree

from training.dataset import CloudSet

Cloud = tuple[np.ndarray, np.ndarray]  # (P, 3) q in 1/Å and (P,) I, both mates


def whole(data: CloudSet) -> list[Cloud]:
    """Each crystal's points, both mates."""
    batch = data.batch(torch.arange(len(data)))
    ends = batch.lengths_B.cumsum(0)[:-1].tolist()
    return list(
        zip(
            np.split(batch.q_P3.double().numpy(), ends),
            np.split(batch.intensity_P.double().numpy(), ends),
            strict=True,
        )
    )


def _lengths(before: Cloud, after: Cloud) -> bool:
    a, b = (np.sort(np.linalg.norm(q, axis=1)) for q, _ in (before, after))
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-5, atol=1e-6)


def _intensities(before: Cloud, after: Cloud) -> bool:
    a, b = np.sort(before[1]), np.sort(after[1])
    return len(a) == len(b) and bool((a == b).all())


def _density(before: Cloud, after: Cloud) -> bool:
    a, b = (i[(q == 0).all(axis=1)] for q, i in (before, after))
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-6)


def _friedel(before: Cloud, after: Cloud) -> bool:
    q, intensity = after
    rows, mates = (np.column_stack([sign * q + 0.0, intensity]) for sign in (1, -1))
    return bool((rows[np.lexsort(rows.T)] == mates[np.lexsort(mates.T)]).all())


def _powder(before: Cloud, after: Cloud) -> bool:
    (length_a, a), (length_b, b) = _rings(before), _rings(after)
    return len(a) == len(b) and np.allclose(length_a, length_b, 1e-5) and np.allclose(a, b, 1e-4)


def _rings(cloud: Cloud) -> Cloud:
    length = np.linalg.norm(cloud[0], axis=1)
    order = np.argsort(length)
    new = np.diff(length[order], prepend=-1.0) > 1e-5
    total = np.bincount(np.cumsum(new) - 1, cloud[1][order])
    return length[order][new][total > 0], total[total > 0]


JUDGES: dict[str, Callable[[Cloud, Cloud], bool]] = {
    "lengths": _lengths,
    "intensities": _intensities,
    "density": _density,
    "friedel": _friedel,
    "powder": _powder,
}


def absences(data: CloudSet) -> list[set[tuple[int, ...]]]:
    """Of each crystal, which of its points are present."""
    present: list[set[tuple[int, ...]]] = [set() for _ in range(len(data))]
    rows = zip(data.crystal_P, data.hkl_P3.tolist(), data.intensity_P, strict=True)
    for crystal, hkl, intensity in rows:
        if intensity > 0:
            present[crystal].add(max(tuple(hkl), tuple(-x for x in hkl)))
    return present


def is_symmetric(cloud: Cloud, rotations: np.ndarray) -> bool:
    """Whether (R, 3, 3) rotations q → q·R take every point to one of equal intensity."""
    q, intensity = cloud
    if not len(q):
        return True
    # Points that share a place are told apart by their intensity.
    scale = max(intensity[(q != 0).any(axis=1)].max(initial=0), 1e-30)
    tree = cKDTree(np.column_stack([q, intensity / scale]))
    for rotation in rotations:
        distance, place = tree.query(np.column_stack([q @ rotation, intensity / scale]))
        alike = np.allclose(intensity[place], intensity, rtol=3e-3, atol=1e-6 * scale)
        if distance.max() > 5e-3 or not alike or np.abs(q[place] - q @ rotation).max() > 2e-4:
            return False
    return True


def rotations_of(data: CloudSet, most: int) -> list[np.ndarray]:
    """Of each crystal, at most so many Cartesian rotations that leave its whole cloud alone.

    Found by trial: all whole-number matrices of small entries that leave the metric alone.
    """
    side = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 9, indexing="ij"), -1).reshape(-1, 3, 3)
    side = side[np.isclose(np.abs(np.linalg.det(side)), 1)]
    found = []
    for lattice, cloud in zip(data.lattice_N33.double().numpy(), whole(data), strict=True):
        metric = lattice @ lattice.T
        turned = side @ metric @ side.transpose(0, 2, 1)
        close = np.abs(turned - metric).max(axis=(1, 2)) < 1e-4 * metric.max()
        cartesian = np.linalg.inv(lattice) @ side[close] @ lattice
        kept = [r for r in cartesian if is_symmetric(cloud, r[None])]
        step = max(1, len(kept) // most)
        found.append(np.array(kept[::step][:most]))
    return found
