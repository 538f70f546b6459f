"""What the intensities say of the atoms themselves, apart from where they stand.

A. J. C. Wilson's statistics (Nature 150, 152 (1942); Acta Cryst. 2, 318 (1949)), made sharp: the
mean intensity at a |q| is that of the atoms alone only over many reflections, but the Patterson
function within 1 Å of its origin always is, since few atoms are closer to one another.

Shape legend, besides that of `training.dataset`: Q lengths |q| of the curve, B bins.
"""

import numpy as np
from numpy.typing import NDArray

from training.dataset import CloudSet
from training.models.indexing import volumes

FloatArray = NDArray[np.float64]

_INSIDE, _OUTSIDE = 0.6, 1.4  # Å: the Patterson function counts wholly, not at all; 1 Å by half
_WINDOW = 0.6  # 1/Å, 1 σ of the Gaussian that keeps the sphere's edge from ringing
_KNOTS = np.array([0.2, 0.45, 0.7, 0.95, 1.2])  # 1/Å, ranges of |q| overlap linearly
_SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of E², whose mean is 1
_ELECTRONS = 300.0  # of more than a few hundred, rounding hides whether they are even or odd
_TINY = 1e-9


def statistics(data: CloudSet, radial_NB: FloatArray, q_B: FloatArray) -> FloatArray:
    """(N, 125) finite numbers, in this order.

    - The logarithm of Σf²/V, the sum over the atoms of a volume, at 25 lengths |q| to 1.2 1/Å; the
      same over that at 0; its steps. f is an atom's form factor: the height says how many electrons
      the atoms have, the fall how they are bound.
    - Volume V of the cell that the points span (`indexing`); electrons in it, V √I(0); ΣZ² in it;
      (ΣZ)²/ΣZ², the number of atoms if all are alike; ΣZ²/ΣZ, the mean number of electrons of the
      atom that an electron belongs to; logarithms of both per volume; whether the number of
      electrons is even (cos π, cos π/2; a crystal with an odd one is a metal or magnetic).
    - Number of reflections present over that which a lattice of this cell has in the sphere.
    - The distribution of E² = I V / (Σf²/V), in five ranges of |q|: the means over all nodes of the
      lattice of E²/t exp(−E²/t) for six t, of E, E², E⁴ (Wilson's: centric or not, many atoms or
      few). Absent reflections count as 0.

    Args:
        radial_NB: intensity, both Friedel mates, near each of the lengths `q_B` in 1/Å.
    """
    lengths_Q = np.linspace(0, q_B[-1], 25)
    own_NQ = radial_NB @ _own(q_B, lengths_Q)
    log_NQ = np.log(np.maximum(own_NQ, _TINY))
    present_P = (data.intensity_P > 0).double().numpy()
    points_N = _sums(data, present_P, np.zeros(len(present_P), dtype=np.int64), 1)[:, 0]
    # Without a lattice: as if the points filled the sphere.
    volume_N = volumes(data)
    filled_N = np.maximum(points_N, 1) / (4 / 3 * np.pi * q_B[-1] ** 3)
    volume_N = np.where(np.isnan(volume_N), filled_N, volume_N)
    electrons_N = volume_N * np.sqrt(radial_NB[:, 0])
    square_N = volume_N * np.exp(log_NQ[:, 0])
    sure_N = np.exp(-((electrons_N / _ELECTRONS) ** 2))
    cell = [
        volume_N,
        electrons_N,
        square_N,
        electrons_N**2 / square_N,
        square_N / np.maximum(electrons_N, _TINY),
        np.log(electrons_N / volume_N + _TINY),
        np.log(square_N / volume_N),
        sure_N * np.cos(np.pi * electrons_N),
        sure_N * np.cos(np.pi * electrons_N / 2),
        points_N / (volume_N * (4 / 3 * np.pi * q_B[-1] ** 3)),
    ]
    distribution = _distribution(data, volume_N, log_NQ, lengths_Q)
    columns = [log_NQ, log_NQ - log_NQ[:, :1], np.diff(log_NQ, axis=1), np.stack(cell, axis=1)]
    return np.concatenate([*columns, distribution], axis=1)


def _own(q_B: FloatArray, lengths_Q: FloatArray) -> FloatArray:
    """(B, Q) radial intensity → Σf²/V: to the Patterson function, cut off, and back."""
    step = 0.02
    r = np.arange(step / 2, _OUTSIDE, step)
    cut = np.cos(np.pi / 2 * np.clip((r - _INSIDE) / (_OUTSIDE - _INSIDE), 0, 1)) ** 2
    there = np.exp(-0.5 * (q_B / _WINDOW) ** 2)[:, None] * np.sinc(2 * q_B[:, None] * r)
    back = (4 * np.pi * r**2 * cut * step)[:, None] * np.sinc(2 * r[:, None] * lengths_Q)
    answer: FloatArray = there @ back
    return answer


def _distribution(
    data: CloudSet, volume_N: FloatArray, log_NQ: FloatArray, lengths_Q: FloatArray
) -> FloatArray:
    """(N, 5 × 9): functions of E², averaged near each knot of |q|."""
    q_P = data.q_P3.double().norm(dim=1).numpy()
    crystal_P = data.crystal_P.numpy()
    place_P = np.minimum(q_P / lengths_Q[1], len(lengths_Q) - 1.001)
    lower_P = place_P.astype(np.int64)
    share_P = place_P - lower_P
    own_P = np.exp(
        log_NQ[crystal_P, lower_P] * (1 - share_P) + log_NQ[crystal_P, lower_P + 1] * share_P
    )
    window_P = np.exp(-0.5 * (q_P / _WINDOW) ** 2)
    square_P = data.intensity_P.double().numpy() * window_P * volume_N[crystal_P] / own_P
    # Linear hats at the knots; the origin is no reflection.
    position_P = np.interp(q_P, _KNOTS, np.arange(len(_KNOTS)))
    bin_P = np.minimum(position_P.astype(np.int64), len(_KNOTS) - 2)
    upper_P = (position_P - bin_P) * (q_P > 0)
    below_P = (1 - (position_P - bin_P)) * (q_P > 0)
    expected = np.maximum(volume_N[:, None] * _hats(), 1.0)
    functions = [square_P / t * np.exp(-square_P / t) for t in _SCALES]
    functions += [np.sqrt(square_P), square_P, square_P**2]
    columns = []
    for value_P in functions:
        sums = _sums(data, value_P * below_P, bin_P, len(_KNOTS))
        sums += _sums(data, value_P * upper_P, bin_P + 1, len(_KNOTS))
        columns.append(np.log1p(sums / expected) if value_P is functions[-1] else sums / expected)
    return np.concatenate(columns, axis=1)


def _hats() -> FloatArray:
    """∫ 4πq² dq of the hats at the knots, 1/Å³."""
    q = np.linspace(0, _KNOTS[-1], 6001)
    position = np.interp(q, _KNOTS, np.arange(len(_KNOTS)))
    hats = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(len(_KNOTS))))
    answer: FloatArray = (4 * np.pi * q[:, None] ** 2 * hats).sum(axis=0) * q[1]
    return answer


def _sums(data: CloudSet, value_P: FloatArray, bin_P: NDArray[np.int64], bins: int) -> FloatArray:
    """(N, bins) of a value of stored points, both Friedel mates."""
    weighted_P = value_P * data.multiplicity_P.numpy()
    slot_P = data.crystal_P.numpy() * bins + bin_P
    sums = np.bincount(slot_P, weighted_P, len(data) * bins).astype(np.float64)
    return sums.reshape(len(data), bins)
