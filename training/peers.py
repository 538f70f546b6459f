"""The workers that share each batch, as the loop sees them."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


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
