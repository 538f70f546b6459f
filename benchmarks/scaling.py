"""How featurization scales over ranks: up to two measured here, more of them by a model.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling COPIES SOURCE [SOURCE …] > DATE-scaling.md

Each SOURCE is JSON Lines of the Materials Project; all together become one plain file, COPIES
times with other ids: enough for half a minute on two ranks. TMPDIR says on which disk to work.
Runs on one and on two ranks alternate. Then come the constants of the model, best of three, and
what the model says of more ranks than this machine has.
"""

import gzip
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zstandard

from benchmarks.model import Constants, print_model, print_table
from cluster.files import sha256_of
from cluster.mpi import OneProcess
from cluster.mpi import ranks as mpi_ranks
from cluster.provenance import provenance
from featurization import journal
from featurization.config import FeaturizationConfig
from featurization.duplicates import duplicates
from featurization.finish import finish
from featurization.index import Index, build_index
from featurization.journal import Commit, Plan, committed_shards, write_commit
from featurization.manifest import read_manifest
from featurization.resume import BLOCK, KnownIds, Start
from featurization.shards import Entry, write_shard
from featurization.sources import JsonLines
from featurization.worker import WIDTH, featurize_one

CONFIG = FeaturizationConfig()
MPIEXEC = Path(sys.executable).with_name("mpiexec")
ROUNDS = 2  # of runs on one and two ranks
SAMPLE = 20_000  # records, to time the walk through a source
SHARDS = (50, 150, 450)  # to time the end of a run


# --- runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One `mpiexec -n SIZE xtal featurize`; seconds of wall time unless they are said to be CPU."""

    size: int
    before: float  # start of all processes, hash of the source, walk through it
    work: float  # until the last rank's last commit
    after: float
    busy: list[float]  # work of each rank
    cpu: float  # s of all ranks
    manifest: dict[str, Any]
    bytes: int

    @property
    def total(self) -> float:
        return self.before + self.work + self.after

    @property
    def rate(self) -> float:
        """Records a second at work."""
        return float(self.manifest["sources"][0]["records"] / self.work)


def run(size: int, source: Path, out: Path) -> Run:
    words = [str(MPIEXEC), "-n", str(size), sys.executable, "-c", "import xtal; xtal.main()"]
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = datetime.now(UTC)
    subprocess.run([*words, "featurize", str(source), str(out)], check=True, stdout=sys.stderr)
    ended = datetime.now(UTC)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    opened, committed = [], []
    for log in sorted((out / "logs").iterdir()):
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
        times = [datetime.fromisoformat(when) for when, _ in lines]
        opened.append(times[0])
        texts = [text for _, text in lines]
        last = [t for t, text in zip(times, texts, strict=True) if text.startswith("committed")]
        committed.append(last[-1] if last else times[0])
    answer = Run(
        size,
        before=(min(opened) - began).total_seconds(),
        work=(max(committed) - min(opened)).total_seconds(),
        after=(ended - max(committed)).total_seconds(),
        busy=[(b - a).total_seconds() for a, b in zip(opened, committed, strict=True)],
        cpu=used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime,
        manifest=read_manifest(out),
        bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )
    shutil.rmtree(out)
    return answer


def copies(count: int, specs: list[str]) -> Iterator[bytes]:
    """Records of all sources, the ids of each copy others than those of the one before."""
    for copy in range(count):
        for spec in specs:
            for record in JsonLines(Path(spec)).records():
                new = b'"material_id":"%d-' % copy
                line, found = re.subn(rb'"material_id":\s*"', new, record.payload, count=1)
                assert found, "a document without material_id"
                yield line


# --- constants --------------------------------------------------------------------------------


