"""What a network is fed of each crystal, made once for all epochs by all workers together.

Inputs of a fixed size (coefficients, tokens, profiles) are kept in memory if they take at most half
of what is free there, else in a file of the run's folder that has no name and goes with the
process. A network that sees the points themselves is fed the clouds.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster import memory
from training.dataset import CloudBatch, Clouds
from training.models.build import Inputs, Network
from training.peers import Peers
from training.portions import blocks


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of a fixed size, in memory or mapped from a file."""

    values_N: Tensor  # (N, …) float32

    def batch(self, rows_B: Tensor) -> Tensor:
        """Those of some crystals."""
        return self.values_N.index_select(0, rows_B)  # half the time of self.values_N[rows_B]


def prepared(model: Network, data: Clouds, peers: Peers, folder: Path) -> Inputs:
    """What `model.prepare` gives for a whole set; each worker makes its part, all get all.

    Args:
        folder: of the file, if it needs one.
    """
    answer: Tensor | None = None
    for rows in blocks(data, torch.arange(len(data))):
        mine = rows[peers.rank :: peers.size]
        made = model.prepare(data.subset(mine.numpy())).batch(torch.arange(len(mine)))
        if isinstance(made, CloudBatch):
            return data
        whole = torch.from_numpy(peers.gather(made.flatten(1).numpy()))
        if answer is None:
            answer = _room((len(data), *made.shape[1:]), peers.size, folder)
        answer[rows] = whole.unflatten(1, made.shape[1:])
    assert answer is not None, "no crystals"
    return Rows(answer)


def _room(shape: tuple[int, ...], sharers: int, folder: Path) -> Tensor:
    if sharers * 4 * int(np.prod(shape)) <= memory.available() // 2:
        return torch.empty(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        # Without room the kernel would end this process at its first write into a hole.
        os.posix_fallocate(file.fileno(), 0, 4 * int(np.prod(shape)))
        return torch.from_numpy(np.memmap(file, np.float32, mode="w+", shape=shape))
