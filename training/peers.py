"""The workers that share each batch, as the loop sees them; dropout that is the same for all."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


class Peers(Protocol):
    """The workers that share each batch."""

    rank: int
    size: int

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the workers."""

    def gather(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """All workers' rows, interleaved: row i of worker r is row i·size + r of the answer."""


class Alone:
    """One worker."""

    rank = 0
    size = 1

    def sum(self, tensors: list[Tensor]) -> None:
        pass

    def gather(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows


class Dropout(nn.Dropout):
    """Dropout whose masks are drawn for the whole batch, of which a worker keeps its rows.

    All workers draw from the same seed: together they drop what one worker drops.
    """

    batch: int | None = None  # crystals of the whole batch; None: the input is all of it
    share = slice(None)

    def forward(self, input: Tensor) -> Tensor:
        """(B, …) → (B, …)."""
        if not self.training or self.batch in (None, len(input)):
            return super().forward(input)
        mask = super().forward(input.new_ones(self.batch, *input.shape[1:]))
        return input * mask[self.share]