def best(work: Callable[[], Any]) -> float:
    """Wall seconds."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def walks(source: Path, folder: Path) -> dict[str, float]:
    """Seconds a record of walking through a plain and compressed sources."""
    with source.open("rb") as stream:
        lines = list(islice(stream, SAMPLE))
    text = b"".join(lines)
    answer = {}
    for suffix, packed in (
        ("", text),
        (".gz", gzip.compress(text, 6)),
        (".zst", zstandard.ZstdCompressor().compress(text)),
    ):
        path = folder / f"walk.jsonl{suffix}"
        path.write_bytes(packed)
        answer[suffix] = best(partial(build_index, JsonLines(path), folder)) / len(lines)
    return answer


def ending(entry: Entry, shards: int, crystals: int, folder: Path) -> float:
    """Seconds of the end of a run whose ranks committed one shard of a few crystals each."""
    out = folder / "ending"
    (out / "shards").mkdir(parents=True)
    (out / journal.FOLDER).mkdir()
    for rank in range(shards):
        numbers = range(rank * crystals, (rank + 1) * crystals)
        entries = [replace(entry, id=str(n), source_index=n) for n in numbers]
        row = write_shard(out / "shards" / f"shard-000-0001-{rank:05d}-00000.h5", entries, CONFIG)
        row |= {"part": 0, "records": [(numbers.start, numbers.stop)], "present": 0}
        write_commit(out, 1, rank, Commit(row, row["records"], [], 0))
    index = Index(shards * crystals, None)
    plan = Plan(0, 0, "", {}, CONFIG.model_dump(mode="json"), index, BLOCK)
    none = np.zeros(0, np.int32)
    start = Start(plan, 1, none, none, 0, {}, KnownIds(out / "none"))
    begun = time.perf_counter()
    doubles = duplicates(out, committed_shards(out), OneProcess())
    finish(JsonLines(folder / "walk.jsonl"), out, CONFIG, start, doubles)
    seconds = time.perf_counter() - begun
    shutil.rmtree(out)
    return seconds


def board() -> None:
    """Under mpiexec: print what a claim and a post take on rank 1 while rank 0 computes."""
    ranks = mpi_ranks()
    shared = ranks.board(WIDTH)
    if ranks.rank == 0:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            until = time.thread_time() + 1e-3
            while time.thread_time() < until:
                pass
            shared.attend()
    else:
        for work in (lambda: shared.claim(1), lambda: shared.post([0] * WIDTH)):
            seconds = []
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
            print(median(seconds), flush=True)
    shared.close()


def board_times(**environment: str) -> list[float]:
    words = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "benchmarks.scaling", "--board"]
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env=os.environ | environment
    )
    return [float(line) for line in done.stdout.split()]


# --- the report -------------------------------------------------------------------------------


def print_runs(runs: list[Run]) -> float:
    """A row a run; returns the parallel efficiency at work."""
    table = []
    for each in runs:
        records = each.manifest["sources"][0]["records"]
        times = [f"{x:.1f}" for x in (each.before, each.work, each.after)]
        table.append(
            (
                str(each.size),
                *times,
                f"{each.total / 60:.2f}",
                f"{each.rate:,.0f}",
                f"{records / each.total:,.0f}",
                f"{1e3 * each.cpu / records:.3f}",
                f"{max(each.busy) * len(each.busy) / sum(each.busy):.3f}",
            )
        )
    heads = ("ranks", "before, s", "work, s", "after, s", "in all, min", "structures/s at work")
    print_table((*heads, "in all", "CPU ms a record", "imbalance"), table)
    rates = {n: [run.rate for run in runs if run.size == n] for n in (1, 2)}
    return max(rates[2]) / max(rates[1]) / 2.0


def main() -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.jsonl"
        with source.open("wb") as stream:
            stream.writelines(copies(int(sys.argv[1]), sys.argv[2:]))
        size = source.stat().st_size
        runs = [run(n, source, folder / "out") for _ in range(ROUNDS) for n in (1, 2)]
        made = runs[-1].manifest
        records = made["sources"][0]["records"]
        hashing = best(partial(sha256_of, source)) / records
        walk = walks(source, folder)
        opened = JsonLines(source)
        # Few points, for the end of a run reads none.
        few = FeaturizationConfig(selection="miller:1")
        crystal = featurize_one(opened, next(opened.records()), few)
        ends = {n: min(ending(crystal, n, 1, folder) for _ in range(3)) for n in SHARDS}
        one, many = (min(ending(crystal, 1, n, folder) for _ in range(3)) for n in (1, SAMPLE))

        def commit() -> None:
            row = write_shard(folder / "shard.h5", [crystal], CONFIG)
            (folder / journal.FOLDER).mkdir(exist_ok=True)
            write_commit(folder, 1, 0, Commit(row, [(0, 1)], [], 0))

        commit_s = best(commit)
    near, far = board_times(), board_times(MPIR_CVAR_NOLOCAL="1")
    alone = min((each for each in runs if each.size == 1), key=lambda each: each.work)
    slope, once = np.polyfit(list(ends), list(ends.values()), 1).tolist()
    once = max(0.0, once)
    constants = Constants(
        record=alone.work / records,
        start=max(0.0, alone.before - records * (hashing + walk[""])),
        hash=hashing,
        walk=walk[""],
        claim=near[0],
        post=near[1],
        wait=far[0],
        commit=commit_s,
        finish=once,
        finish_shard=slope,
        finish_record=max(0.0, many - one) / SAMPLE,
    )

    by = provenance()
    print(f"# Scaling of featurization, {by['created']}\n")
    print(f"Commit {by['commit']}; {by['hardware']} (load {load:.1f}); {CONFIG.selection}.")
    print(f"{records:,} records of {size / records:,.0f} bytes: {made['structures']:,} structures,")
    print(f"{made['rejected']:,} rejects, {made['points']:,} points stored, ", end="")
    print(f"{runs[-1].bytes / 2**30:.2f} GiB in {len(made['shards'])} shards.\n")
    efficiency = print_runs(runs)
    print(f"\nEfficiency of two ranks at work, best against best: {efficiency:.3f}.")
    if load > 0.5:
        print("**The machine was not idle: this is no measurement of scaling.**")
    totals = {n: min(each.total for each in runs if each.size == n) for n in (1, 2)}
    each = ", ".join(f"{1e3 * s / n:.1f} ms of {n}" for n, s in ends.items())
    print(f"\nFinish, a shard: {each}, hence linear if these are equal.")
    print_model(constants, walk, {n: (records, seconds) for n, seconds in totals.items()})


if __name__ == "__main__":
    board() if "--board" in sys.argv else main()
