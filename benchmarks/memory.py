"""Training on a dataset many times larger than the memory that the process may take.

    python -m benchmarks.memory DATASET SCRATCH [--limit-mib 1024] [--times 10] [--steps 200]

Copies the shards of DATASET under new ids until the clouds are `times` as large as the limit,
trains for some steps in a process whose anonymous memory is limited (RLIMIT_DATA, in which maps of
files do not count), and tries to load the set into memory there, which must fail. Prints Markdown.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py

from cluster import memory
from featurization.manifest import read_manifest
from training import loop
from training.config import TrainingConfig
from training.dataset import POINT_BYTES, MappedSet, load, open_clouds
from training.progress import Progress


def multiplied(dataset: Path, folder: Path, size: int) -> int:
    """A dataset with the crystals of another again and again, `size` bytes of clouds; how many."""
    manifest = read_manifest(dataset)
    shards = []
    (folder / "shards").mkdir(parents=True)
    copies = -(-size // (POINT_BYTES * manifest["points"]))
    for copy in range(copies):
        for row in manifest["shards"]:
            name = f"shards/{copy}-{Path(row['file']).name}"
            shutil.copyfile(dataset / row["file"], folder / name)
            with h5py.File(folder / name, "r+") as file:
                file["id"][...] = [f"{id}-{copy}" for id in file["id"].asstr()[:]]
            shards.append(row | {"file": name})
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
    return copies * int(manifest["structures"])


def limited(folder: Path, model: str, limit: int, steps: int) -> None:
    """Train under a limit; prints a row."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    data = open_clouds(folder)
    assert isinstance(data, MappedSet)
    batch = 32 if model == "pointnet" else 64
    config = TrainingConfig(task="bulk_modulus", model=model, epochs=1, batch_size=batch)
    times: list[float] = []

    def note(at: Progress) -> None:
        times.append(time.perf_counter())

    start = time.perf_counter()
    run = folder / f"run-{model}"
    loop.fit(run, data, config, identity={}, stop_after=steps, progress=note)
    shutil.rmtree(run, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = (times[-1] - times[0]) / (len(times) - 1)
    print(
        f"| {model} | {len(times)} steps of {batch} | {times[0] - start:.0f} | {1000 * step:.0f} | "
        f"{memory.resident() / 2**20:.0f} | {peak:.0f} |",
        flush=True,
    )


def loaded(folder: Path, limit: int) -> None:
    """Load all clouds under a limit; prints what came of it."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        load(folder)
    except MemoryError as error:
        print(f"\nLoading it into memory in such a process: MemoryError: {error}")
    else:
        raise SystemExit("the limit did not limit: this proves nothing")


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=["pointnet", "attention"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    limit, folder = asked.limit_mib << 20, asked.scratch / "multiplied"
    if asked.child == "load":
        loaded(folder, limit)
    elif asked.child:
        limited(folder, asked.child, limit, asked.steps)
    else:
        crystals = multiplied(asked.dataset, folder, int(asked.times * limit))
        size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
        print(
            f"{crystals:,} crystals, {size / 2**30:.1f} GiB of shards, "
            f"{asked.times:g} × the limit of {asked.limit_mib} MiB as clouds in memory\n"
        )
        print("| model | trained | s before step 1 | ms a step | resident MiB | at most |")
        print("|---|---|---|---|---|---|", flush=True)
        for child in (*asked.models, "load"):
            command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--child", child]
            subprocess.run(command, check=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
