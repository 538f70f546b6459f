"""Every record of every source is a crystal, a reject, or known to be there already."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError


def unaccounted(
    manifest: dict[str, Any], rejected: NDArray[np.int64]
) -> list[tuple[int, str, str]]:
    """Where the account of a dataset does not come out even.

    Args:
        rejected: `source_index` of all rejects, ascending, see `rejected_records`.

    Returns:
        (number of the source, shard, sentence) of each gap; the shard is "" where no single one
        is to blame.
    """
    answers: list[tuple[int, str, str]] = []
    first = 0
    for number, part in enumerate(manifest["sources"]):
        rows = [row for row in manifest["shards"] if row["part"] == number]
        free = part["without_shard"]
        spans = sorted(tuple(span) for row in [*rows, free] for span in row["records"])
        ends = [0, *(stop for _, stop in spans)]
        starts = [*(start for start, _ in spans), part["records"]]
        if starts != ends:
            gap = f"shards and rejects do not cover the records of source {number}"
            answers.append((number, "", gap))
        for row in [*rows, free]:
            records = sum(stop - start for start, stop in row["records"])
            lost = records - row.get("structures", 0) - row["present"]
            lost -= rejects_within(rejected - first, row["records"])
            if lost:
                name = row.get("file", "")
                what = name or f"records of source {number} without a shard"
                few = "few" if lost > 0 else "many"
                answers.append((number, name, f"{what}: {abs(lost)} records too {few}"))
        first += part["records"]
    return answers


def rejected_records(folder: Path) -> NDArray[np.int64]:
    """`source_index` of the rows of `rejects.csv`, ascending."""
    found = np.array([int(row[3]) for row in read_rejects(folder / "rejects.csv")], np.int64)
    return np.sort(found)


def rejects_within(rejected: NDArray[np.int64], ranges: list[tuple[int, int]]) -> int:
    """How many of sorted record numbers lie in the ranges."""
    return sum(int(np.diff(np.searchsorted(rejected, span))[0]) for span in ranges)


def read_rejects(path: Path | None) -> Iterator[list[str]]:
    """Rows of a `rejects.csv`, in the order of `REJECT_COLUMNS`; none if there is no path.

    Raises:
        UserError: it is missing, or no such table.
    """
    if path is None:
        return
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = _rows(stream)
            next(rows, None)
            for row in rows:
                if len(row) != 4 or not row[3].isdecimal():
                    raise ValueError(f"a row {','.join(row)[:100]!r}")
                yield row
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {error}", remedy=f"xtal verify {path.parent} --repair"
        ) from None


def _rows(stream: TextIO) -> Iterator[list[str]]:
    reader = csv.reader(stream, strict=True)
    while True:
        # Of all readers in a process: what we wrote can be of any length, a source must not be.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        yield row
