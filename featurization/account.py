"""Every record of every source is a crystal, a reject, or known to be there already."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def unaccounted(folder: Path, manifest: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Where the account of a dataset does not come out even.

    Returns:
        (number of the source, shard, sentence) of each gap; the shard is "" where no single one
        is to blame.
    """
    rejected = rejected_records(folder)
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
    """Rows of a `rejects.csv`, in the order of `REJECT_COLUMNS`; none if there is no path."""
    if path is not None:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = csv.reader(stream)
            next(rows, None)
            yield from rows
