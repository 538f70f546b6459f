"""Arms that change the point group of a pattern while its powder pattern stays as it is."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ablation.arm import Strength, arm
from ablation.draws import Draws
from ablation.points import axes_N3, ordered, shells_P, sum_of, with_intensity
from training.dataset import CloudSet, ends_of

# A rotation may change products of cell vectors by this part of the vectors' lengths.
_METRIC_TOLERANCE = 5e-5
# A step of lattice reduction must shorten a vector by more than rounding does.
_SHORTER = 1.0 - 1e-9


@arm(
    "intensities",
    keeps={"lengths", "absences", "density", "powder"},
    strength=Strength("δ", "", identity=0, default=0.2, ladder=(0.05, 0.1, 0.2, 0.5, 1), high=1),
)
def friedel_broken(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """I(±q) = I (1 ± δ u) with u uniform in (−1, 1): mates differ, as by anomalous scattering.

    Both mates are then stored, each once. A δ of 0.1 is a strong anomalous signal.

    Destroys: the inversion of the pattern, and Laue symmetry, since u is of each pair its own.
    Keeps: the mean of mates, hence the powder pattern; the lattice, absences, I(0).
    Limit: at δ = 0 mates are equal again.
    """
    change = strength * (2.0 * draws.uniform_P(1)[:, 0] - 1.0)
    copies = data.multiplicity_P
    ends = ends_of(copies)
    point = torch.repeat_interleave(torch.arange(len(copies), device=copies.device), copies)
    first = torch.arange(len(point), device=copies.device) == ends[point]
    sign = torch.where(first, 1, -1)
    factor = 1.0 + torch.where(copies[point] > 1, sign * change[point], 0.0)
    return replace(
        data,
        offsets=ends[data.offsets],
        hkl_P3=data.hkl_P3[point] * sign[:, None].to(data.hkl_P3.dtype),
        q_P3=data.q_P3[point] * sign[:, None],
        intensity_P=(data.intensity_P[point] * factor).to(data.intensity_P.dtype),
        multiplicity_P=torch.ones_like(point),
    )


@arm(
    "intensities",
    keeps={"lengths", "friedel", "absences", "density", "powder"},
    strength=Strength("s", "", identity=0, default=1, ladder=(0.1, 0.3, 1, 3), high=20),
)
def symmetry_lowered(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities weighted by exp(s P₂(cos θ)) about a random direction, the shells' sums kept.

    θ is the angle to the direction, P₂ = (3 cos² θ − 1) / 2, and within each set of points of one
    |q| the weights are scaled to leave the sum, so that the powder pattern is exactly what it was.

    Destroys: Laue symmetry, down to the inversion: equivalent points become unlike.
    Keeps: the lattice, absences, I(0), the powder pattern.
    Limit: at s = 0 all weights are 1.
    """
    along, _ = axes_N3(data, draws.normal_N(6))
    q = torch.nn.functional.normalize(data.q_P3.double(), dim=1)
    cosine = (q * along[data.crystal_P]).sum(1)
    weight = torch.exp(strength * 0.5 * (3.0 * cosine**2 - 1.0))
    intensity, shell = data.intensity_P.double(), shells_P(data)
    weighted = sum_of(intensity * weight, shell)
    scale = torch.where(weighted > 0, sum_of(intensity, shell) / weighted, 1.0)
    return with_intensity(data, intensity * (weight * scale))


