"""Arms that act before the clouds exist, or while they are trained on.

Those with a featurization get clouds of their own from the same crystals, each dataset made once
and shared by all trials that want it; their functions pass the clouds on. Poses are a setting of
the training.
"""

from functools import partial

import torch

from ablation.arm import arm
from ablation.draws import Draws
from ablation.points import with_intensity
from featurization.config import FeaturizationConfig, RadiationName, ScattererName
from training.dataset import CloudSet


def _scatterers(name: ScattererName, _: float, config: FeaturizationConfig) -> FeaturizationConfig:
    return config.model_copy(update={"scatterers": name})


def _radiation(name: RadiationName, _: float, config: FeaturizationConfig) -> FeaturizationConfig:
    return config.model_copy(update={"radiation": name, "also_radiation": ()})


def _filled(_: float, config: FeaturizationConfig) -> FeaturizationConfig:
    return config.model_copy(update={"absences": "keep"})


@arm(
    "intensities",
    keeps={"friedel", "laue", "density"},
    featurization=partial(_scatterers, "points"),
)
def point_atoms(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Every atom scatters like a point, with its f(0) at all |q|; featurized so.

    Destroys: the fall-off of form factors, hence the sizes of atoms.
    Keeps: lattice, space group, Laue symmetry, I(0), where atoms sit and how heavy they are.
    Neutrons see it no other way.
    """
    return data


@arm("intensities", keeps={"friedel", "laue"}, featurization=partial(_scatterers, "alike"))
def scatterers_alike(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Every atom scatters like silicon: the geometry of the sites alone; featurized so.

    Destroys: which atom is which; the density that remains is that of their number.
    Keeps: the sites, Laue symmetry; reflections that only a difference of atoms made are gone.
    """
    return data


@arm("intensities", keeps={"friedel", "laue"}, featurization=partial(_scatterers, "permuted"))
def species_permuted(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The elements of a crystal trade places in a cycle drawn from its id; featurized so.

    Crystals of one element stay as they are. The seed of a training does not enter: one dataset
    serves all.

    Destroys: which element sits where, and with unequal numbers of sites the stoichiometry.
    Keeps: the lattice, the sites, Laue symmetry, the set of elements.
    """
    return data


@arm("positions", keeps={"friedel", "laue"}, featurization=_filled)
def lattice_filled(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Intensity 1 at every point of the reciprocal lattice; featurized with absences kept.

    Destroys: intensities and all absences, hence centring beyond the stored cell, screw axes,
    glides: the content of the cell altogether.
    Keeps: the lattice of the stored cell and its symmetry.
    """
    return with_intensity(data, torch.ones_like(data.intensity_P))


@arm("radiation", keeps={"friedel", "laue"}, featurization=partial(_radiation, "xray"))
def radiation_xray(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """X-rays, which electrons scatter; featurized so.

    Destroys: what another radiation saw, where the reference is one.
    Keeps: the lattice and its space group.
    """
    return data


@arm("radiation", keeps={"friedel", "laue"}, featurization=partial(_radiation, "neutron"))
def radiation_neutron(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Neutrons, which nuclei scatter, without fall-off in |q|; featurized so.

    Destroys: the link between an intensity and the number of electrons.
    Keeps: the lattice and its space group; some elements are hardly seen, so more is absent.
    """
    return data


@arm("radiation", keeps={"friedel", "laue"}, featurization=partial(_radiation, "electron"))
def radiation_electron(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Electrons, which the electrostatic potential scatters, in kinematic theory; featurized so.

    Destroys: the weight of heavy atoms in part: light ones are seen better, small |q| stronger.
    Keeps: the lattice and its space group.
    """
    return data


@arm(
    "pose",
    keeps={"lengths", "intensities", "absences", "density", "friedel", "laue", "powder"},
    pose="fixed",
)
def pose_fixed(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Training without rotations: every crystal in its stored pose, axes along the Cartesian ones.

    Destroys: that a network without built-in invariance must learn it.
    Keeps: the cloud.
    """
    return data


@arm(
    "pose",
    keeps={"lengths", "intensities", "absences", "density", "friedel", "laue", "powder"},
    pose="axis",
)
def pose_axis(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """Training with rotations about the Cartesian z axis of the stored pose only.

    Destroys: that a network without built-in invariance must learn it about the other axes.
    Keeps: the cloud.
    """
    return data
