"""Checkpoints: one safetensors file, written whole or not at all, never a pickle.

Tensors are stored under their names; everything else as JSON in the file's metadata, and with it a
SHA-256 of all, which whoever reads the file compares.
"""

import hashlib
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
from training.config import FEATURES, TrainingConfig
from training.identity import first_difference, meaning

_CHECKSUM = "sha256"


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Atomically write tensors and a JSON state to `path`."""
    # Clones: safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    text = json.dumps({**state, _CHECKSUM: _digest(plain, json.dumps(dict(state)))})
    with replacing(path) as temporary:
        # Not `save_file`, whose files nobody else may read.
        temporary.write_bytes(serialized(plain, metadata={"state": text}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises:
        UserError: no such file, not one of ours, or a damaged one.
    """
    if path.is_dir():  # of which safetensors says that there is no such device
        raise UserError(f"{path} is a folder", remedy="put back the file, or train again")
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
    if _CHECKSUM not in state:
        raise UserError(
            f"{path} is of an older layout, without a checksum",
            remedy="train again, or use the version of xtal that trained it",
        )
    if state.pop(_CHECKSUM) != _digest(tensors, json.dumps(state)):
        raise UserError(
            f"{path} is damaged: its checksum is not that of its content",
            remedy="put back a copy of it, or train again",
        )
    return tensors, state


def read_model(
    path: Path, config: TrainingConfig, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a finished model, which must be the one that is asked for.

    Args:
        config: of this model alone, not of an ensemble or a blend.
        identity: of its run, as `training.identity`; None: whichever dataset it is of.

    Raises:
        UserError: as `read`, or a model of other features, settings, questions or crystals.
    """
    tensors, state = read(path)
    said: dict[str, Any] = state.get("identity", {})
    if (theirs := said.get("features")) != FEATURES:
        raise UserError(
            f"{path} was trained on other features: version {theirs} there, {FEATURES} now",
            remedy="train again, or use the version of xtal that trained it",
        )
    asked = (said if identity is None else dict(identity)) | meaning(config)
    for there, wanted in ((state.get("config", {}), config.deciding()), (said, asked)):
        if found := first_difference(there, wanted):
            raise UserError(
                f"{path} is not the model that its run's config.json describes: "
                f"{found[0]} = {found[1]!r} there, {found[2]!r} asked for",
                remedy="put back whichever of the two files was changed, or train again; a model "
                "of another version of xtal needs that version",
            )
    return tensors, state


def check_signature(path: Path, signature: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a file of another training: `UserError` that names the first difference."""
    for part, asked in signature.items():
        if found := first_difference(state.get(part, {}), asked):
            raise UserError(
                f"{path} belongs to another training: {found[0]} = {found[1]!r} there, "
                f"{found[2]!r} now",
                remedy="resume with the same configuration, or train into a new folder",
            )


def _digest(tensors: Mapping[str, Tensor], state: str) -> str:
    """Hex SHA-256 over names, types, shapes and bytes of tensors, and a state."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
