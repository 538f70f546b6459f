"""Clouds → coefficients in spherical harmonics: all that a model needs to see of directions.

By Friedel's law I(−q) = I(q), the odd degrees vanish; the even ones are summed over the stored half
of a cloud with its multiplicity. A rotation, proper or not, acts on the coefficients of degree ℓ as
an orthogonal matrix of size 2ℓ+1, so that scalar products between channels of one degree (the power
spectrum; Kondor, arXiv 1803.01588; Bartók et al., PRB 87, 184115) are exactly O(3)-invariant.

Shape legend, besides that of `training.dataset`: A channels (a function of |q| times a function of
I), M components of all degrees together, L stored points of the longest crystal of a chunk.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from training.dataset import CloudSet

DEGREES = (0, 2, 4, 6)
SLICES = {0: slice(0, 1), 2: slice(1, 6), 4: slice(6, 15), 6: slice(15, 28)}
COMPONENTS = 28
SHELLS = 24
INTENSITIES = 4
CHANNELS = INTENSITIES * SHELLS
_CHUNK = 1 << 14  # points worked on at a time: their channels (6 MB) stay in the cache


def coefficients(
    data: CloudSet, q_max: float, intensity_scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    """(N, A, 28) Σ over both Friedel mates of R(|q|) · g(I) · Y_ℓm(q/|q|).

    Channel 24 g + k is intensity function g in shell k. The shells are Gaussians as wide as their
    distance, centred from 0 to `q_max`; points beyond count in the last shell. The intensity
    functions are presence (I > 0), log(1 + I / `intensity_scale`), √I and I. The origin has no
    direction and counts in ℓ = 0 alone; a crystal without points is all zero.

    Args:
        q_max: 1/Å.
        intensity_scale: unit of intensity of the logarithm, in 1/Å⁶.
        dtype: of the sums, by default that of q.
    """
    dtype = dtype or data.q_P3.dtype
    answer_NAM = torch.zeros(len(data), CHANNELS, COMPONENTS, dtype=dtype)
    spacing = q_max / (SHELLS - 1)
    centres_K = torch.arange(SHELLS, dtype=dtype)
    for rows, points_BL, weight_BL in _chunks(data):
        q = data.q_P3[points_BL.flatten()].to(dtype)
        radius = q.norm(dim=1)
        direction = q / radius.clamp_min(torch.finfo(q.dtype).tiny)[:, None]
        shell = (radius / spacing).clamp_max(SHELLS - 1)
        shells_KP = torch.exp(-0.5 * (shell - centres_K[:, None]).square())
        intensity_P = data.intensity_P[points_BL.flatten()].to(dtype)
        functions_P = _functions(intensity_P, intensity_scale)
        weighted_GP = torch.stack(functions_P).to(q.dtype) * weight_BL.flatten()
        channels_AP = (weighted_GP[:, None] * shells_KP).flatten(0, 1)
        answer_NAM[rows] = torch.bmm(
            channels_AP.unflatten(1, points_BL.shape).transpose(0, 1),
            harmonics(direction).unflatten(0, points_BL.shape),
        )
    return answer_NAM


def _functions(intensity_P: Tensor, scale: float) -> tuple[Tensor, ...]:
    logarithm = torch.log1p(intensity_P / scale)
    return (intensity_P > 0).to(intensity_P.dtype), logarithm, intensity_P.sqrt(), intensity_P


def _chunks(data: CloudSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Crystals of like size: rows (B,), points (B, L), their multiplicity, 0 for padding (B, L)."""
    lengths_N = data.offsets.diff()
    order = lengths_N.argsort(descending=True, stable=True)
    order = order[: int(lengths_N.count_nonzero())]
    while len(order):
        longest = int(lengths_N[order[0]])
        rows, order = order.tensor_split([max(1, _CHUNK // longest)])
        within_L = torch.arange(longest)
        real_BL = within_L < lengths_N[rows, None]
        points_BL = (data.offsets[rows, None] + within_L).where(real_BL, data.offsets[rows, None])
        yield rows, points_BL, data.multiplicity_P[points_BL] * real_BL


def harmonics(direction_P3: Tensor) -> Tensor:
    """(P, 28) real spherical harmonics of unit vectors, degrees 0, 2, 4, 6, orders −ℓ … ℓ.

    Racah's normalization: Σ_m Y_ℓm(u)² = 1, so Σ_m Y_ℓm(u) Y_ℓm(v) = P_ℓ(u·v), the Legendre
    polynomial (Edmonds 1957, eq. 4.6.6). A zero vector gives 1 for ℓ = 0 and 0 for ℓ > 0.
    """
    x, y, z = direction_P3.unbind(dim=1)
    # Re and Im of (x + iy)^m: sin^m θ cos mφ and sin^m θ sin mφ without angles.
    real, imaginary = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(DEGREES[-1]):
        real, imaginary = (
            [*real, x * real[-1] - y * imaginary[-1]],
            [*imaginary, x * imaginary[-1] + y * real[-1]],
        )
    legendre = _legendre(z, (x * x + y * y + z * z))
    columns = []
    for degree in DEGREES:
        for order in range(-degree, degree + 1):
            m = abs(order)
            norm = math.sqrt(
                (2 if m else 1) * math.factorial(degree - m) / math.factorial(degree + m)
            )
            azimuth = real[m] if order >= 0 else imaginary[m]
            columns.append(norm * legendre[degree, m] * azimuth)
    return torch.stack(columns, dim=1)


def _legendre(z: Tensor, square: Tensor) -> dict[tuple[int, int], Tensor]:
    """P_ℓm(z/r) rˡ / (sin θ)^m: a homogeneous polynomial, so that the zero vector needs no care."""
    values = {(0, 0): torch.ones_like(z)}
    for m in range(DEGREES[-1] + 1):
        if m:
            values[m, m] = values[m - 1, m - 1] * (2 * m - 1)
        for degree in range(m + 1, DEGREES[-1] + 1):
            lower = values.get((degree - 2, m))
            value = z * (2 * degree - 1) * values[degree - 1, m]
            if lower is not None:
                value = value - (degree + m - 1) * square * lower
            values[degree, m] = value / (degree - m)
    return values
