"""Arms that move points, each with its intensity and its mate.

The origin stays at q = 0. Directions are drawn in the frame of the crystal, so that they turn with
it. The recorded cell follows where all points of a crystal are moved by one linear map, and is left
alone otherwise; of all models only `lattice_only` reads it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ablation.arm import Strength, arm
from ablation.draws import Draws
from ablation.points import (
    axes_N3,
    frames_N33,
    from_frame,
    origin_P,
    shuffled,
    to_frame,
    with_intensity,
    with_q,
)
from training.dataset import CloudSet

# Cell volume that `volume_normalized` gives every crystal: a usual one, Å³.
_VOLUME = 100.0


@arm(
    "positions",
    keeps={"intensities", "absences", "density", "friedel"},
    strength=Strength("σ", "1/Å", identity=0, default=0.05, ladder=(0.01, 0.02, 0.05, 0.1, 0.2)),
)
def jitter(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each pair ±q displaced by normal noise of standard deviation σ in 1/Å along each axis.

    Destroys: the lattice and with it symmetry, at distances below some σ.
    Keeps: intensities and Friedel's law; the outline of the pattern as long as σ is small.
    Limit: at σ = 0 nothing moves.
    """
    moved = from_frame(draws.normal_P(3), frames_N33(data)[data.crystal_P])
    moved[origin_P(data)] = 0.0
    return with_q(data, data.q_P3 + strength * moved)


