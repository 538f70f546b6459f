"""Diffraction: a crystal → its cloud of Bragg points.

    F(hkl) = Σ_j o_j f_j(|q|) T_j exp(2πi h·x_j),   I = |F|² / V²,   q = h B,   B = (A⁻¹)ᵀ

A has the lattice vectors as rows (Å), so |q| = 1/d in 1/Å without 2π. Friedel's law
I(−q) = I(q) holds by construction (no anomalous scattering), so the cloud holds one point of each
pair ±q with multiplicity 2, and the origin with multiplicity 1.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from featurization import kernel
from featurization.config import Q_LIMIT, FeaturizationConfig, RadiationName, ScattererName
from featurization.crystal import Crystal, FloatArray, IntArray, Reject
from featurization.radiation import scattering
from featurization.selection import MOST_INDEX, miller_half, sphere_half

# What all atoms are taken for where they are to be alike: of middling weight, known to all tables.
_ALIKE = "Si"


@dataclass(frozen=True, slots=True)
class Cloud:
    """Half of a centrosymmetric point cloud in reciprocal space."""

    hkl: NDArray[np.int16]  # (P, 3)
    q: NDArray[np.float32]  # (P, 3), 1/Å
    intensity: NDArray[np.float32]  # (P,), |F|²/V²; 0 where absent
    multiplicity: NDArray[np.uint8]  # (P,), 1 at the origin, else 2
    # (R, P), intensities of `config.also_radiation`; none by default
    also: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))

    def __post_init__(self) -> None:
        if not len(self.also):
            object.__setattr__(self, "also", np.empty((0, len(self.intensity)), dtype=np.float32))


def diffraction_cloud(crystal: Crystal, config: FeaturizationConfig) -> Cloud:
    """The cloud of a crystal in the cell that it comes in.

    Raises:
        Reject: a species without a form factor, points beyond the range of the form factors, or
            more points than `config.max_points`.
    """
    radiations = (config.radiation, *config.also_radiation)
    lattice = _floats(crystal.lattice)
    reciprocal, volume, longest = kernel.reciprocal_cell(lattice)
    if not 0.0 < volume < math.inf:
        raise Reject("diffraction", f"cell volume {volume} Å³")
    limit, q_max = config.miller_limit, config.q_max
    if limit is not None:
        hkl = miller_half(limit)
    else:
        assert q_max is not None
        hkl = sphere_half(lattice, volume, longest, q_max, config.max_points)
    hkl16, q, intensity, multiplicity, farthest, total = kernel.cloud(
        hkl,
        reciprocal,
        volume,
        *_scatterers(disguised(crystal, config.scatterers), radiations, config.scatterers),
        config.b_iso,
        config.absence_tolerance,
        config.drops_absences,
    )
    if farthest > Q_LIMIT * (1.0 + 1e-9) and radiations != ("neutron",):
        reason = f"|q| up to {farthest:.2f} 1/Å; form factors are known to {Q_LIMIT:g} 1/Å"
        raise Reject("diffraction", reason)
    if not math.isfinite(total):
        raise Reject("diffraction", "intensity is not finite")
    return Cloud(hkl16, q, intensity[0], multiplicity, intensity[1:])


def disguised(crystal: Crystal, scatterers: ScattererName) -> Crystal:
    """The crystal with the elements that scatter in place of its own, if they are others.

    Permuted elements trade places in a cycle that its id decides.
    """
    if scatterers == "alike":
        return replace(crystal, species=(_ALIKE,) * len(crystal.species))
    if scatterers == "permuted":
        drawn = {
            name: hashlib.blake2b(f"{crystal.id}\n{name}".encode("utf-8", "backslashreplace"))
            for name in crystal.species
        }
        cycle = sorted(drawn, key=lambda name: drawn[name].digest())
        follows = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        return replace(crystal, species=tuple(follows[name] for name in crystal.species))
    return crystal


def structure_factors(
    crystal: Crystal, hkl: IntArray, radiation: RadiationName, b_iso: float = 0.0
) -> tuple[NDArray[np.complex128], FloatArray]:
    """F(hkl) in the radiation's unit, and the bound Σ_j o_j |f_j| T_j ≥ |F| at each point.

    Args:
        crystal: any cell; B = `b_iso` (Å²) is shared by all atoms, T = exp(−B |q|²/4).
        hkl: (P, 3) Miller indices of that cell, up to ±32767.

    Returns:
        (P,) complex128 and (P,) float64. |F| / bound is the unitary structure factor |U|.

    Raises:
        ValueError: an index beyond ±32767, the largest that a cloud can hold.
        Reject: a species without a form factor.
    """
    hkl = np.ascontiguousarray(hkl, dtype=np.int64)
    if np.abs(hkl).max(initial=0) > MOST_INDEX:
        raise ValueError(f"Miller index {np.abs(hkl).max()}: give indices up to ±{MOST_INDEX}")
    reciprocal, _, _ = kernel.reciprocal_cell(_floats(crystal.lattice))
    _, s2 = kernel.lengths(hkl, reciprocal)
    scatterers = _scatterers(crystal, (radiation,))
    f, bound = kernel.structure_factors(hkl, s2, *scatterers, b_iso)
    return f[0], bound[0]


def _scatterers(
    crystal: Crystal, radiations: tuple[RadiationName, ...], scatterers: ScattererName = "atoms"
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray]:
    """Positions, occupancies, and the place of each scatterer in a table of form factors."""
    kind, table = scattering(crystal.species, radiations, points=scatterers == "points")
    return _floats(crystal.positions), _floats(crystal.occupancy), kind, table


def _floats(array: FloatArray) -> FloatArray:
    return np.ascontiguousarray(array, dtype=np.float64)
