"""Size, writing and reading of one dataset's clouds in other layouts, against the shards of today.

    python -m benchmarks.layouts DATASET [ROUNDS] > benchmarks/results/DATE-layouts.md

Needs `pip install hdf5plugin` (zstd and blosc2, which plain h5py cannot read). All layouts are
written beside DATASET, then read in turn; a figure is the best of the rounds. An epoch reads what
`training.dataset.load` reads; a batch is 64 random crystals in stored order, without their hkl.
Cold is wall time after fsync and posix_fadvise(DONTNEED) on every file: the page cache is empty,
the caches of inodes and of the disk's host are not. Warm and write are CPU time.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from cluster.provenance import provenance
from featurization.manifest import read_manifest

COLUMNS = ("hkl", "q", "intensity", "multiplicity")
ROW = np.dtype([("hkl", "<i2", 3), ("q", "<f4", 3), ("intensity", "<f4"), ("multiplicity", "u1")])
BATCH = 64
BATCHES = 4  # of a round
FILTERS: dict[str, Mapping[str, Any]] = {
    "no filter": {},
    "lzf": {"compression": "lzf"},
    "gzip-1": {"compression": "gzip", "compression_opts": 1},
    "gzip-4": {"compression": "gzip", "compression_opts": 4},
    "gzip-4 + shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
    "zstd-3 (plugin)": {"compression": hdf5plugin.Zstd(clevel=3)},
    "zstd-3 + shuffle (plugin)": {"compression": hdf5plugin.Zstd(clevel=3), "shuffle": True},
    "blosc2 bitshuffle zstd-3 (plugin)": {
        "compression": hdf5plugin.Blosc2(
            cname="zstd", clevel=3, filters=hdf5plugin.Blosc2.BITSHUFFLE
        )
    },
}
Points = dict[str, NDArray[Any]]  # column → rows
Slices = list[slice]  # stored points of each crystal

Reader = Callable[[Path, list[int], tuple[str, ...]], Points]  # folder, crystals, columns


class Layout(NamedTuple):
    """How to write all clouds below a folder and to read some columns of some crystals."""

    name: str
    write: Callable[[Path, Points, Slices], None]
    read_all: Callable[[Path, int], Points]  # number of crystals
    read_some: Callable[[Path, list[int], Slices], Points]


def write_csr(folder: Path, points: Points, parts: Slices, **how: Any) -> None:
    rows = how.pop("rows", None)
    with h5py.File(folder / "shard.h5", "w") as file:
        for name, array in points.items():
            chunks = rows and (min(rows, len(array)), *array.shape[1:])
            file.create_dataset(name, data=array, chunks=chunks, **how)


def read_csr(folder: Path, crystals: int) -> Points:
    with h5py.File(folder / "shard.h5") as file:
        return {name: file[name][:] for name in COLUMNS}


def read_csr_some(folder: Path, chosen: list[int], parts: Slices) -> Points:
    with h5py.File(folder / "shard.h5") as file:
        data = [(name, file[name]) for name in COLUMNS[1:]]
        return {name: np.concatenate([d[parts[i]] for i in chosen]) for name, d in data}


def write_groups(folder: Path, points: Points, parts: Slices) -> None:
    with h5py.File(folder / "shard.h5", "w") as file:
        for i, part in enumerate(parts):
            for name, array in points.items():
                file.create_dataset(f"{i}/{name}", data=array[part])


def read_groups(folder: Path, chosen: list[int], columns: tuple[str, ...]) -> Points:
    with h5py.File(folder / "shard.h5") as file:
        groups = [file[str(i)] for i in chosen]
        return {name: np.concatenate([g[name][:] for g in groups]) for name in columns}


def write_npy(folder: Path, points: Points, parts: Slices) -> None:
    for i, part in enumerate(parts):
        rows = np.empty(part.stop - part.start, ROW)
        for name, array in points.items():
            rows[name] = array[part]
        np.save(folder / f"{i}.npy", rows)


def read_npy(folder: Path, chosen: list[int], columns: tuple[str, ...]) -> Points:
    rows = np.concatenate([np.load(folder / f"{i}.npy") for i in chosen])
    return {name: np.ascontiguousarray(rows[name]) for name in columns}


def read_each(read: Reader, folder: Path, crystals: int) -> Points:
    return read(folder, list(range(crystals)), COLUMNS)


def read_those(read: Reader, folder: Path, chosen: list[int], parts: Slices) -> Points:
    return read(folder, chosen, COLUMNS[1:])


def layouts() -> Iterator[Layout]:
    yield Layout("CSR contiguous (today)", write_csr, read_csr, read_csr_some)
    for name, how in FILTERS.items():
        for kibi in (16, 64, 256):
            write = partial(write_csr, rows=kibi << 10, **how)
            yield Layout(f"CSR, {kibi} Ki points a chunk, {name}", write, read_csr, read_csr_some)
    name = "HDF5, a group of four datasets a crystal"
    yield Layout(
        name, write_groups, partial(read_each, read_groups), partial(read_those, read_groups)
    )
    yield Layout(
        "a .npy a crystal", write_npy, partial(read_each, read_npy), partial(read_those, read_npy)
    )


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def fetched() -> int:
    """Bytes that this process has had fetched from disks, i.e. not from the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def timed(clock: Callable[[], float], work: Callable[[], Any]) -> tuple[Any, float]:
    start = clock()
    return work(), clock() - start


