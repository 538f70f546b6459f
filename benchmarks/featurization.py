"""Milliseconds a crystal of featurization on one core, beside what it could have been built on.

    OMP_NUM_THREADS=1 python -m benchmarks.featurization SOURCE [COUNT] > DATE-featurization.md

SOURCE holds documents of the Materials Project, COUNT of which are taken (2000). All that is
compared takes turns on batches of the same crystals in one process; times are CPU times of that
process, kernels and tables warmed up. Rivals must give our intensities, or the run fails.
"""

import csv
import gc
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import moyopy
import numpy as np
import spglib

from benchmarks import rivals
from benchmarks.model import print_table
from benchmarks.rivals import SYMPREC
from cluster.mpi import OneProcess
from cluster.provenance import provenance
from featurization import kernel
from featurization.cells import standardize
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, Reject
from featurization.featurize import featurize
from featurization.records import Record, Source
from featurization.shards import Entry, write_shard
from featurization.sources import open_source
from featurization.worker import featurize_one

BATCH = 50
MILLER, SPHERE = "miller:3", "sphere:1.2"
CONFIGS = {name: FeaturizationConfig(selection=name) for name in (MILLER, SPHERE)}
CUBE = np.stack(np.meshgrid(*3 * [np.arange(-3, 4)], indexing="ij"), axis=-1).reshape(-1, 3)
# What the original needs for a crystal; measured elsewhere.
ORIGINAL = 12.3e-3  # s

READ, PARSE = {}, {}
READ[".jsonl"], PARSE[".jsonl"] = "read JSON Lines", "parse and validate a document"
READ[".csv"], PARSE[".csv"] = "read CSV", "parse and validate a CIF"
GEMMI_CIF, PYMATGEN_CIF = "— gemmi: CIF → sites, nothing checked", "— pymatgen: CifParser"
CELL, MOYO = "symmetry and checked primitive cell", "… of it moyopy's search"
SPGLIB, PYMATGEN = "— spglib: dataset", "— pymatgen: SpacegroupAnalyzer, primitive cell"
CLOUD, WRITE = "diffraction, ", "hash and write, "
OURS, KERNEL = "ours, whole `diffraction_cloud`", "… of it the compiled kernel"
VECTOR = "NumPy, one expression a crystal"
GEMMI, CALLS = "gemmi, direct sum, a call a point", "… of it calls: a cell without atoms"
LOOP = "NumPy, one expression a point, all 343"
EIGHT, ALL = "8 atoms", "all"

SECONDS: dict[tuple[str, str], float] = defaultdict(float)  # (what, which crystals) → CPU time
COUNTED: dict[str, Any] = {}  # which crystals → their number, atoms, `rivals.operations`
Item = TypeVar("Item")
Result = TypeVar("Result")


def timed(
    name: str, work: Callable[[Item], Result], items: Iterable[Item], which: str = ""
) -> list[Result]:
    """Work on each item; its CPU time is added to `SECONDS`."""
    start = time.process_time()
    results = list(map(work, items))
    SECONDS[name, which] += time.process_time() - start
    return results


def as_it_is(record: Record) -> Record:
    return record


def write_sources(spec: str, count: int, folder: Path) -> int:
    """crystals.jsonl and crystals.csv of the crystals that are not rejected; how many."""
    source, done = open_source(spec), 0
    with (folder / "crystals.jsonl").open("wb") as lines, (folder / "crystals.csv").open("w") as t:
        table = csv.writer(t)
        table.writerow(["material_id", "cif"])
        for record in source.records():
            try:
                entry = featurize_one(source, record, CONFIGS[SPHERE])
            except Reject:
                continue
            lines.write(record.payload)
            table.writerow([entry.id, rivals.p1_cif(source.parse(record))])
            done += 1
            if done == count:
                break
    return done


