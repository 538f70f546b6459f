"""Diffraction: a crystal → its cloud of Bragg points.

    F(hkl) = Σ_j o_j f_j(|q|) T_j exp(2πi h·x_j),   I = |F|² / V²,   q = h B,   B = (A⁻¹)ᵀ

A has the lattice vectors as rows (Å), so |q| = 1/d in 1/Å without 2π. Friedel's law
I(−q) = I(q) holds by construction (no anomalous scattering), so the cloud holds one point of each
pair ±q with multiplicity 2, and the origin with multiplicity 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from featurization.config import Q_LIMIT, FeaturizationConfig, RadiationName
from featurization.crystal import Crystal, FloatArray, IntArray, Reject
from featurization.radiation import form_factors

# Phases of one block of points × scatterers; bounds memory at 2 × 16 MiB.
_BLOCK = 1 << 21
# Candidate hkl that a sphere's bounding box may hold before the cell is called too skewed.
_BOX_LIMIT = 20_000_000


@dataclass(frozen=True, slots=True)
class Cloud:
    """Half of a centrosymmetric point cloud in reciprocal space."""

    hkl: NDArray[np.int16]  # (P, 3)
    q: NDArray[np.float32]  # (P, 3), 1/Å
    intensity: NDArray[np.float32]  # (P,), |F|²/V²; 0 where absent
    multiplicity: NDArray[np.uint8]  # (P,), 1 at the origin, else 2


def diffraction_cloud(crystal: Crystal, config: FeaturizationConfig) -> Cloud:
    """The cloud of a crystal in the cell that it comes in.

    Raises:
        Reject: a species without a form factor, points beyond the range of the form factors, or
            more points than `config.max_points`.
    """
    reciprocal = np.linalg.inv(crystal.lattice).T.astype(np.float64)
    if config.miller_limit is not None:
        hkl = _miller_half(config.miller_limit)
    else:
        assert config.q_max is not None
        hkl = _sphere_half(crystal, reciprocal, config.q_max, config.max_points)
    if len(hkl) > config.max_points:
        raise Reject("diffraction", f"{len(hkl)} points exceed max_points = {config.max_points}")
    q = hkl @ reciprocal
    farthest = float(np.linalg.norm(q, axis=1).max())
    if config.radiation != "neutron" and farthest > Q_LIMIT * (1.0 + 1e-9):
        reason = f"|q| up to {farthest:.2f} 1/Å; form factors are known to {Q_LIMIT:g} 1/Å"
        raise Reject("diffraction", reason)
    f, bound = structure_factors(crystal, hkl, config.radiation, config.b_iso)
    squared = f.real**2 + f.imag**2
    absent = squared <= config.absence_tolerance * bound**2
    intensity = np.where(absent, 0.0, squared / crystal.volume**2)
    if not np.isfinite(intensity).all():
        raise Reject("diffraction", "intensity is not finite")
    keep = ~absent if config.drops_absences else slice(None)
    return Cloud(
        hkl=hkl[keep].astype(np.int16),
        q=q[keep].astype(np.float32),
        intensity=intensity[keep].astype(np.float32),
        multiplicity=np.where((hkl[keep] == 0).all(axis=1), 1, 2).astype(np.uint8),
    )


def structure_factors(
    crystal: Crystal, hkl: IntArray, radiation: RadiationName, b_iso: float = 0.0
) -> tuple[NDArray[np.complex128], FloatArray]:
    """F(hkl) in the radiation's unit, and the bound Σ_j o_j |f_j| T_j ≥ |F| at each point.

    Args:
        crystal: any cell; B = `b_iso` (Å²) is shared by all atoms, T = exp(−B |q|²/4).
        hkl: (P, 3) Miller indices of that cell.

    Returns:
        (P,) complex128 and (P,) float64. |F| / bound is the unitary structure factor |U|.
    """
    names = sorted(set(crystal.species))
    index = np.array([names.index(name) for name in crystal.species])
    occupancy_AS = np.zeros((len(index), len(names)))
    occupancy_AS[np.arange(len(index)), index] = crystal.occupancy
    q = np.linalg.norm(hkl @ np.linalg.inv(crystal.lattice).T, axis=1)
    f_SP = form_factors(names, q, radiation) * np.exp(-0.25 * b_iso * q * q)
    f = np.empty(len(hkl), dtype=np.complex128)
    step = max(1, _BLOCK // len(index))
    for start in range(0, len(hkl), step):
        part = slice(start, start + step)
        turns = hkl[part] @ crystal.positions.T  # (P, A) phases in turns
        angle = 2.0 * np.pi * (turns - np.rint(turns))
        f[part] = np.einsum("ps,sp->p", np.cos(angle) @ occupancy_AS, f_SP[:, part])
        f[part] += 1j * np.einsum("ps,sp->p", np.sin(angle) @ occupancy_AS, f_SP[:, part])
    return f, occupancy_AS.sum(axis=0) @ np.abs(f_SP)


def _half(grid: IntArray) -> IntArray:
    """One of each pair ±hkl, and the origin: l > 0, or l = 0 and k > 0, or l = k = 0 ≤ h."""
    h, k, l = grid.T  # noqa: E741
    half: IntArray = grid[(l > 0) | ((l == 0) & ((k > 0) | ((k == 0) & (h >= 0))))]
    return half


def _box(limits: IntArray) -> IntArray:
    axes = [np.arange(-limits[0], limits[0] + 1), np.arange(-limits[1], limits[1] + 1)]
    axes.append(np.arange(0, limits[2] + 1))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


@lru_cache(maxsize=8)
def _miller_half(limit: int) -> IntArray:
    return _half(_box(np.array([limit, limit, limit])))


def _sphere_half(
    crystal: Crystal, reciprocal: FloatArray, q_max: float, max_points: int
) -> IntArray:
    # h = q·a, hence |h| ≤ q_max |a|. The relative margin keeps points that lie on the sphere,
    # whatever the rounding of the cell they are written in.
    margin = 1.0 + 1e-9
    expected = 2.0 / 3.0 * np.pi * q_max**3 * crystal.volume
    if expected > 2 * max_points + 1000:
        raise Reject("diffraction", f"about {expected:.3g} points exceed max_points = {max_points}")
    limits = np.floor(q_max * margin * np.linalg.norm(crystal.lattice, axis=1)).astype(np.int64)
    size = int(limits[2] + 1) * int(2 * limits[0] + 1) * int(2 * limits[1] + 1)
    if size > _BOX_LIMIT or limits.max() > np.iinfo(np.int16).max:
        raise Reject("diffraction", f"cell too skewed: {size} candidate points; use cell = niggli")
    hkl = _half(_box(limits))
    q = hkl @ reciprocal
    inside: IntArray = hkl[np.einsum("pi,pi->p", q, q) <= (q_max * margin) ** 2]
    return inside
