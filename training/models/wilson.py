"""What the intensities say of the atoms themselves, apart from where they stand.

A. J. C. Wilson's statistics (Nature 150, 152 (1942); Acta Cryst. 2, 318 (1949)), made sharp: the
mean intensity at a |q| is that of the atoms alone only over many reflections, but the Patterson
function within 1 Å of its origin always is, since few atoms are closer to one another.

Shape legend, besides that of `training.dataset`: Q lengths |q| of the curve, B bins.
"""

import numpy as np
from numpy.typing import NDArray

from featurization.kernel import compiled
from training.dataset import CloudSet
from training.models.indexing import volumes

FloatArray = NDArray[np.float64]

_INSIDE, _OUTSIDE = 0.6, 1.4  # Å: the Patterson function counts wholly, not at all; 1 Å by half
_WINDOW = 0.6  # 1/Å, 1 σ of the Gaussian that keeps the sphere's edge from ringing
_KNOTS = np.array([0.2, 0.45, 0.7, 0.95, 1.2])  # 1/Å, ranges of |q| overlap linearly
_LARGEST = 9.0  # of the scales of E², whose mean is 1; each is a third of the one before
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
      lattice of E²/t exp(−E²/t) for t = 9, 3, … 1/27, of E, E², E⁴ (Wilson's: centric or not, many
      atoms or few). Absent reflections count as 0.

    Args:
        radial_NB: intensity, both Friedel mates, near each of the lengths `q_B` in 1/Å.
    """
    return np.concatenate(kinds(data, radial_NB, q_B), axis=1)


def kinds(data: CloudSet, radial_NB: FloatArray, q_B: FloatArray) -> list[FloatArray]:
    """The columns of `statistics`, in its order, those of one unit and of like errors together."""
    lengths_Q = np.linspace(0, q_B[-1], 25)
    own_NQ = radial_NB @ own_scattering(q_B, lengths_Q)
    log_NQ = np.log(np.maximum(own_NQ, _TINY))
    present_P = (data.intensity_P > 0) * data.multiplicity_P
    points_N = np.bincount(data.crystal_P.numpy(), present_P.numpy(), len(data))
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
    logarithms = [log_NQ, log_NQ - log_NQ[:, :1], np.diff(log_NQ, axis=1)]
    cells = [np.stack(part, axis=1) for part in (*([each] for each in cell[:7]), cell[7:])]
    return [*logarithms, *cells, *np.split(distribution, 9, axis=1)]


def own_scattering(q_B: FloatArray, lengths_Q: FloatArray) -> FloatArray:
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
    """(N, 9 × 5): functions of E², averaged near each knot of |q|."""
    sums = _functions(
        data.q_P3.double().numpy(),
        data.intensity_P.double().numpy(),
        data.multiplicity_P.numpy(),
        data.offsets.numpy(),
        volume_N,
        log_NQ,
        float(lengths_Q[1]),
    )
    means = sums / np.maximum(volume_N[:, None] * _hats(), 1.0)[:, None]
    means[:, -1] = np.log1p(means[:, -1])
    answer: FloatArray = means.reshape(len(data), sums.shape[1] * sums.shape[2])
    return answer


@compiled
def _functions(
    q_P3: FloatArray,
    intensity_P: FloatArray,
    multiplicity_P: NDArray[np.int64],
    offsets: NDArray[np.int64],
    volume_N: FloatArray,
    log_NQ: FloatArray,
    step: float,
) -> FloatArray:
    """(N, 9, 5) sums over the points, both mates, shared by the two knots beside each."""
    sums = np.zeros((len(volume_N), 9, len(_KNOTS)))
    values = np.empty(9)
    for row in range(len(volume_N)):
        for point in range(offsets[row], offsets[row + 1]):
            q = np.sqrt(q_P3[point, 0] ** 2 + q_P3[point, 1] ** 2 + q_P3[point, 2] ** 2)
            if q == 0:  # the origin is no reflection
                continue
            place = min(q / step, log_NQ.shape[1] - 1.001)
            lower = int(place)
            rise = log_NQ[row, lower + 1] - log_NQ[row, lower]
            own = log_NQ[row, lower] + (place - lower) * rise
            # The curve is of intensities under the window.
            windowed = np.exp(-0.5 * (q / _WINDOW) ** 2 - own)
            square = intensity_P[point] * volume_N[row] * windowed
            scale, decay = _LARGEST, np.exp(-square / _LARGEST)
            for k in range(6):
                values[k] = square / scale * decay
                scale, decay = scale / 3, decay * decay * decay
            values[6], values[7], values[8] = np.sqrt(square), square, square * square
            knot = 0
            while knot < len(_KNOTS) - 2 and q >= _KNOTS[knot + 1]:
                knot += 1
            share = (q - _KNOTS[knot]) / (_KNOTS[knot + 1] - _KNOTS[knot])
            share = min(max(share, 0.0), 1.0)
            for k in range(9):
                sums[row, k, knot] += multiplicity_P[point] * (1 - share) * values[k]
                sums[row, k, knot + 1] += multiplicity_P[point] * share * values[k]
    return sums


def _hats() -> FloatArray:
    """∫ 4πq² dq of the hats at the knots, 1/Å³."""
    q = np.linspace(0, _KNOTS[-1], 6001)
    position = np.interp(q, _KNOTS, np.arange(len(_KNOTS)))
    hats = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(len(_KNOTS))))
    answer: FloatArray = (4 * np.pi * q[:, None] ** 2 * hats).sum(axis=0) * q[1]
    return answer