def turn(
    sources: list[Source], streams: list[Iterator[Record]], entries: dict[str, list[Entry]]
) -> list[Crystal]:
    """One batch through everything; the standardized crystals."""
    documents = timed(READ[".jsonl"], as_it_is, islice(streams[0], BATCH))
    cifs = timed(READ[".csv"], as_it_is, islice(streams[1], BATCH))
    crystals = timed(PARSE[".jsonl"], sources[0].parse, documents)
    timed(PARSE[".csv"], sources[1].parse, cifs)
    texts = [row.payload[1] for row in cifs]
    timed(GEMMI_CIF, rivals.gemmi_parse, texts)
    structures = timed(PYMATGEN_CIF, rivals.pymatgen_parse, texts)
    numbers = [np.unique(c.species, return_inverse=True)[1].tolist() for c in crystals]
    cells = [
        (c.lattice.tolist(), c.positions.tolist(), n)
        for c, n in zip(crystals, numbers, strict=True)
    ]
    given = [moyopy.Cell(*cell) for cell in cells]
    standard = timed(CELL, partial(standardize, cell="primitive", symprec=SYMPREC), crystals)
    timed(MOYO, rivals.moyo_search, given)
    timed(SPGLIB, partial(spglib.get_symmetry_dataset, symprec=SYMPREC), cells)
    timed(PYMATGEN, rivals.pymatgen_primitive, structures)
    primitive = [c for c, _ in standard]
    for name, config in CONFIGS.items():
        clouds = timed(CLOUD + name, partial(diffraction_cloud, config=config), primitive)
        for (s, symmetry), cloud in zip(standard, clouds, strict=True):
            formula = s.reduced_formula
            place = len(entries[name])
            entry = Entry(s.id, formula, formula, place, cloud, s.lattice, symmetry, s.labels)
            entries[name].append(entry)
    return primitive


def diffract(crystals: list[Crystal], group: str) -> None:
    """The same points by us and by others."""
    clouds = timed(OURS, partial(diffraction_cloud, config=CONFIGS[MILLER]), crystals, group)
    inputs = [rivals.kernel_input(c) for c in crystals]
    timed(KERNEL, lambda each: kernel.cloud(*each), inputs, group)
    half = [cloud.hkl.astype(np.int64) for cloud in clouds]
    pairs = list(zip(crystals, half, strict=True))
    vectors = timed(VECTOR, lambda each: rivals.vectorized(*each), pairs, group)
    full, empty = (
        [(rivals.gemmi_structure(c, atoms), hkl.tolist()) for c, hkl in pairs]
        for atoms in (True, False)
    )
    sums = timed(GEMMI, lambda each: rivals.gemmi_sum(*each), full, group)
    timed(CALLS, lambda each: rivals.gemmi_sum(*each), empty, group)
    loops = timed(LOOP, partial(rivals.loop, hkl=CUBE), crystals, group)
    for i, (crystal, hkl) in enumerate(pairs):
        ours, volume = clouds[i].intensity, kernel.reciprocal_cell(crystal.lattice)[1]
        places = (hkl + 3) @ [49, 7, 1]
        for theirs in (vectors[i], np.abs(sums[i]) ** 2 / volume**2, loops[i][places]):
            assert np.allclose(theirs, ours, rtol=1e-4, atol=1e-5 * ours.max())
        counted = [1, len(crystal.species), *rivals.operations(crystal, hkl)]
        COUNTED[group] = COUNTED.get(group, np.zeros(5)) + counted


