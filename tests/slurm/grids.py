"""Grids of small trials, and what they found, for tests and `benchmarks.survival`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SIX = (
    "none", "intensity_binary", "intensity_shuffled", "intensity_scaled", "directions_random",
    "basis_only",
)  # fmt: skip


def grid_file(
    path: Path, dataset: Path, *, arms: Sequence[str], seeds: int, epochs: int, width: int
) -> Path:
    """Write a grid of as many trials as arms times seeds; its path."""
    path.write_text(
        f"dataset = {json.dumps(str(dataset))}\narms = {json.dumps(arms)}\n"
        f'seeds = {list(range(seeds))}\n[training]\ntask = "crystal_system"\n'
        f"epochs = {epochs}\nwidth = {width}\n"
    )
    return path


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All that a grid found, but for how long it took."""
    table = pq.read_table(out / "results.parquet")
    kept = [name for name in table.column_names if name not in ("seconds", "commit")]
    return sorted(table.select(kept).to_pylist(), key=lambda row: str(row["trial"]))