@arm("intensities", keeps={"friedel", "laue", "density", "powder"})
def symmetry_raised(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities averaged over the full point group of each crystal's lattice.

    A point that an operation moves outside of a whole Miller cube is unknown and left out of the
    mean. Any other cloud is taken for a whole sphere, in which what is not stored is absent: images
    of present points are added to it.

    Destroys: the difference between the crystal's Laue class and that of its lattice: what the
    atoms, not the cell, tell of symmetry.
    Keeps: the lattice, I(0), the powder pattern; Laue symmetry, of which there is more.
    """
    lattice_N33 = data.lattice_N33.double()
    change_N33 = reduction(lattice_N33)
    turns_NR33 = rotations(change_N33.double() @ lattice_N33)
    crystal, hkl = data.crystal_P, data.hkl_P3.long()
    codes = _Codes(_times(change_N33[crystal], hkl), crystal)
    in_cube_N = _is_cube(data)
    added = []
    for moved, point in _images(codes.hkl_P3, crystal, turns_NR33):
        new = (codes.find(moved, crystal[point]) < 0) & ~in_cube_N[crystal[point]]
        added.append(torch.cat([crystal[point][new, None], _half(moved[new])], dim=1))
    joined = torch.cat([hkl.new_zeros(0, 4), *added]).unique(dim=0)
    back_N33 = torch.linalg.inv(change_N33.double()).round().long()
    new_hkl = _half(_times(back_N33[joined[:, 0]], joined[:, 1:]))
    whole_hkl, whole = torch.cat([hkl, new_hkl]), torch.cat([crystal, joined[:, 0]])

    stored = data.intensity_P.double()
    total = torch.zeros(len(whole), dtype=torch.float64, device=whole.device)
    count = torch.zeros_like(total)
    for moved, point in _images(_times(change_N33[whole], whole_hkl), whole, turns_NR33):
        place = codes.find(moved, whole[point])
        total[point] += torch.where(place < 0, 0.0, stored[place])
        count[point] += ((place >= 0) | ~in_cube_N[whole[point]]).double()
    reciprocal = torch.linalg.inv(lattice_N33).mT[joined[:, 0]]
    new_q = (new_hkl[:, :, None] * reciprocal).sum(1).to(data.q_P3.dtype)
    order = ordered(whole)
    return replace(
        data,
        offsets=ends_of(torch.bincount(whole, minlength=len(data))),
        hkl_P3=whole_hkl[order].to(data.hkl_P3.dtype),
        q_P3=torch.cat([data.q_P3, new_q])[order],
        intensity_P=(total / count)[order].to(data.intensity_P.dtype),
        multiplicity_P=torch.cat([data.multiplicity_P, new_hkl.new_full((len(joined),), 2)])[order],
    )


def reduction(lattice_N33: Tensor) -> Tensor:
    """(N, 3, 3) whole-number U of determinant ±1 that make the rows of U A Minkowski-reduced."""
    rows = lattice_N33.clone()
    change = torch.eye(3, dtype=torch.int64, device=rows.device).repeat(len(rows), 1, 1)
    shortened = True
    while shortened:
        shortened = False
        for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            for of_j, of_k in ((1, 0), (0, 1), (1, 1), (1, -1)):
                by = of_j * rows[:, j] + of_k * rows[:, k]
                times = torch.round((rows[:, i] * by).sum(1) / (by * by).sum(1))
                new = rows[:, i] - times[:, None] * by
                better = (new * new).sum(1) < _SHORTER * (rows[:, i] ** 2).sum(1)
                times = torch.where(better, times, 0.0)[:, None]
                rows[:, i] -= times * by
                change[:, i] -= times.long() * (of_j * change[:, j] + of_k * change[:, k])
                shortened |= bool(better.any())
    return change


def rotations(reduced_N33: Tensor) -> Tensor:
    """(N, R, 3, 3) proper rotations of lattices, as whole-number W on the rows of reduced cells.

    R is the largest number, 24 at most; lattices with fewer have W = 0 in place of the others.
    Vectors of a reduced cell turn into vectors with components −1, 0 and 1.
    """
    device = reduced_N33.device
    row_27 = torch.tensor(list(product((-1, 0, 1), repeat=3)), device=device)
    metric = reduced_N33 @ reduced_N33.mT
    length = metric.diagonal(dim1=1, dim2=2).sqrt()
    squared = ((row_27.double() @ metric) * row_27).sum(2)
    allowed = _METRIC_TOLERANCE * length**2
    # Which of the 27 could be the image of each of the three; then of all triples those that are.
    fits_N27x3 = (squared[:, :, None] - length[:, None] ** 2).abs() <= allowed[:, None]
    choice_K3 = torch.tensor(_triples(), device=device)
    fits = [fits_N27x3[:, choice_K3[:, axis], axis] for axis in range(3)]
    crystal, choice = torch.nonzero(fits[0] & fits[1] & fits[2], as_tuple=True)
    turn = row_27[choice_K3[choice]]
    turned = turn.double() @ metric[crystal] @ turn.double().mT
    bound = _METRIC_TOLERANCE * length[crystal, :, None] * length[crystal, None]
    right = ((turned - metric[crystal]).abs() <= bound).all(dim=(1, 2))
    crystal, turn = crystal[right], turn[right]
    count = torch.bincount(crystal, minlength=len(metric))
    place = torch.arange(len(crystal), device=device) - (count.cumsum(0) - count)[crystal]
    most = int(count.max()) if len(count) else 0
    found = torch.zeros(len(metric), most, 3, 3, dtype=torch.int64, device=device)
    found[crystal, place] = turn
    return found


@cache
def _triples() -> list[tuple[int, int, int]]:
    """Triples of rows, as places among the 27, that are matrices of determinant 1."""
    rows = np.array(list(product((-1, 0, 1), repeat=3)))
    triples = np.array(list(product(range(27), repeat=3)))
    kept = np.isclose(np.linalg.det(rows[triples]), 1.0)
    return [(i, j, k) for i, j, k in triples[kept].tolist()]


class _Codes:
    """Finds points by crystal and ±hkl (of reduced cells)."""

    def __init__(self, hkl_P3: Tensor, crystal_P: Tensor) -> None:
        self.hkl_P3 = hkl_P3
        # Of a turned index, each component is a sum of three.
        self._base = 2 * 3 * (int(hkl_P3.abs().max()) if len(hkl_P3) else 0) + 1
        codes = self._of(hkl_P3, crystal_P)
        self._order = torch.argsort(codes)
        self._sorted = codes[self._order]

    def find(self, hkl_M3: Tensor, crystal_M: Tensor) -> Tensor:
        """(M,) place of each point among those known, −1 if it is not."""
        codes = self._of(hkl_M3, crystal_M)
        at = torch.searchsorted(self._sorted, codes).clamp(max=len(self._sorted) - 1)
        return torch.where(self._sorted[at] == codes, self._order[at], -1)

    def _of(self, hkl_M3: Tensor, crystal_M: Tensor) -> Tensor:
        h, k, l = hkl_M3.unbind(1)  # noqa: E741
        mates_alike = ((l * self._base + k) * self._base + h).abs()
        return crystal_M * self._base**3 + mates_alike


def _images(
    hkl_P3: Tensor, crystal_P: Tensor, turns_NR33: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """One operation after the other: (M, 3) images, and (M,) the points that they are of."""
    for turns_N33 in turns_NR33.unbind(1):
        point = torch.nonzero(turns_N33.any(dim=(1, 2))[crystal_P]).squeeze(1)
        yield _times(turns_N33[crystal_P[point]], hkl_P3[point]), point


def _is_cube(data: CloudSet) -> Tensor:
    """(N,) whether the points are all with |h|, |k|, |l| up to some limit, 000 perhaps left out."""
    lengths, largest = data.offsets.diff(), data.hkl_P3.long().abs().amax(dim=1)
    limit = torch.zeros_like(lengths).scatter_reduce(0, data.crystal_P, largest, "amax")
    cube = ((2 * limit + 1) ** 3 + 1) // 2
    return (lengths == cube) | (lengths == cube - 1)


def _times(matrix_M33: Tensor, vector_M3: Tensor) -> Tensor:
    return (matrix_M33 * vector_M3[:, None, :]).sum(2)


def _half(hkl_M3: Tensor) -> Tensor:
    """Of ±hkl the one that is stored: l > 0, or l = 0 and k > 0, or l = k = 0 ≤ h."""
    h, k, l = hkl_M3.unbind(1)  # noqa: E741
    negative = (l < 0) | ((l == 0) & ((k < 0) | ((k == 0) & (h < 0))))
    return torch.where(negative[:, None], -hkl_M3, hkl_M3)
