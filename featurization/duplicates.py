"""Crystals of one id, found by all ranks together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.mpi import Ranks
from featurization.resume import id_hash
from featurization.shards import read_ids

# Crystals whose hashes rank 0 holds at a time, 32 bytes each.
_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class Double:
    """A crystal whose id came before."""

    index: int  # `source_index`
    id: str
    file: str  # its shard
    first: int  # `source_index` of the first crystal of this id


def duplicates(out: Path, rows: Sequence[dict[str, Any]], ranks: Ranks) -> list[Double]:
    """All but the first of each id, in source order; every rank calls this, rank 0 gets them.

    Ids are hashed by all ranks and compared on rank 0, in passes over parts of the hashes, so that
    its memory does not grow with their number.

    Args:
        rows: of the manifest, of shards that are there; the same on each rank.
    """
    passes = -(-sum(row["structures"] for row in rows) // _AT_ONCE)
    found: list[Double] = []
    for number in range(passes):
        mine = [np.zeros((0, 4), np.int64)]
        for shard in range(ranks.rank, len(rows), ranks.size):
            ids, index = read_ids(out / rows[shard]["file"])
            hashed = np.array([id_hash(id_) for id_ in ids], np.uint64)
            rest = np.flatnonzero(hashed % np.uint64(passes) == number)
            place = np.full(len(rest), shard)
            mine.append(np.stack([hashed[rest].view(np.int64), index[rest], place, rest], axis=1))
        gathered = ranks.gather(np.concatenate(mine))
        if gathered is not None:
            found += _resolved(out, rows, np.concatenate(gathered))
    return sorted(found, key=lambda double: double.index)


def _resolved(out: Path, rows: Sequence[dict[str, Any]], table: NDArray[np.int64]) -> list[Double]:
    """`table` has a row (hash, source index, shard, position in it) a crystal."""
    hashed = table[:, 0]
    order = np.lexsort((table[:, 1], hashed))
    equal = hashed[order][1:] == hashed[order][:-1]
    suspects = table[order[np.append(equal, False) | np.insert(equal, 0, False)]]
    texts = {s: read_ids(out / rows[s]["file"])[0] for s in np.unique(suspects[:, 2]).tolist()}
    first: dict[str, int] = {}
    found = []
    for _, index, shard, position in suspects[np.argsort(suspects[:, 1])].tolist():
        id_ = texts[shard][position]
        if id_ in first:
            found.append(Double(index, id_, rows[shard]["file"], first[id_]))
        first.setdefault(id_, index)
    return found