def load(dataset: Path) -> tuple[Points, Slices, NDArray[np.float64]]:
    """All points, the part of each crystal and, for the note, q computed again from the cell."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for row in read_manifest(dataset)["shards"]:
        with h5py.File(dataset / row["file"]) as file:
            for name in (*COLUMNS, "offsets", "lattice"):
                parts.setdefault(name, []).append(file[name][:])
    lengths = np.concatenate([np.diff(part) for part in parts["offsets"]])
    ends = np.cumsum(lengths).tolist()
    slices = [slice(end - n, end) for end, n in zip(ends, lengths.tolist(), strict=True)]
    points = {name: np.concatenate(parts[name]) for name in COLUMNS}
    inverse = np.linalg.inv(np.concatenate(parts["lattice"])).repeat(lengths, axis=0)
    return points, slices, np.einsum("pij,pj->pi", inverse, points["hkl"].astype(np.float64))


def measure(
    layout: Layout, folder: Path, points: Points, parts: Slices, chosen: list[list[int]]
) -> dict[str, float]:
    """Seconds of one round of reading; all that is read is compared with what was written."""
    some = dict.fromkeys(("batch cold", "batch warm", "batch MiB"), 0.0)
    evict(folder)
    before = fetched()
    whole, some["epoch cold"] = timed(
        time.perf_counter, partial(layout.read_all, folder, len(parts))
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert fetched() - before > 0.9 * size, "the page cache was not empty"
    assert all(np.array_equal(whole[name], points[name]) for name in COLUMNS)
    _, some["epoch warm"] = timed(time.process_time, partial(layout.read_all, folder, len(parts)))
    for rows in chosen:
        read = partial(layout.read_some, folder, rows, parts)
        evict(folder)
        before = fetched()
        batch, cold = timed(time.perf_counter, read)
        some["batch MiB"] += (fetched() - before) / 2**20 / len(chosen)
        some["batch cold"] += cold / len(chosen)
        some["batch warm"] += timed(time.process_time, read)[1] / len(chosen)
        for name in COLUMNS[1:]:
            right = np.concatenate([points[name][parts[i]] for i in rows])
            assert np.array_equal(batch[name], right)
    return some


def stored(path: Path) -> dict[str, int]:
    """Bytes of each column of a CSR file."""
    with h5py.File(path) as file:
        return {name: file[name].id.get_storage_size() for name in COLUMNS}


def main() -> None:
    dataset, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    points, parts, computed_q = load(dataset)
    random = np.random.default_rng(0)
    chosen = [
        sorted(random.choice(len(parts), min(BATCH, len(parts)), replace=False).tolist())
        for _ in range(BATCHES)
    ]
    best: dict[str, dict[str, float]] = {}
    columns: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(dir=dataset.resolve().parent, prefix=".layouts-") as root:
        folders = {layout: Path(root) / str(i) for i, layout in enumerate(layouts())}
        for layout, folder in folders.items():
            folder.mkdir()
            _, seconds = timed(time.process_time, partial(layout.write, folder, points, parts))
            evict(folder)
            files = list(folder.iterdir())
            size = sum(path.stat().st_blocks * 512 for path in files) / 2**20
            best[layout.name] = {"files": len(files), "MiB": size, "write": seconds}
            if layout.name.startswith("CSR"):
                columns[layout.name] = stored(folder / "shard.h5")
        turns = list(folders.items())
        for turn in range(rounds):
            # Each starts elsewhere: who comes first pays for growing the heap.
            first = turn * len(turns) // rounds
            for layout, folder in turns[first:] + turns[:first]:
                row = best[layout.name]
                for name, seconds in measure(layout, folder, points, parts, chosen).items():
                    row[name] = min(seconds, row.get(name, seconds))
    made = provenance()
    print(f"# Layouts of clouds, {made['created']}\n")
    print(f"Commit {made['commit']}; {made['hardware']} (load {os.getloadavg()[0]:.1f});")
    print(f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version},")
    print(f"hdf5plugin {hdf5plugin.version}.\n")
    print(f"{len(parts)} crystals, {len(points['q'])} points; best of {rounds} rounds;")
    print("in brackets: multiples of the first row. Epoch: all columns of all crystals.")
    print(f"Batch: q, intensity and multiplicity of {BATCH} random crystals, file opened anew.")
    print("Cold: wall time after fsync and posix_fadvise(DONTNEED). Warm and write: CPU time;")
    print("write once, without fsync. Fetched: from disk, for a cold batch.\n")
    times = ("write", "epoch cold", "epoch warm", "batch cold", "batch warm")
    heads = ("layout", "files", "MiB", *(f"{name}, ms" for name in times), "fetched, MiB")
    print_row(heads)
    print_row(["---"] * len(heads))
    today = next(iter(best.values()))
    for name, row in best.items():
        ratios = [f"{1e3 * row[n]:.1f} ({row[n] / today[n]:.2f})" for n in times]
        size_ratio = f"{row['MiB']:.1f} ({row['MiB'] / today['MiB']:.2f})"
        print_row([name, f"{row['files']:.0f}", size_ratio, *ratios, f"{row['batch MiB']:.1f}"])
    print("\nBytes a point:\n")
    print_row(["layout", *COLUMNS])
    print_row(["---"] * (1 + len(COLUMNS)))
    for name, sizes in columns.items():
        print_row([name, *(f"{size / len(points['q']):.2f}" for size in sizes.values())])
    same = np.mean(computed_q.astype(np.float32) == points["q"])
    worst = np.abs(computed_q - points["q"]).max()
    print(f"\nq from hkl and lattice: {100 * same:.2f} % of the components equal the stored ones")
    print(f"bit for bit, the largest difference is {worst:.1e} 1/Å.")


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
