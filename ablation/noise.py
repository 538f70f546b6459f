"""Arms that add the noise of a measurement to intensities and leave every point where it is."""

import math

import torch
from torch import Tensor

from ablation.arm import Strength, arm
from ablation.draws import Draws
from ablation.points import origin_P, sum_of, with_intensity
from training.dataset import CloudSet


@arm(
    "intensities",
    keeps={"lengths", "friedel", "absences", "density"},
    strength=Strength("σ", "", identity=0, default=0.5, ladder=(0.1, 0.2, 0.5, 1, 2), high=10),
)
def intensity_noise(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Log-normal noise: I exp(σ g − σ²/2) with g normal, of mean I, the same for both mates.

    Destroys: a growing part of what intensities tell; Laue symmetry at any σ > 0.
    Keeps: the lattice, absences, the expected intensities, I(0).
    Limit: at σ = 0 nothing changes.
    """
    noise = torch.exp(strength * draws.normal_P(1)[:, 0] - 0.5 * strength**2)
    kept = torch.where(origin_P(data), 1.0, noise)
    return with_intensity(data, data.intensity_P * kept)


@arm(
    "intensities",
    keeps={"lengths", "friedel", "density"},
    strength=Strength(
        "photons",
        "",
        identity=math.inf,
        default=1000,
        ladder=(1000000, 100000, 10000, 1000, 100),
        low=1,
        whole=True,
    ),
)
def intensity_counts(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Poisson counts of an exposure with N `photons` a crystal, scaled back; mates are merged.

    The photons fall on all points but the origin, which a beam stop covers.

    Destroys: weak reflections, which get no photon, and Laue symmetry by counting noise.
    Keeps: the lattice, the expected intensities, I(0); points that were absent stay absent.
    Limit: infinitely many photons leave all as it is.
    """
    if math.isinf(strength):
        return data
    movable = ~origin_P(data) & (data.intensity_P > 0)
    pair = (data.intensity_P.double() * data.multiplicity_P)[movable]
    photon = sum_of(pair, data.crystal_P[movable]) / strength
    counts = poisson(draws.uniform_P(1)[movable, 0], pair / photon)
    intensity = data.intensity_P.double()
    intensity[movable] = counts * photon / data.multiplicity_P[movable]
    return with_intensity(data, intensity)


def poisson(uniform: Tensor, mean: Tensor) -> Tensor:
    """Quantiles of Poisson's distribution: the least k with P(X ≤ k) ≥ uniform, both float64.

    From the expansion of Cornish and Fisher, step by step to where the exact distribution says.
    """
    z = torch.special.ndtri(uniform)
    k = torch.floor(mean + mean.sqrt() * z + (z * z - 1.0) / 6.0).clamp(min=0.0)
    todo = torch.nonzero(mean > 0).squeeze(1)
    k[mean <= 0] = 0.0
    while len(todo):
        here, u, m = k[todo], uniform[todo], mean[todo]
        up = torch.special.gammaincc(here + 1.0, m) < u
        down = (here > 0) & (torch.special.gammaincc(here.clamp(min=1.0), m) >= u)
        k[todo] = here + up.double() - down.double()
        todo = todo[up | down]
    return k
