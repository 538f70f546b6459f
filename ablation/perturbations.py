"""Perturbations of the input: each takes a set of clouds and gives another, network untouched.

They act on the stored half of each cloud, one point of every pair ±q, so Friedel's law survives all
of them unless the docstring says otherwise. Random ones draw from the generator they are given and
are applied once, before training: every epoch sees the same perturbed pattern of a crystal.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch

from training.dataset import CloudSet

Perturbation = Callable[[CloudSet, torch.Generator], CloudSet]


def none(data: CloudSet, generator: torch.Generator) -> CloudSet:
    """The measured pattern: destroys nothing. The reference of every comparison."""
    return data


def intensity_binary(data: CloudSet, generator: torch.Generator) -> CloudSet:
    """Intensity 1 where a reflection is present, 0 where it is absent.

    Destroys: how strong reflections are, hence what scatters and where it sits in the cell.
    Keeps: the reciprocal lattice and the systematic absences (centring, screw axes, glides).
    """
    return replace(data, intensity_P=(data.intensity_P > 0).to(data.intensity_P.dtype))


def intensity_shuffled(data: CloudSet, generator: torch.Generator) -> CloudSet:
    """Intensities permuted among the points of each crystal; the origin keeps its own.

    Destroys: which reflection is how strong: the decay with |q|, the Laue symmetry of the
    intensities, the place of absences that were stored as 0.
    Keeps: the lattice, the distribution of intensities and I(0), the mean density.
    """
    movable = torch.nonzero(data.multiplicity_P > 1).squeeze(1)
    key = torch.rand(len(movable), generator=generator, dtype=torch.float64)
    by_key = torch.argsort(key)
    # Stable sort by crystal after a random order: a random order inside each crystal.
    order = by_key[torch.argsort(data.crystal_P[movable][by_key], stable=True)]
    intensity = data.intensity_P.clone()
    intensity[movable] = data.intensity_P[movable[order]]
    return replace(data, intensity_P=intensity)


def intensity_scaled(data: CloudSet, generator: torch.Generator) -> CloudSet:
    """All intensities of a crystal times one random factor, log-uniform in [0.01, 100].

    Destroys: the absolute scale, hence electron density and mean atomic number.
    Keeps: the lattice, absences and all ratios of intensities inside a crystal.
    """
    exponent = torch.rand(len(data), generator=generator, dtype=torch.float64) * 4.0 - 2.0
    factor = (10.0**exponent).to(data.intensity_P.dtype)
    return replace(data, intensity_P=data.intensity_P * factor[data.crystal_P])


def directions_random(data: CloudSet, generator: torch.Generator) -> CloudSet:
    """Each pair ±q turned to a random direction, uniform on the sphere.

    Destroys: all angles between reflections, hence the lattice's symmetry.
    Keeps: |q| and I of each point: what a powder pattern keeps, before peaks overlap.
    """
    random = torch.randn(len(data.q_P3), 3, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(random, dim=1)
    length = data.q_P3.double().norm(dim=1, keepdim=True)
    return replace(data, q_P3=(direction * length).to(data.q_P3.dtype))


def basis_only(data: CloudSet, generator: torch.Generator) -> CloudSet:
    """Only the three reciprocal basis vectors of the stored cell (100, 010, 001) and their mates.

    Destroys: all other reflections, hence nearly all that intensities tell of the content.
    Keeps: the metric of the cell, and the intensities of these three (0 if absent or not stored).
    """
    axes = torch.eye(3, dtype=data.hkl_P3.dtype)
    intensity_N3 = torch.zeros(len(data), 3, dtype=data.intensity_P.dtype)
    for axis in range(3):
        found = (data.hkl_P3 == axes[axis]).all(dim=1)
        intensity_N3[data.crystal_P[found], axis] = data.intensity_P[found]
    reciprocal_N33 = torch.linalg.inv(data.lattice_N33.double()).mT
    count = len(data)
    return replace(
        data,
        offsets=torch.arange(count + 1) * 3,
        hkl_P3=axes.repeat(count, 1),
        q_P3=reciprocal_N33.reshape(-1, 3).to(data.q_P3.dtype),
        intensity_P=intensity_N3.reshape(-1),
        multiplicity_P=torch.full((3 * count,), 2, dtype=data.multiplicity_P.dtype),
    )


ARMS: dict[str, Perturbation] = {
    arm.__name__: arm
    for arm in (
        none,
        intensity_binary,
        intensity_shuffled,
        intensity_scaled,
        directions_random,
        basis_only,
    )
}


def describe(name: str) -> str:
    """An arm's docstring as one paragraph."""
    return " ".join((ARMS[name].__doc__ or "").split())


def perturb(data: CloudSet, name: str, seed: int) -> CloudSet:
    """The arm applied to a whole set; the same (name, seed) gives the same clouds."""
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return ARMS[name](data, generator)