@arm("positions", keeps={"intensities", "absences", "density", "friedel", "lengths", "powder"})
def directions_random(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each pair ±q turned to a random direction, uniform on the sphere.

    Destroys: all angles between reflections, hence the lattice's symmetry.
    Keeps: |q| and I of each point: what a powder pattern keeps, before peaks overlap.
    """
    drawn = torch.nn.functional.normalize(draws.normal_P(3), dim=1)
    length = data.q_P3.double().norm(dim=1, keepdim=True)
    return with_q(data, from_frame(drawn * length, frames_N33(data)[data.crystal_P]))


@arm(
    "positions",
    keeps={"intensities", "absences", "density", "friedel"},
    strength=Strength("width", "1/Å", identity=0, default=0.1, ladder=(0.02, 0.05, 0.1, 0.2, 0.4)),
)
def lengths_random(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each |q| drawn anew, uniform within ± half a `width` in 1/Å of what it was; mates alike.

    Destroys: the spacings of planes to within the width, hence the lattice.
    Keeps: the direction and the intensity of each point.
    Limit: at width 0 nothing moves.
    """
    length = data.q_P3.double().norm(dim=1)
    drawn = (length + strength * (draws.uniform_P(1)[:, 0] - 0.5)).abs()
    ratio = torch.where(length > 0, drawn / length, 1.0)
    return with_q(data, data.q_P3 * ratio[:, None])


@arm("positions", keeps={"intensities", "absences", "density", "friedel", "laue"})
def lengths_normalized(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Every |q| set to 1 1/Å: directions only.

    Destroys: the spacings of planes, hence volume, axial ratios and the fall-off with |q|.
    Keeps: angles between reflections, Laue symmetry, intensities, the origin.
    """
    return with_q(data, torch.nn.functional.normalize(data.q_P3.double(), dim=1))


@arm("positions", keeps={"intensities", "absences", "density", "friedel"})
def positions_shuffled(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The components of q along the crystal's frame dealt anew among its points, each by itself.

    A component also gets a random sign, since which mate of a pair is stored is a convention. To
    permute whole positions would be intensity_shuffled. What would land on the origin stays.

    Destroys: the lattice: |q|, directions and symmetry.
    Keeps: intensities, I(0), the distribution of each component: the size of the pattern.
    """
    frame_P33 = frames_N33(data)[data.crystal_P]
    movable = ~origin_P(data)
    crystal, key = data.crystal_P[movable], draws.uniform_P(6)[movable]
    part = to_frame(data.q_P3.double()[movable], frame_P33[movable])
    sign = torch.where(key[:, 3:] < 0.5, -1.0, 1.0)
    dealt = [shuffled(part[:, x] * sign[:, x], crystal, key[:, x]) for x in range(3)]
    q = data.q_P3.double()
    new = from_frame(torch.stack(dealt, dim=1), frame_P33[movable])
    # Numbers that are 0 but for rounding.
    at_origin = new.norm(dim=1) < 1e-6 * part.norm(dim=1)
    q[movable] = torch.where(at_origin[:, None], q[movable], new)
    return with_q(data, q)


@arm(
    "positions",
    keeps={"intensities", "absences", "density", "friedel"},
    strength=Strength(
        "ε", "", identity=0, default=0.05, ladder=(0.01, 0.02, 0.05, 0.1, 0.2), high=1
    ),
)
def strained(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The crystal stretched by 1 + ε along one random direction; q by 1 / (1 + ε).

    Destroys: symmetry that holds the direction not fixed, by an angle of order ε; the volume.
    Keeps: that the points lie on a lattice, intensities, absences.
    Limit: at ε = 0 nothing moves.
    """
    along, _ = axes_N3(data, draws.normal_N(6))
    return _mapped(data, -strength / (1.0 + strength), along, along, strength)


@arm(
    "positions",
    keeps={"intensities", "absences", "density", "friedel"},
    strength=Strength(
        "ε", "", identity=0, default=0.05, ladder=(0.01, 0.02, 0.05, 0.1, 0.2), high=1
    ),
)
def sheared(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Simple shear of the crystal by ε = tan of the angle, in a random plane and direction.

    Destroys: symmetry, by an angle of order ε.
    Keeps: volume, hence density; that the points lie on a lattice; intensities, absences.
    Limit: at ε = 0 nothing moves.
    """
    normal, along = axes_N3(data, draws.normal_N(6))
    return _mapped(data, -strength, normal, along, strength)


@arm("positions", keeps={"absences", "friedel", "laue"})
def volume_normalized(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The crystal dilated to a cell of 100 Å³; intensities |F|²/V² follow, form factors do not.

    Destroys: volume, hence density and the absolute length of any spacing.
    Keeps: angles, ratios of lengths, Laue symmetry, absences, ratios of intensities, and the
    number of electrons in the cell, in I(0).
    """
    volume = torch.linalg.det(data.lattice_N33.double()).abs()
    factor = (volume / _VOLUME) ** (1.0 / 3.0)
    scaled = with_intensity(data, data.intensity_P * factor[data.crystal_P] ** 6)
    lattice = (data.lattice_N33 / factor[:, None, None]).to(data.lattice_N33.dtype)
    return with_q(replace(scaled, lattice_N33=lattice), data.q_P3 * factor[data.crystal_P, None])


@arm(
    "positions",
    keeps={"intensities", "absences", "density", "friedel"},
    strength=Strength("ε", "", identity=0, default=0.3, ladder=(0.05, 0.1, 0.3, 0.6, 1), high=2),
)
def affine_random(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """q mapped by exp(ε G), G a matrix of nine normal numbers, one for each crystal.

    Destroys: all lengths and angles, with growing ε: what tells one lattice from another.
    Keeps: that the points lie on a lattice, which are collinear or coplanar; intensities,
    absences, hence the space group's algebra without its geometry.
    Limit: at ε = 0 nothing moves.
    """
    generator = strength * draws.normal_N(9).reshape(-1, 3, 3)
    one = torch.eye(3, dtype=generator.dtype, device=generator.device)
    # What is added, which is exactly nothing at ε = 0.
    forth, back = (torch.linalg.matrix_exp(g) - one for g in (generator, -generator))
    frame, rows = frames_N33(data), data.lattice_N33.double()
    of_point, q = data.crystal_P, data.q_P3.double()
    moved = to_frame(to_frame(q, frame[of_point]), forth[of_point])
    # a · q stays: rows of the lattice get the inverse, transposed.
    edges = [from_frame(from_frame(to_frame(a, frame), back), frame) for a in rows.unbind(1)]
    lattice = rows + torch.stack(edges, dim=1)
    return with_q(
        replace(data, lattice_N33=lattice.to(data.lattice_N33.dtype)),
        q + from_frame(moved, frame[of_point]),
    )


def _mapped(
    data: CloudSet, of_q: float, normal_N3: Tensor, along_N3: Tensor, of_lattice: float
) -> CloudSet:
    """The crystal after F = 1 + of_lattice × along normalᵀ; F⁻ᵀ = 1 + of_q × normal alongᵀ."""
    q, crystal = data.q_P3.double(), data.crystal_P
    normal_P3, along_P3 = normal_N3[crystal], along_N3[crystal]
    moved = q + of_q * (q * along_P3).sum(1, keepdim=True) * normal_P3
    rows = data.lattice_N33.double()
    reach = (rows * normal_N3[:, None, :]).sum(2, keepdim=True)
    lattice = rows + of_lattice * reach * along_N3[:, None, :]
    return with_q(replace(data, lattice_N33=lattice.to(data.lattice_N33.dtype)), moved)
