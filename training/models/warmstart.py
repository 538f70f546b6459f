"""Weights of a finished run → a new network: pre-train on one question, fine-tune on another."""

from pathlib import Path

from torch import nn

from cluster.config import build_config
from cluster.errors import UserError
from training import checkpoint
from training.config import TrainingConfig, recorded

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
    where = str(run / "config.json")
    theirs = build_config(TrainingConfig, recorded(run)["training"], where=where)
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
    folder = run if theirs.members == 1 else run / "member-0"
    tensors, _ = checkpoint.read_model(folder / "model.safetensors")
    if theirs.questions != config.questions:
        assert isinstance(network.head, nn.Sequential)
        answering = f"head.{len(network.head) - 1}."
        kept = network.state_dict()
        tensors = {n: kept[n] if n.startswith(answering) else t for n, t in tensors.items()}
    network.load_state_dict(tensors)
