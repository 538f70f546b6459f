"""The columns of shards as memory-mapped files: read where they are touched, held nowhere.

Shards are contiguous and uncompressed, so that a column is an array at an offset of its file. Each
process maps them itself; of what it has read, the kernel keeps what there is room for.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cluster.errors import UserError
from cluster.files import sha256_of

_MOST_OPEN = 256  # files; a process may often have no more than 1024
_Place = tuple[np.dtype[Any], tuple[int, ...], int]  # type, shape, offset in bytes


class MappedColumns:
    """Columns with a row a point, of many shards.

    Args:
        paths: shards, at least one.
        columns: name in a shard → type that `gather` gives.

    Raises:
        UserError: a shard that is not as `featurization.shards` writes it.
    """

    def __init__(self, paths: Sequence[Path], columns: dict[str, DTypeLike]) -> None:
        self._types = {name: np.dtype(kind) for name, kind in columns.items()}
        self._paths = list(paths)
        self._places = [_places(path, list(columns)) for path in paths]
        self._map = lru_cache(maxsize=_MOST_OPEN)(_map)

    def gather(
        self, shard_B: NDArray[np.int64], first_B: NDArray[np.int64], length_B: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Name → values of the points of some crystals, one crystal after the other.

        Args:
            shard_B: the shard that each crystal is in; `first_B` the row of its first point there.
        """
        begin_B, total = np.cumsum(length_B) - length_B, int(length_B.sum())
        answer = {
            name: np.empty((total, *self._places[0][name][1][1:]), kind)
            for name, kind in self._types.items()
        }
        order = np.argsort(shard_B, kind="stable")
        # A loop over the shards that are touched, not over crystals.
        for rows in np.split(order, np.flatnonzero(np.diff(shard_B[order])) + 1):
            length = length_B[rows]
            if not length.sum():
                continue
            within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            there = np.repeat(first_B[rows], length) + within
            here = np.repeat(begin_B[rows], length) + within
            shard = int(shard_B[rows[0]])
            content = self._map(self._paths[shard])
            for name, (kind, shape, offset) in self._places[shard].items():
                answer[name][here] = np.ndarray(shape, kind, content, offset)[there]
        return answer


@contextmanager
def reading(shard: Path) -> Iterator[h5py.File]:
    """A shard, open.

    Raises:
        UserError: it is missing or damaged; the error says how to mend it.
    """
    try:
        with h5py.File(shard, "r", locking=False) as file:
            yield file
    except (OSError, KeyError) as error:
        dataset = shard.parents[1]
        raise UserError(
            f"{shard} is missing or damaged: {error}", remedy=f"xtal verify {dataset} --repair"
        ) from None


def check(shard: Path, sha256: str) -> None:
    """Raises a UserError unless the shard is byte for byte what the manifest says."""
    if sha256_of(shard) != sha256:
        raise UserError(
            f"{shard} is damaged: its checksum is not the manifest's",
            remedy=f"xtal verify {shard.parents[1]} --repair",
        )


def _places(path: Path, names: list[str]) -> dict[str, _Place]:
    """Where each column that is not empty lies; an empty one is at 0."""
    answer: dict[str, _Place] = {}
    with reading(path) as file:
        for name in names:
            column = file[name]
            offset = column.id.get_offset()
            if offset is None and column.size:
                raise UserError(
                    f"{path}: {name} is compressed or chunked and cannot be mapped",
                    remedy="featurize again with this version",
                )
            answer[name] = column.dtype, column.shape, offset or 0
    return answer


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
