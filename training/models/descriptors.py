"""Fixed O(3)-invariant descriptions of a cloud, from |q|, I and directions alone.

Nothing here is learned, and nothing but the points is read: no cell, no index, no name. What the
columns are is said at `invariants`.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from training.dataset import CloudSet
from training.models import wilson
from training.models.spherical import INTENSITIES, SHELLS, SLICES, coefficients
from training.models.steady import steady
from training.portions import blocks

Q_MAX = 1.2  # 1/Å, end of the radial grids; points beyond count at the end
_UNIT = 4e-3  # e²/Å⁶, about the median intensity of inorganic crystals: where the logarithm bends
_BINS = 240  # of the radial profile, 0.005 1/Å each: distances up to 10 Å need steps below 0.02
_SMOOTH = 12  # bins; the width (1 σ) over which the mean intensity is taken for sharpening
_DISTANCES = np.concatenate([np.arange(0.0, 1.5, 0.1), np.arange(1.5, 10.01, 0.15)])  # Å
_FLOOR = 1e-5  # relative; below it a singular value is the rounding of float32
_LEAST_POWER = 1e-7  # relative; rounding gives up to 1e-10 where symmetry allows none
_TINY = 1e-12

Kinds = list[NDArray[np.float64]]


def nothing(data: CloudSet) -> NDArray[np.float32]:
    """(N, 1) zeros: what a model that always gives the class frequencies needs."""
    return np.zeros((len(data), 1), dtype=np.float32)


def invariants(data: CloudSet) -> NDArray[np.float32]:
    """(N, F) invariants for trees, in the precision of q and in this order.

    - Sums in 24 shells of |q| of presence, log(1 + I/unit), √I and I.
    - Radial Patterson function Σ I sinc(2|q|r) at distances r up to 10 Å, damped towards `Q_MAX`:
      distances between atoms, weighted by the product of their electrons (Debye 1915; Patterson,
      Phys. Rev. 46, 372 (1934)).
    - The same of I over its mean at that |q|: sharpened, so that all atoms weigh alike.
    - The logarithm of that mean (Wilson, Nature 150, 152 (1942)): how much scatters, how fast it
      falls; the logarithm of I(0) and of the number of points.
    - The atoms' own scattering, the electrons of a cell, the distribution of intensities:
      `wilson.statistics`.
    - Power of degrees 2, 4, 6 in each shell, relative to degree 0.
    - Logarithms of the singular values of each degree's coefficients (components × channels). As
      many are above the floor as the crystal's Laue group has invariants of that degree: none of
      degree 2 in a cubic crystal, one in a uniaxial one.
    """
    return _blockwise(data, lambda kinds: kinds)


def steady_invariants(data: CloudSet) -> NDArray[np.float32]:
    """(N, F) `invariants`, rounded so that a tree cannot cut between two orientations."""
    return _blockwise(data, lambda kinds: [steady(kind) for kind in kinds])


def _blockwise(data: CloudSet, change: Callable[[Kinds], Kinds]) -> NDArray[np.float32]:
    rows = list(blocks(data, torch.arange(len(data)))) or [torch.arange(0)]
    parts = (data.subset(each.numpy()) for each in rows)
    tables = [np.concatenate(change(_invariants(part)), axis=1) for part in parts]
    return np.concatenate(tables).astype(data.q_P3.numpy().dtype)


def _invariants(data: CloudSet) -> Kinds:
    """The columns by kind: those of one kind have one unit and like errors."""
    halves = coefficients(data, Q_MAX, _UNIT, torch.float64).numpy()
    count, radial = profile(data)
    kinds = [*np.split(halves[:, :, 0], INTENSITIES, axis=1), *_distances(count, radial)]
    kinds += wilson.kinds(data, radial, np.linspace(0, Q_MAX, _BINS + 1))
    return [*kinds, _power(halves), *(_singular_values(halves, degree) for degree in (2, 4, 6))]


def profile(data: CloudSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Number of points and their intensity by |q|, two (N, bins + 1), both Friedel mates.

    A point is shared by the two bins beside it, so that nothing jumps when |q| is rounded.
    """
    place_P = (data.q_P3.double().norm(dim=1) * (_BINS / Q_MAX)).clamp_max(_BINS)
    lower_P = place_P.floor().clamp_max(_BINS - 1)
    upper_share_P = place_P - lower_P
    index_P = data.crystal_P * (_BINS + 1) + lower_P.long()
    weight_P = data.multiplicity_P.double()
    parts = []
    for value_P in (weight_P, weight_P * data.intensity_P):
        sums = torch.zeros(len(data) * (_BINS + 1), dtype=torch.float64)
        sums.index_add_(0, index_P, value_P * (1 - upper_share_P))
        sums.index_add_(0, index_P + 1, value_P * upper_share_P)
        parts.append(sums.view(len(data), _BINS + 1).numpy())
    return parts[0], parts[1]


def _distances(
    count: NDArray[np.float64], radial: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Patterson functions, Wilson curve, I(0) and number of points from the radial profile."""
    q = np.linspace(0, Q_MAX, _BINS + 1)
    waves = np.sinc(2 * q[:, None] * _DISTANCES)
    offsets = np.arange(_BINS + 1)
    near = np.exp(-0.5 * ((offsets[:, None] - offsets) / _SMOOTH) ** 2)
    mean = (radial @ near) / np.maximum(count @ near, _TINY)
    sharp = np.where(mean > _TINY, radial / np.maximum(mean, _TINY), 0.0)
    sharp[:, 0] = 0.0  # the origin only adds a constant
    points = count.sum(axis=1, keepdims=True)
    return [
        (radial * np.exp(-0.5 * (q / (0.5 * Q_MAX)) ** 2)) @ waves,
        (sharp * np.exp(-0.5 * (q / (0.6 * Q_MAX)) ** 2)) @ waves / np.maximum(points, 1),
        np.log(mean[:, ::10] + 1e-9),
        np.log(radial[:, :1] + 1e-9),
        np.log1p(points),
    ]


def _power(halves: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3 × channels) Σ_m c² of degrees 2, 4, 6 over that of degree 0, channel by channel."""
    below = np.maximum(halves[:, :, 0] ** 2, _TINY)
    degrees = (2, 4, 6)
    power = np.concatenate(
        [(halves[:, :, SLICES[degree]] ** 2).sum(axis=2) / below for degree in degrees], axis=1
    )
    # Else trees would cut between two roundings of zero.
    floored: NDArray[np.float64] = np.maximum(power, _LEAST_POWER)
    return floored


def _singular_values(halves: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """(N, 2ℓ+1) base-10 logarithms, relative to degree 0, ascending."""
    kinds = halves[:, :, 0].reshape(len(halves), INTENSITIES, SHELLS)
    scale = np.repeat(np.sqrt((kinds**2).sum(axis=2)), SHELLS, axis=1)
    scaled = halves[:, :, SLICES[degree]] / np.maximum(scale, _TINY)[:, :, None]
    gram = np.einsum("nam,nak->nmk", scaled, scaled)
    return 0.5 * np.log10(np.maximum(np.linalg.eigvalsh(gram), _FLOOR**2))
