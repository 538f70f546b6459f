"""A name in the configuration → a new model."""

from collections.abc import Callable, Mapping
from typing import Protocol, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import BoostedName, ModelName, NetworkName, TrainingConfig
from training.dataset import CloudBatch, Clouds, CloudSet
from training.models import atoms, baselines, descriptors, warmstart
from training.models.attention import Attention
from training.models.harmonic import Harmonic
from training.models.pointnet import PointNet
from training.models.powder_cnn import PowderCNN
from training.portions import sample

Network = PointNet | Harmonic | Attention | PowderCNN
Describe = Callable[[CloudSet], NDArray[np.float32]]

_NETWORKS: dict[NetworkName, type[Network]] = {
    "pointnet": PointNet,
    "harmonic": Harmonic,
    "attention": Attention,
    "powder_cnn": PowderCNN,
}

_WIDTHS: dict[ModelName, int] = {"pointnet": 256, "harmonic": 256}

# What a boosted model sees of each crystal, (N, F).
DESCRIPTIONS: dict[BoostedName, Describe] = {
    "boosted": descriptors.steady_invariants,
    "solved": atoms.description,
    "lattice_only": baselines.lattice,
    "powder": baselines.powder,
    "composition_only": baselines.composition,
    "majority": descriptors.nothing,
}


class Inputs(Protocol):
    """What a network's `prepare` makes of a set of clouds, once for all epochs."""

    def batch(self, rows_B: Tensor) -> Tensor | CloudBatch:
        """What the network is fed for some of the crystals."""


def is_boosted(name: ModelName) -> bool:
    """Whether a model is made of trees; otherwise it is a network."""
    return name in get_args(BoostedName)


def empty_network(config: TrainingConfig) -> Network:
    """The configured network with seeded weights, its units not set."""
    torch.manual_seed(config.seed)
    kind = _NETWORKS[cast(NetworkName, config.model)]
    classes = sum(len(question.classes) for question in config.questions)
    return kind(classes, config.width or _WIDTHS.get(config.model, 64))


def new_network(
    config: TrainingConfig,
    data: Clouds,
    train_rows: Tensor,
    units: Mapping[str, Tensor] | None = None,
) -> Network:
    """The configured network with seeded weights and units of the training crystals.

    Of many, or large ones, some that are evenly spaced give the units (`training.portions`). With
    `config.init` both are those of that run.

    Args:
        units: what `units_of` gives for these crystals, if it is known already.
    """
    network = empty_network(config)
    if config.init is not None:
        warmstart.begin(network, config)
        return network
    if units is not None:
        network.load_state_dict(network.state_dict() | dict(units))
        return network
    network.scale_to(data.subset(sample(data, train_rows).numpy()))
    return network


def units_of(network: Network) -> dict[str, Tensor]:
    """All that `scale_to` sets: of like crystals the same for every seed, width and task."""
    learned = {name for name, _ in network.named_parameters()}
    return {name: t for name, t in network.state_dict().items() if name not in learned}
