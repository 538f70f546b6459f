"""The arms of an ablation: each takes a set of clouds and gives another, network untouched.

They act on the stored half of each cloud, one point of every pair ±q, so Friedel's law survives all
of them unless the docstring says otherwise. Random ones draw from `ablation.draws` and are applied
once, before training: every epoch sees the same perturbed pattern of a crystal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ablation.draws import Draws
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from training.dataset import CloudSet

Apply = Callable[[CloudSet, float, Draws], CloudSet]
Family = Literal["reference", "intensities", "positions", "extent", "radiation", "pose"]
PoseName = Literal["random", "axis", "fixed"]


@dataclass(frozen=True, slots=True)
class Strength:
    """What the strength of an arm means."""

    name: str
    unit: str  # "1/Å"; "" of a pure number
    identity: float  # where nothing changes
    default: float
    ladder: tuple[float, ...]  # doses of a dose–response curve, without the identity
    low: float = 0.0  # what is allowed
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class Arm:
    """One perturbation."""

    name: str
    family: Family
    apply: Apply  # pure; its strength is nan where there is none
    strength: Strength | None = None
    # The configuration that the clouds of this arm are featurized with, given strength and that
    # of the reference; None: they are those of the reference.
    featurization: Callable[[float, FeaturizationConfig], FeaturizationConfig] | None = None
    pose: PoseName | None = None  # what it sets `TrainingConfig.pose` to


def none(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The measured pattern: destroys nothing. The reference of every comparison."""
    return data


def intensity_binary(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensity 1 where a reflection is present, 0 where it is absent.

    Destroys: how strong reflections are, hence what scatters and where it sits in the cell.
    Keeps: the reciprocal lattice and the systematic absences (centring, screw axes, glides).
    """
    return replace(data, intensity_P=(data.intensity_P > 0).to(data.intensity_P.dtype))


def intensity_shuffled(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensities permuted among the points of each crystal; the origin keeps its own.

    Destroys: which reflection is how strong: the decay with |q|, the Laue symmetry of the
    intensities, the place of absences that were stored as 0.
    Keeps: the lattice, the distribution of intensities and I(0), the mean density.
    """
    movable = torch.nonzero((data.hkl_P3 != 0).any(dim=1)).squeeze(1)
    by_key = torch.argsort(draws.uniform_P(1)[movable, 0])
    # Stable sort by crystal after a random order: a random order inside each crystal.
    order = by_key[torch.argsort(data.crystal_P[movable][by_key], stable=True)]
    intensity = data.intensity_P.clone()
    intensity[movable] = data.intensity_P[movable[order]]
    return replace(data, intensity_P=intensity)


def intensity_scaled(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """All intensities of a crystal times one factor, log-uniform over ± `decades` (default 2).

    Destroys: the absolute scale, hence electron density and mean atomic number.
    Keeps: the lattice, absences and all ratios of intensities inside a crystal.
    """
    exponent_N = (2.0 * draws.uniform_N(1)[:, 0] - 1.0) * strength
    factor_P = (10.0**exponent_N)[data.crystal_P]
    return replace(data, intensity_P=(data.intensity_P * factor_P).to(data.intensity_P.dtype))


def directions_random(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Each pair ±q turned to a random direction, uniform on the sphere.

    Destroys: all angles between reflections, hence the lattice's symmetry.
    Keeps: |q| and I of each point: what a powder pattern keeps, before peaks overlap.
    """
    direction = torch.nn.functional.normalize(draws.normal_P(3), dim=1)
    length = data.q_P3.double().norm(dim=1, keepdim=True)
    return replace(data, q_P3=(direction * length).to(data.q_P3.dtype))


def basis_only(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Only the three reciprocal basis vectors of the stored cell (100, 010, 001) and their mates.

    Destroys: all other reflections, hence nearly all that intensities tell of the content.
    Keeps: the metric of the cell, and the intensities of these three (0 if absent or not stored).
    """
    axes = torch.eye(3, dtype=data.hkl_P3.dtype, device=data.hkl_P3.device)
    intensity_N3 = data.intensity_P.new_zeros(len(data), 3)
    for axis in range(3):
        found = (data.hkl_P3 == axes[axis]).all(dim=1)
        intensity_N3[data.crystal_P[found], axis] = data.intensity_P[found]
    reciprocal_N33 = torch.linalg.inv(data.lattice_N33.double()).mT
    count = len(data)
    return replace(
        data,
        offsets=torch.arange(count + 1, device=data.offsets.device) * 3,
        hkl_P3=axes.repeat(count, 1),
        q_P3=reciprocal_N33.reshape(-1, 3).to(data.q_P3.dtype),
        intensity_P=intensity_N3.reshape(-1),
        multiplicity_P=data.multiplicity_P.new_full((3 * count,), 2),
    )


_DECADES = Strength("decades", "", identity=0.0, default=2.0, ladder=(0.25, 0.5, 1.0, 2.0), high=6)

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("none", "reference", none),
        Arm("intensity_binary", "intensities", intensity_binary),
        Arm("intensity_shuffled", "intensities", intensity_shuffled),
        Arm("intensity_scaled", "intensities", intensity_scaled, _DECADES),
        Arm("directions_random", "positions", directions_random),
        Arm("basis_only", "extent", basis_only),
    )
}


def describe(name: str) -> str:
    """An arm's docstring as one paragraph."""
    return " ".join((ARMS[name].apply.__doc__ or "").split())


def strength_of(name: str, strength: float | None) -> float:
    """The strength that an arm is applied with: nan where it has none, None its default.

    Raises:
        UserError: a strength for an arm without, or one that is not allowed.
    """
    known = ARMS[name].strength
    if known is None:
        if strength is not None and not math.isnan(strength):
            raise UserError(
                f"arm {name} has no strength, {strength:g} given", remedy="leave it out"
            )
        return math.nan
    asked = known.default if strength is None else float(strength)
    if not (known.low <= asked <= known.high or asked == known.identity):
        raise UserError(
            f"arm {name}: {known.name} = {asked:g}; must be {known.low:g} to {known.high:g}",
            remedy=f"it changes nothing at {known.identity:g}; common are "
            f"{', '.join(f'{dose:g}' for dose in known.ladder)}",
        )
    return asked


def featurization_of(
    name: str, strength: float | None, config: FeaturizationConfig
) -> FeaturizationConfig:
    """What the clouds of an arm are featurized with, given that of the reference; often the same.

    Raises:
        UserError: as `strength_of`.
    """
    dose, change = strength_of(name, strength), ARMS[name].featurization
    return config if change is None else change(dose, config)


def perturb(data: CloudSet, name: str, strength: float | None, seed: int) -> CloudSet:
    """The arm applied to a whole set of clouds that were featurized for it.

    The same (name, strength, seed) gives a crystal the same cloud in whatever set it stands.

    Raises:
        UserError: as `strength_of`.
    """
    dose = strength_of(name, strength)
    return ARMS[name].apply(data, dose, Draws(name, seed, data))
