"""Milliseconds a structure of each stage of featurization, on one core.

    python -m benchmarks.featurization SOURCE [COUNT] > benchmarks/results/DATE-featurization.md

Stages are timed one after the other on the same crystals in one process; the symmetry search of
spglib, which `standardize` could have been built on, runs beside it for the ratio.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import spglib

from cluster.provenance import provenance
from featurization.cells import standardize
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal
from featurization.shards import Entry, write_shard
from featurization.sources import open_source


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the CPU seconds of this process (the machine may be shared)."""
    start = time.process_time()
    return work(), time.process_time() - start


def spglib_primitive(crystal: Crystal) -> Any:
    numbers = np.unique(crystal.species, return_inverse=True)[1]
    cell = (crystal.lattice, crystal.positions, numbers)
    return spglib.get_symmetry_dataset(cell, symprec=0.1), spglib.find_primitive(cell, symprec=0.1)


def main() -> None:
    source = open_source(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    records, stream_s = timed(lambda: list(islice(source.records(), count)))
    crystals, parse_s = timed(lambda: [source.parse(record) for record in records])
    standard, symmetry_s = timed(lambda: [standardize(c, "primitive", 0.1) for c in crystals])
    _, spglib_s = timed(lambda: [spglib_primitive(c) for c in crystals])
    rows = [
        ("stream records", stream_s, ""),
        ("parse and validate", parse_s, ""),
        ("symmetry and primitive cell (moyopy, checked)", symmetry_s, ""),
        ("for comparison: spglib dataset + primitive", spglib_s, f"{spglib_s / symmetry_s:.1f} ×"),
    ]
    for selection in ("miller:3", "sphere:1.2"):
        config = FeaturizationConfig(selection=selection)
        clouds, cloud_s = timed(lambda c=config: [diffraction_cloud(s, c) for s, _ in standard])
        points = sum(len(cloud.hkl) for cloud in clouds) / len(clouds)
        entries = [
            Entry(c.id, c.reduced_formula, c.reduced_formula, i, cloud, s.lattice, symmetry, {})
            for i, (c, (s, symmetry), cloud) in enumerate(
                zip(crystals, standard, clouds, strict=True)
            )
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "shard.h5"
            _, write_s = timed(lambda p=path, e=entries, c=config: write_shard(p, e, c))
        rows.append((f"diffraction, {selection}", cloud_s, f"{points:.0f} points stored"))
        rows.append((f"hash and write, {selection}", write_s, ""))
    made = provenance()
    atoms = sum(len(c.species) for c in crystals) / len(crystals)
    print(f"# Featurization, {made['created']}\n")
    print(f"Commit {made['commit']}; {made['hardware']}; one core, CPU time.")
    print(f"{len(crystals)} crystals of {atoms:.1f} atoms on average.\n")
    print("| stage | ms a structure | |\n|---|---|---|")
    for name, seconds, note in rows:
        print(f"| {name} | {1e3 * seconds / len(crystals):.3f} | {note} |")


if __name__ == "__main__":
    main()
