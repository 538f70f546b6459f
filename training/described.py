"""What trees see of each crystal, block by block.

Structures of a large set take hours to solve. A training keeps each block that is done in a folder
of its run until it has been evaluated: one that was stopped or killed goes on from there, and no
crystal is solved twice.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from training import checkpoint
from training.config import BoostedName, ModelName
from training.dataset import Clouds, CloudSet
from training.models.build import DESCRIPTIONS
from training.portions import blocks


@dataclass(frozen=True, slots=True)
class Kept:
    """Described blocks in a folder: `KIND-NUMBER.safetensors`."""

    folder: Path
    identity: Mapping[str, Any]  # of the training that they are of, as `training.identity`

    @classmethod
    def of(cls, run: Path, identity: Mapping[str, Any]) -> "Kept":
        """Those of a run, which may have none."""
        return cls(run / "described", identity)

    def discard(self) -> None:
        """Delete them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def description(kind: ModelName, some: CloudSet) -> NDArray[np.float32]:
    """(N, F) of some crystals."""
    return DESCRIPTIONS[cast(BoostedName, kind)](some)


def descriptions(
    kind: ModelName, data: Clouds, rows: Tensor, kept: Kept | None = None
) -> NDArray[np.float32]:
    """(n, F) of the crystals `rows`, at least one, of a set that need not be in memory.

    Args:
        kept: blocks that are read rather than described, and written where all of a block is
            described. Of a set of one block none is kept.
    """
    whole = [*blocks(data, torch.arange(len(data)))]
    answer: NDArray[np.float32] | None = None
    for number, block in enumerate(whole):
        here = ((rows >= block[0]) & (rows <= block[-1])).nonzero().flatten()
        if not len(here):
            continue
        if kept is None or len(whole) < 2:
            part = description(kind, data.subset(rows[here].numpy()))
        else:
            path = kept.folder / f"{kind}-{number}.safetensors"
            part = _read_or_described(kind, data, block, rows[here], path, kept.identity)
        if answer is None:
            answer = np.empty((len(rows), part.shape[1]), np.float32)
        answer[here.numpy()] = part
    assert answer is not None
    return answer


def _read_or_described(
    kind: ModelName,
    data: Clouds,
    block: Tensor,
    rows: Tensor,
    path: Path,
    identity: Mapping[str, Any],
) -> NDArray[np.float32]:
    """(n, F) of those crystals of a block that are `rows`."""
    state = {"identity": dict(identity), "crystals": data.ids[block.numpy()].tolist()}
    if (found := _read(path, state)) is not None:
        mine: NDArray[np.float32] = found[(rows - block[0]).numpy()]
        return mine
    part = description(kind, data.subset(rows.numpy()))
    if rows.equal(block):
        checkpoint.save(path, {"described": torch.from_numpy(part)}, state)
    return part


def _read(path: Path, state: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """A block, if there is a whole one of these crystals."""
    try:
        tensors, said = checkpoint.read(path)
    except UserError:  # none yet, or a damaged one: it is made again
        return None
    block: NDArray[np.float32] = tensors["described"].numpy()
    return block if said == state else None
