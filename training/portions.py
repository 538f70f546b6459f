"""Portions of a set whose clouds take little memory: blocks of all, a sample that stands for all.

How large they are depends on the crystals alone, never on the memory of a machine.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from training.dataset import Clouds

_BLOCK_CRYSTALS, _BLOCK_POINTS = 4096, 1 << 20  # worked on at a time
_SAMPLE_CRYSTALS, _SAMPLE_POINTS = 1 << 13, 1 << 22  # at most; 130 MB of points


def blocks(data: Clouds, rows: Tensor) -> Iterator[Tensor]:
    """Rows cut into parts whose clouds take little memory, each of at least one crystal."""
    ends = data.offsets.diff()[rows].cumsum(0)
    start = 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        room = int(torch.searchsorted(ends, before + _BLOCK_POINTS, right=True))
        stop = min(max(room, start + 1), start + _BLOCK_CRYSTALS)
        yield rows[start:stop]
        start = stop


def sample(data: Clouds, rows: Tensor) -> Tensor:
    """Evenly spaced ones of `rows`, in order: all, if they and their points are few.

    Args:
        rows: (n,) int64, at least one.

    Returns:
        At most 8,192 rows, at least one, of at most 4 million stored points if more than one.
    """
    lengths_N, count = data.offsets.diff(), min(len(rows), _SAMPLE_CRYSTALS)
    while True:
        chosen = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
        if count == 1 or int(lengths_N[chosen].sum()) <= _SAMPLE_POINTS:
            return chosen
        count //= 2