def run(folder: Path, count: int) -> dict[str, list[Entry]]:
    """Turns until all crystals are through; the first turn of each kind only warms up."""
    sources = [open_source(str(folder / f"crystals{kind}")) for kind in READ]
    for batches in (1, -(-count // BATCH)):
        SECONDS.clear()
        entries: dict[str, list[Entry]] = {name: [] for name in CONFIGS}
        streams = [source.records() for source in sources]
        standard = [c for _ in range(batches) for c in turn(sources, streams, entries)]
    diffract(standard[:BATCH], "warming up")
    eight = list(islice(cycle(c for c in standard if len(c.species) == 8), 5 * BATCH))
    for start in range(0, count, 5 * BATCH):
        diffract(standard[start : start + 5 * BATCH], ALL)
        diffract(eight, EIGHT)
    for name, config in CONFIGS.items():
        for path in (folder / "warm.h5", folder / "shard.h5"):
            SECONDS.pop((WRITE + name, ""), None)
            timed(WRITE + name, partial(write_shard, entries=entries[name], config=config), [path])
    return entries


def whole(spec: Path, out: Path, name: str) -> tuple[float, float]:
    """CPU and wall seconds of all of it, to the manifest."""
    start, wall = time.process_time(), time.perf_counter()
    featurize(str(spec), out, CONFIGS[name], OneProcess())
    answer = time.process_time() - start, time.perf_counter() - wall
    shutil.rmtree(out)
    return answer


def end_to_end(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Source and selection → medians of `whole` over runs that take turns."""
    lines = (folder / "crystals.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "single.jsonl").write_bytes(lines[0])
    asked = [("single.jsonl", MILLER), *((f"crystals{kind}", n) for n in CONFIGS for kind in READ)]
    gc.freeze()  # no time for what the rivals have loaded
    found = [[whole(folder / name, folder / "out", n) for name, n in asked] for _ in range(3)]
    middle = np.median(found, axis=0).tolist()
    return {each: (cpu, wall) for each, (cpu, wall) in zip(asked, middle, strict=True)}


def print_stages(ms: Callable[..., float], entries: dict[str, list[Entry]]) -> None:
    others = {GEMMI_CIF: PARSE[".csv"], PYMATGEN_CIF: PARSE[".csv"], SPGLIB: CELL, PYMATGEN: CELL}
    rows = []
    for kind in READ:
        rows += [READ[kind], PARSE[kind]]
    rows += [GEMMI_CIF, PYMATGEN_CIF, CELL, MOYO, SPGLIB, PYMATGEN]
    table = []
    for name in rows + [stage + n for n in CONFIGS for stage in (CLOUD, WRITE)]:
        note = f"{ms(name) / ms(others[name]):.2f} × ours" if name in others else ""
        if name.startswith(CLOUD):
            points = [len(e.cloud.hkl) for e in entries[name.removeprefix(CLOUD)]]
            note = f"{np.mean(points):.0f} points stored"
        table.append((name, f"{ms(name):.3f}", note))
    print_table(("stage, or — a rival", "ms a crystal", ""), table)


def print_diffraction() -> None:
    print(f"\n## Diffraction at {rivals.POINTS} points (the half of {MILLER}), X-rays\n")
    groups = [group for group in (EIGHT, ALL) if group in COUNTED]
    times = {(name, g): SECONDS[name, g] / COUNTED[g][0] for name, g in SECONDS if g in groups}
    table = [
        (
            name,
            *(
                f"{1e3 * times[name, g]:.4f} ({times[name, g] / times[OURS, g]:.2f})"
                for g in groups
            ),
        )
        for name in (OURS, KERNEL, VECTOR, GEMMI, CALLS, LOOP)
    ]
    print_table(("ms a crystal (multiple of ours)", *groups), table)
    sum_rate, power_rate = rivals.rates()
    print("\nThe floor: operations counted as in benchmarks/rivals.py, over rates of Numba loops:")
    print(f"{sum_rate / 1e9:.1f} GFlop/s of complex sums, {power_rate / 1e9:.1f} of polynomials.\n")
    table = []
    for g in groups:
        _, atoms, sums, *powers = COUNTED[g] / COUNTED[g][0]
        for words, each in zip(("every point", "distinct lengths only"), powers, strict=True):
            floor = sums / sum_rate + each / power_rate
            row = [f"{g} ({atoms:.1f} on average)", words, f"{sums:,.0f} + {each:,.0f}"]
            ratios = [f"{times[name, g] / floor:.2f} ×" for name in (OURS, KERNEL)]
            table.append((*row, f"{1e3 * floor:.4f}", *ratios))
    heads = ("atoms", "form factors of", "operations: sums + powers", "floor, ms", "ours", "kernel")
    print_table(heads, table)


def main() -> None:
    warnings.simplefilter("ignore")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_sources(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2000, folder)
        entries = run(folder, count)
        ends = end_to_end(folder)
    once = ends.pop(("single.jsonl", MILLER))

    def ms(name: str) -> float:
        return 1e3 * SECONDS[name, ALL if name == LOOP else ""] / count

    made = provenance()
    atoms = COUNTED[ALL][1] / count
    print(f"# Featurization, {made['created']}\n")
    print(f"Commit {made['commit']}; {made['hardware']} (load {load:.1f}); one core, CPU time.")
    print(f"{count} crystals, primitive cells of {atoms:.1f} atoms on average.\n")
    print_stages(ms, entries)
    print_diffraction()
    print("\n## End to end: a file of crystals → verified shards and a manifest\n")
    standin = ms(PYMATGEN_CIF) + ms(PYMATGEN) + ms(LOOP)
    print(f"× original: {1e3 * ORIGINAL} ms a crystal, measured elsewhere. × stand-in: pymatgen's")
    print(f"parser and primitive cell and a point at a time, in this run {standin:.1f} ms.")
    cpu, wall = (1e3 * seconds for seconds in once)
    print(
        f"A run with a single crystal takes {cpu:.0f} ms ({wall:.0f} ms wall). Beside the stages:"
    )
    print("hash and index of the source, formulas, guards, journal. Medians of three.\n")
    table = []
    for (file, name), (cpu, wall) in ends.items():
        kind = Path(file).suffix
        stages = sum(map(ms, (READ[kind], PARSE[kind], CELL, CLOUD + name, WRITE + name)))
        each, wall = 1e3 * cpu / count, 1e3 * wall / count
        ratios = [f"{1e3 * ORIGINAL / each:.1f} ×", f"{standin / each:.1f} ×"]
        times = [f"{x:.3f}" for x in (each, wall, stages)]
        table.append((f"{kind}, {name}", *times, *ratios))
    heads = ("source", "CPU ms a crystal", "wall", "sum of stages", "original", "stand-in")
    print_table(heads, table)


if __name__ == "__main__":
    main()
