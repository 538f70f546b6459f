"""Arms that show less of the pattern: fewer points, each as it was.

The origin stays unless the docstring says otherwise. Points are counted and dropped in pairs ±q.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ablation.arm import Strength, arm
from ablation.draws import Draws
from ablation.points import (
    axes_N3,
    code_P,
    equivalents_P,
    mean_of,
    only,
    origin_P,
    place_in,
    shell_length_P,
)
from training.dataset import CloudSet

# A cut in |q| takes or leaves whole shells, whatever the rounding of their points.
_MARGIN = 1e-6
# Zone axes [uvw] of small indices, one of each pair ±[uvw].
_ZONES = (
    (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, -1), (1, 0, -1),
    (1, -1, 0), (1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1),
)  # fmt: skip


@arm("extent", keeps={"friedel"})
def basis_only(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Only the three reciprocal basis vectors of the stored cell (100, 010, 001) and their mates.

    Destroys: all other reflections, the origin too, hence nearly all that intensities tell.
    Keeps: the metric of the cell, and the intensities of these three (0 if absent or not stored).
    """
    axes = torch.eye(3, dtype=data.hkl_P3.dtype, device=data.hkl_P3.device)
    return _few(data, axes)


@arm(
    "extent",
    keeps={"friedel"},
    strength=Strength(
        "limit", "", identity=math.inf, default=1, ladder=(4, 3, 2, 1, 0, -1), low=-1, whole=True
    ),
)
def miller_cut(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Points with |h|, |k|, |l| ≤ `limit`; 0 is basis_only, −1 that and the origin.

    Destroys: fine detail in real space; what a small set of reflections does not tell.
    Keeps: the points inside as they are. The cube is one of the stored cell: it does not keep
    the symmetry of every lattice.
    Limit: an infinite one leaves all.
    """
    if strength == 0:
        return basis_only.apply(data, strength, draws)
    if strength == -1:
        four = torch.cat([torch.zeros(1, 3), torch.eye(3)]).to(data.hkl_P3)
        return _few(data, four)
    return only(data, data.hkl_P3.abs().amax(dim=1) <= strength)


@arm(
    "extent",
    keeps={"friedel", "density", "laue"},
    strength=Strength(
        "q_max", "1/Å", identity=math.inf, default=0.6, ladder=(1, 0.8, 0.6, 0.4, 0.2)
    ),
)
def q_below(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Points with |q| ≤ `q_max` in 1/Å: a pattern of low resolution.

    Destroys: detail in real space finer than 1 / q_max.
    Keeps: whole shells, hence Laue symmetry; I(0).
    Limit: an infinite one leaves all.
    """
    return only(data, shell_length_P(data) <= strength * (1.0 + _MARGIN))


@arm(
    "extent",
    keeps={"friedel", "laue"},
    strength=Strength("q_min", "1/Å", identity=0, default=0.4, ladder=(0.1, 0.2, 0.4, 0.6, 0.8)),
)
def q_above(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Points with |q| ≥ `q_min` in 1/Å; the origin is the first to go.

    Destroys: I(0) and the strong reflections of small |q|, hence density and cell shape.
    Keeps: whole shells, hence Laue symmetry.
    Limit: at 0 all points stay.
    """
    return only(data, shell_length_P(data) >= strength * (1.0 - _MARGIN))


@arm(
    "extent",
    keeps={"friedel", "density"},
    strength=Strength(
        "pairs", "", identity=math.inf, default=32, ladder=(128, 64, 32, 16, 8, 4), whole=True
    ),
)
def strongest(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The N `pairs` of largest intensity, and the origin.

    Destroys: weak reflections and absences; Laue symmetry where the cut splits equivalent points.
    Keeps: what a short exposure sees.
    Limit: infinitely many leave all.
    """
    mean = mean_of(data.intensity_P.double(), equivalents_P(data))
    return _first_pairs(data, strength, -mean, code_P(data))


@arm(
    "extent",
    keeps={"friedel", "density"},
    strength=Strength(
        "pairs", "", identity=math.inf, default=32, ladder=(128, 64, 32, 16, 8, 4), whole=True
    ),
)
def random_points(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """N `pairs` at random, and the origin: as many as strongest keeps, but any.

    Destroys: completeness, hence Laue symmetry.
    Keeps: the points that are left as they were.
    Limit: infinitely many leave all.
    """
    return _first_pairs(data, strength, draws.uniform_P(1)[:, 0])


@arm(
    "extent",
    keeps={"friedel", "density"},
    strength=Strength("p", "", identity=0, default=0.5, ladder=(0.1, 0.3, 0.5, 0.7, 0.9), high=1),
)
def dropout(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each pair ±q missing with probability `p`, the origin never.

    Destroys: completeness, hence Laue symmetry.
    Keeps: the points that are left as they were.
    Limit: at p = 0 all points stay.
    """
    return only(data, origin_P(data) | (draws.uniform_P(1)[:, 0] >= strength))


@arm(
    "extent",
    keeps={"friedel", "density"},
    strength=Strength("angle", "°", identity=0, default=60, ladder=(30, 60, 90, 120), high=180),
)
def missing_wedge(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Without the double wedge of full `angle` in degrees that a limited tilt does not reach.

    The tilt axis is random; a holder that turns by ±60° leaves out 60° of 180°.

    Destroys: all reflections about one direction, hence Laue symmetry.
    Keeps: the points outside as they are, both mates of each; the origin.
    Limit: at 0° all points stay.
    """
    tilt, beam = axes_N3(data, draws.normal_N(6))
    crystal, q = data.crystal_P, data.q_P3.double()
    side = torch.linalg.cross(tilt, beam)
    along, across = ((q * axis[crystal]).sum(1).abs() for axis in (beam, side))
    missing = torch.atan2(along, across) > math.radians(90.0 - strength / 2.0)
    return only(data, origin_P(data) | ~missing)


@arm("extent", keeps={"density", "absences"})
def half_space(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """One of each pair ±q, on the same side of a random plane through the origin.

    Destroys: the inversion of the pattern and Laue symmetry, as seen by a model that does not
    know Friedel's law.
    Keeps: by that law all information.
    """
    normal, _ = axes_N3(data, draws.normal_N(6))
    sign = torch.where((data.q_P3 * normal[data.crystal_P]).sum(1) < 0, -1, 1)[:, None]
    return replace(
        data,
        hkl_P3=data.hkl_P3 * sign.to(data.hkl_P3.dtype),
        q_P3=data.q_P3 * sign.to(data.q_P3.dtype),
        multiplicity_P=torch.ones_like(data.multiplicity_P),
    )


@arm(
    "extent",
    keeps={"friedel", "density"},
    strength=Strength("zones", "", identity=math.inf, default=0, ladder=(3, 2, 1, 0), whole=True),
)
def zone_axis(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The slice |hu + kv + lw| ≤ n about a random zone axis [uvw] of the stored cell.

    What one electron diffraction picture along a lattice direction sees: the zero-order Laue zone
    (n = 0) and as many `zones` of higher order. u, v, w are −1, 0 or 1.

    Destroys: the third dimension, and all symmetry that leaves the axis not alone.
    Keeps: the slice as it is, with its mates and the origin.
    Limit: infinitely many zones leave all.
    """
    zones = torch.tensor(_ZONES, device=data.hkl_P3.device)
    drawn = (draws.uniform_N(1)[:, 0] * len(_ZONES)).long()
    order = (data.hkl_P3.long() * zones[drawn][data.crystal_P]).sum(1)
    return only(data, order.abs() <= strength)


@arm("extent", keeps={"friedel", "laue"})
def origin_removed(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Without the point 000, which a beam stop hides in every experiment.

    Destroys: I(0), hence the density of scatterers.
    Keeps: every other point as it is.
    """
    return only(data, ~origin_P(data))


def _few(data: CloudSet, wanted_K3: Tensor) -> CloudSet:
    """K points of each crystal by their indices, with intensity 0 where not stored."""
    count, size = len(data), len(wanted_K3)
    intensity_NK = data.intensity_P.new_zeros(count, size)
    for place in range(size):
        found = (data.hkl_P3 == wanted_K3[place]).all(dim=1)
        intensity_NK[data.crystal_P[found], place] = data.intensity_P[found]
    reciprocal_N33 = torch.linalg.inv(data.lattice_N33.double()).mT
    q_NK3 = (wanted_K3.double()[None, :, :, None] * reciprocal_N33[:, None]).sum(2)
    multiplicity_K = 2 - (wanted_K3 == 0).all(dim=1).to(data.multiplicity_P.dtype)
    return replace(
        data,
        offsets=torch.arange(count + 1, device=data.offsets.device) * size,
        hkl_P3=wanted_K3.repeat(count, 1),
        q_P3=q_NK3.reshape(-1, 3).to(data.q_P3.dtype),
        intensity_P=intensity_NK.reshape(-1),
        multiplicity_P=multiplicity_K.repeat(count),
    )


def _first_pairs(data: CloudSet, number: float, *keys: Tensor) -> CloudSet:
    """The origin and, in order of the keys, the first pairs of each crystal."""
    kept = origin_P(data)
    movable = ~kept
    place, _ = place_in(data.crystal_P[movable], *(key[movable] for key in keys))
    kept[movable] = place < number
    return only(data, kept)
