"""Arms that change intensities and leave every point where it is.

The origin, I(0) = density², keeps its own unless the docstring says otherwise.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ablation.arm import Strength, arm
from ablation.draws import Draws
from ablation.points import (
    code_P,
    equivalents_P,
    first_of,
    groups_of,
    mean_of,
    ordered,
    origin_P,
    shell_length_P,
    shells_P,
    shuffled,
    weaker_part,
    with_intensity,
)
from training.dataset import CloudSet

# Shells wide enough for a mean over tens of reflections, narrow against the fall-off of |F|², 1/Å.
_WILSON_SHELL = 0.1


@arm("intensities", keeps={"lengths", "friedel", "laue", "absences"})
def intensity_binary(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensity 1 where a reflection is present, 0 where it is absent, the origin included.

    Destroys: how strong reflections are, hence what scatters and where it sits in the cell.
    Keeps: the reciprocal lattice, its Laue symmetry and the systematic absences (centring, screw
    axes, glides).
    """
    return with_intensity(data, data.intensity_P > 0)


@arm("intensities", keeps={"lengths", "friedel", "laue", "absences", "density"})
def intensity_uniform(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The crystal's mean intensity at every reflection that is present, 0 where it is absent.

    Destroys: the contrast between reflections.
    Keeps: what intensity_binary keeps, and the scale: the scattered sum and I(0).
    """
    movable = ~origin_P(data) & (data.intensity_P > 0)
    intensity = data.intensity_P.double()
    intensity[movable] = mean_of(intensity[movable], data.crystal_P[movable])
    return with_intensity(data, intensity)


@arm("intensities", keeps={"lengths", "friedel", "intensities", "density"})
def intensity_shuffled(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities permuted among the points of each crystal.

    Destroys: which reflection is how strong: the decay with |q|, the Laue symmetry of the
    intensities, the place of absences that were stored as 0.
    Keeps: the lattice, the distribution of intensities and I(0), the mean density.
    """
    return _shuffled_among(data, data.crystal_P, draws)


@arm(
    "intensities",
    keeps={"lengths", "friedel", "intensities", "density"},
    strength=Strength("width", "1/Å", identity=0, default=0.1, ladder=(0.02, 0.05, 0.1, 0.2, 0.4)),
)
def intensity_shuffled_in_shells(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities permuted among the points of a crystal in one shell of |q|, `width` 1/Å thick.

    Destroys: which reflection of a shell is how strong, hence Laue symmetry and absences.
    Keeps: the lattice, the fall-off with |q| to within the width, the distribution of intensities.
    Limit: at width 0 no two points share a shell, and nothing moves.
    """
    if strength == 0:
        return data
    shell = torch.floor(shell_length_P(data) / strength)
    return _shuffled_among(data, groups_of(data.crystal_P, shell), draws)


@arm("intensities", keeps={"lengths", "friedel"})
def intensity_exchanged(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each crystal gets the intensities of another one of the set, origin included.

    In order of |q|, the i-th of n points takes that of the ⌊i m / n⌋-th of the other's m points.
    Who gives to whom is a cycle through all crystals in an order drawn from their ids: the one arm
    in which a crystal depends on the set that it stands in. A set of one stays as it is.

    Destroys: all that intensities tell of this crystal, its density and Laue symmetry included.
    Keeps: the lattice; intensities and a fall-off with |q| that are those of real crystals.
    """
    count = len(data)
    order = torch.argsort(draws.uniform_N(1)[:, 0])
    donor = torch.empty_like(order)
    donor[order] = order.roll(-1)
    origin, crystal = origin_P(data), data.crystal_P
    points = torch.nonzero(~origin).squeeze(1)
    points = points[ordered(shells_P(data)[points], code_P(data)[points])]
    size = torch.bincount(crystal[points], minlength=count)
    start = size.cumsum(0) - size
    own = crystal[points]
    place = torch.arange(len(points), device=points.device) - start[own]
    source = start[donor[own]] + place * size[donor[own]] // size[own].clamp(min=1)
    giving = size[donor[own]] > 0
    intensity = data.intensity_P.clone()
    intensity[points] = 0
    intensity[points[giving]] = data.intensity_P[points[source[giving]]]
    centre = torch.nonzero(origin).squeeze(1)
    at = centre.new_full((count,), -1)
    at[crystal[centre]] = centre
    theirs = at[donor[crystal[centre]]]
    intensity[centre[theirs >= 0]] = data.intensity_P[theirs[theirs >= 0]]
    return replace(data, intensity_P=intensity)


@arm("intensities", keeps={"lengths", "friedel"})
def intensity_random(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities drawn from one exponential distribution of mean 1, origin and absences included.

    Destroys: all that intensities tell, down to the absences that were stored as 0.
    Keeps: the place of the points.
    """
    return with_intensity(data, -torch.log(draws.uniform_P(1)[:, 0]))


@arm(
    "intensities",
    keeps={"lengths", "friedel", "laue", "absences"},
    strength=Strength("decades", "", identity=0, default=2, ladder=(0.25, 0.5, 1, 2), high=6),
)
def intensity_scaled(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """All intensities of a crystal, I(0) too, times one factor log-uniform over ± `decades`.

    Destroys: the absolute scale, hence electron density and mean atomic number.
    Keeps: the lattice, absences, Laue symmetry and all ratios of intensities inside a crystal.
    Limit: at 0 decades every factor is 1.
    """
    exponent_N = (2.0 * draws.uniform_N(1)[:, 0] - 1.0) * strength
    return with_intensity(data, data.intensity_P * (10.0**exponent_N)[data.crystal_P])


@arm("intensities", keeps={"lengths", "friedel", "laue", "absences"})
def intensity_rank(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each intensity replaced by the part of its crystal's points that is not stronger; absent: 0.

    Equivalent points share a rank. The origin takes part.

    Destroys: how much stronger one reflection is than another, and the absolute scale.
    Keeps: the order of intensities, hence Laue symmetry, and the absences.
    """
    mean = mean_of(data.intensity_P.double(), equivalents_P(data))
    rank = weaker_part(data.crystal_P, mean)
    return with_intensity(data, torch.where(data.intensity_P > 0, rank, 0.0))


@arm(
    "intensities",
    keeps={"lengths", "friedel", "laue", "absences", "density"},
    strength=Strength(
        "levels", "", identity=math.inf, default=2, ladder=(32, 8, 4, 2, 1), low=1, whole=True
    ),
)
def intensity_quantized(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Present intensities in k `levels` of equal population, each with the mean of its members.

    Equivalent points share a level.

    Destroys: differences between reflections of a level; 1 level is intensity_uniform.
    Keeps: the scattered sum, Laue symmetry, absences and I(0).
    Limit: infinitely many levels leave all as it is.
    """
    if math.isinf(strength):
        return data
    movable = ~origin_P(data) & (data.intensity_P > 0)
    crystal, intensity = data.crystal_P[movable], data.intensity_P.double()
    mean = mean_of(intensity, equivalents_P(data))[movable]
    level = torch.ceil(weaker_part(crystal, mean) * strength)
    intensity[movable] = mean_of(mean, groups_of(crystal, level))
    return with_intensity(data, intensity)


@arm("intensities", keeps={"lengths", "friedel", "laue", "absences", "density"})
def intensity_wilson(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities of a random structure: exponential about the mean of their shell of |q|.

    Wilson's acentric statistics (Acta Cryst. 2, 318 (1949)) with the mean over the present points
    of the crystal in a shell of 0.1 1/Å. Equivalent points share a draw.

    Destroys: where atoms sit in the cell.
    Keeps: the lattice, absences, Laue symmetry, the fall-off with |q|, I(0).
    """
    movable = ~origin_P(data) & (data.intensity_P > 0)
    intensity = data.intensity_P.double()
    shell = torch.floor(shell_length_P(data) / _WILSON_SHELL)[movable]
    mean = mean_of(intensity[movable], groups_of(data.crystal_P[movable], shell))
    drawn = -torch.log(draws.uniform_P(1)[:, 0])[first_of(equivalents_P(data))]
    intensity[movable] = mean * drawn[movable]
    return with_intensity(data, intensity)


@arm(
    "intensities",
    keeps={"lengths", "friedel", "laue", "absences", "density"},
    strength=Strength("B", "Å²", identity=0, default=2, ladder=(0.5, 1, 2, 4, 8), high=50),
)
def debye_waller(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Thermal motion of all atoms with one isotropic `B` in Å²: I exp(−B |q|²/2).

    With one B for all atoms this is exactly what featurization with b_iso = B gives.

    Destroys: intensities at large |q|, hence the sharpness of atoms.
    Keeps: the lattice, absences, Laue symmetry, I(0), ratios at equal |q|.
    Limit: at B = 0 the crystal is static.
    """
    squared = data.q_P3.double().square().sum(1)
    return with_intensity(data, data.intensity_P * torch.exp(-0.5 * strength * squared))


def _shuffled_among(data: CloudSet, group_P: Tensor, draws: Draws) -> CloudSet:
    movable = ~origin_P(data)
    intensity = data.intensity_P.clone()
    key = draws.uniform_P(1)[movable, 0]
    intensity[movable] = shuffled(intensity[movable], group_P[movable], key)
    return replace(data, intensity_P=intensity)
