"""Weights of a finished run → a new network: pre-train on one question, fine-tune on another."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cluster.config import build_config
from cluster.errors import UserError
from featurization.manifest import read_manifest
from training import checkpoint
from training.config import TrainingConfig, recorded
from training.dataset import Clouds, map_clouds
from training.mapped import reading
from training.split import SPLITS, Parts

_REMEDY = "choose another run for init, or the same settings as there"


def begin(network: nn.Module, config: TrainingConfig) -> None:
    """Give a network the weights and units of the run `config.init`.

    The layer that answers is kept as it is where the run answers other questions. Of an ensemble,
    the first member is taken.

    Raises:
        UserError: no finished run, another model or width, or a run whose training part holds
            crystals that this one is to be validated or tested with.
    """
    assert config.init is not None
    run = Path(config.init)
    theirs = _settings(run)
    for name in ("model", "width", "radiation"):
        own, other = getattr(config, name), getattr(theirs, name)
        if own != other:
            raise UserError(
                f"init = {config.init}: {name} is {other!r} there, {own!r} here",
                remedy=_REMEDY,
            )
    # The same hash places a group in each split: the smaller part lies in the larger one.
    for name in ("test", "validation"):
        own, other = (getattr(c, f"{name}_fraction") for c in (config, theirs))
        if own > other:
            raise UserError(
                f"init = {config.init}: its training saw crystals that are for {name} here, "
                f"since {name}_fraction is {other} there, {own} here",
                remedy=_REMEDY,
            )
    alone = theirs.model_copy(update={"members": 1})
    tensors, _ = checkpoint.read_model(weights(run), alone, recorded(run)["identity"])
    if theirs.questions != config.questions:
        assert isinstance(network.head, nn.Sequential)
        answering = f"head.{len(network.head) - 1}."
        kept = network.state_dict()
        tensors = {n: kept[n] if n.startswith(answering) else t for n, t in tensors.items()}
    network.load_state_dict(tensors)


def weights(run: Path) -> Path:
    """The file that a network begins with.

    Raises:
        UserError: no finished run.
    """
    path = (run if _settings(run).members == 1 else run / "member-0") / "model.safetensors"
    if not path.exists():
        raise UserError(f"init = {run}: its training has not finished", remedy="finish it first")
    return path


def check_formulas(run: Path, dataset: Path, data: Clouds, parts: Parts) -> None:
    """Refuse a run that was trained on formulas which are validated or tested with here.

    Of one dataset, `begin` compares the splits. Another one may name its groups otherwise, so that
    the same formula falls on another side.

    Args:
        dataset: the folder of `data`.

    Raises:
        UserError: such a run, or one whose dataset is no longer where it was.
    """
    theirs, said = _settings(run), recorded(run)
    folder, asked = Path(said["dataset"]), said["identity"]["content_hash"]
    if asked != read_manifest(dataset)["content_hash"]:
        if read_manifest(folder)["content_hash"] != asked:
            raise UserError(
                f"init = {run}: {folder} is no longer the dataset of its training, so that nobody "
                "knows which formulas it saw",
                remedy=_REMEDY,
            )
        others = map_clouds(folder, theirs.radiation)
        learned = others.ids[Parts.of(others, theirs).learned.numpy()]
        every = [own.rows[side] for own in (parts, *parts.others.values()) for side in SPLITS[1:]]
        held = data.ids[torch.cat(every).numpy()]
        if shared := _formulas(folder, learned) & _formulas(dataset, held):
            raise UserError(
                f"init = {run}: its training saw {len(shared)} formulas that are for validation or "
                f"test here, such as {min(shared)}",
                remedy="choose another run for init, of a dataset without them or with the same "
                "groups as here",
            )
    if theirs.init is not None:
        check_formulas(Path(theirs.init), dataset, data, parts)


def _settings(run: Path) -> TrainingConfig:
    said = recorded(run)["training"]
    return build_config(TrainingConfig, said, where=str(run / "config.json"))


def _formulas(folder: Path, ids: NDArray[np.str_]) -> set[str]:
    """Those of some crystals of a dataset."""
    found: set[str] = set()
    for row in read_manifest(folder)["shards"]:
        with reading(folder / row["file"]) as file:
            wanted = np.isin(file["id"].asstr()[:].astype(np.str_), ids)
            found.update(file["formula"].asstr()[:][wanted].tolist())
    return found
