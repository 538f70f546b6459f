"""What trees see of each crystal, block by block.

Structures of a large set take hours to solve. A training keeps each block that is done in a folder
of its run until all its trees are grown, so that one that was stopped or killed goes on from there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import UserError
from training import checkpoint
from training.config import BoostedName, ModelName
from training.dataset import Clouds, CloudSet
from training.models.build import DESCRIPTIONS
from training.portions import blocks


def description(kind: ModelName, some: CloudSet) -> NDArray[np.float32]:
    """(N, F) of some crystals."""
    return DESCRIPTIONS[cast(BoostedName, kind)](some)


def descriptions(
    kind: ModelName,
    data: Clouds,
    kept: Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """(N, F) of all crystals, which need not be in memory.

    Args:
        kept: folder for blocks; None keeps none. Of a set of one block there is nothing to keep.
        identity: what kept blocks must be of, as `training.identity`.
    """
    every = [*blocks(data, torch.arange(len(data)))]
    if kept is None or len(every) < 2:
        return np.concatenate([description(kind, data.subset(rows.numpy())) for rows in every])
    answer = []
    for number, rows in enumerate(every):
        path = kept / f"{kind}-{number}.safetensors"
        state = {"identity": dict(identity or {}), "crystals": data.ids[rows.numpy()].tolist()}
        block = _read(path, state)
        if block is None:
            block = description(kind, data.subset(rows.numpy()))
            checkpoint.save(path, {"described": torch.from_numpy(block)}, state)
        answer.append(block)
    return np.concatenate(answer)


def _read(path: Path, state: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """A block, if there is a whole one of these crystals."""
    try:
        tensors, said = checkpoint.read(path)
    except UserError:  # none yet, or a damaged one: it is made again
        return None
    block: NDArray[np.float32] = tensors["described"].numpy()
    return block if said == state else None
