"""Checkpoints: one safetensors file, written whole or not at all, never a pickle.

Tensors are stored under their names; everything else as JSON in the file's metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from cluster.errors import UserError
from cluster.files import replacing
from training.config import FEATURES


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Atomically write tensors and a JSON state to `path`."""
    # Clones: safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        # Not `save_file`, whose files nobody else may read.
        temporary.write_bytes(serialized(plain, metadata={"state": json.dumps(state)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises:
        UserError: no such file, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state: dict[str, Any] = json.loads(file.metadata()["state"])
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file", remedy="give the folder of a training run"
        ) from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint: {error}", remedy="train again") from None
    return tensors, state


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a finished model, which must be of this version's features.

    Raises:
        UserError: as `read`, or a model of other features.
    """
    tensors, state = read(path)
    if (theirs := state["identity"].get("features")) != FEATURES:
        raise UserError(
            f"{path} was trained on other features: version {theirs} there, {FEATURES} now",
            remedy="train again, or use the version of xtal that trained it",
        )
    return tensors, state


def check_signature(path: Path, signature: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a file of another training: `UserError` that names the first difference."""
    for part, asked in signature.items():
        for key, value in asked.items():
            if state[part].get(key) != value:
                raise UserError(
                    f"{path} belongs to another training: {key} = {state[part].get(key)!r} there, "
                    f"{value!r} now",
                    remedy="resume with the same configuration, or train into a new folder",
                )


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with a prefix and a dot before them."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    head = f"{prefix}."
    return {n.removeprefix(head): tensor for n, tensor in tensors.items() if n.startswith(head)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state of an optimizer whose state is tensors only (AdamW), by parameter index."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, part in state.items() for name, tensor in part.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; the parameter groups stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
