"""Faults while jobs run on a SLURM of three hosts, and what each costs.

`python -m benchmarks.survival [featurize|ablate] [FAULT …]` needs root, slurm-wlm and munge
(tests/slurm/machines.py).
Each job's end state is compared with that of a job that nothing happened to.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from machines import Machines, obstacle  # noqa: E402

SOURCE = "prototypes:3000"
GRID = """
dataset = {dataset}
seeds = [0, 1, 2, 3]
arms = [
    "none", "intensity_binary", "intensity_shuffled", "intensity_scaled", "directions_random",
    "basis_only",
]
[training]
task = "crystal_system"
epochs = 3
width = 32
"""


@dataclass(frozen=True, slots=True)
class Work:
    """Something to disturb."""

    name: str
    template: str
    options: tuple[str, ...]
    words: Callable[[Path], list[str]]
    begun: Callable[[Path], bool]
    state: Callable[[Path], Any]  # what must not depend on what happened


def featurizing() -> Work:
    return Work(
        "featurize",
        "featurize",
        ("--ntasks-per-node=2",),
        lambda out: [SOURCE, str(out), "--selection", "miller:4"],
        lambda out: any(out.glob("journal/at-*")),
        lambda out: json.loads((out / "manifest.json").read_text())["content_hash"],
    )


def grid(path: Path) -> Work:
    def state(out: Path) -> Any:
        table = pq.read_table(out / "results.parquet")
        kept = [n for n in table.column_names if n not in ("seconds", "commit")]
        return sorted(map(repr, table.select(kept).to_pylist()))

    return Work(
        "grid of 24 trials",
        "ablate",
        ("--ntasks-per-node=1", "--cpus-per-task=2"),
        lambda out: [str(path), str(out)],
        lambda out: (path := out / "record.jsonl").exists() and path.read_text().count("\n") > 2,
        state,
    )


def nothing(slurm: Machines, job: str, work: Work, out: Path) -> str:
    return job


def warned(slurm: Machines, job: str, work: Work, out: Path) -> str:
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    return job


def preempted(slurm: Machines, job: str, work: Work, out: Path) -> str:
    urgent = slurm.sbatch("--partition=batch", "--nodes=3", "--exclusive", "--wrap=sleep 5")
    slurm.ended(urgent, 300)
    return job


def cancelled(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """Cancelled, then the same submitted again on two nodes."""
    slurm.run("scancel", job)
    slurm.ended(job)
    return submit(slurm, work, out, "--nodes=2")


def requeued(slurm: Machines, job: str, work: Work, out: Path) -> str:
    slurm.run("scontrol", "requeue", job)
    return job


def lost_node(slurm: Machines, job: str, work: Work, out: Path) -> str:
    slurm.kill("node3")
    time.sleep(20)
    slurm.revive("node3")
    return job


def lost_first_node(slurm: Machines, job: str, work: Work, out: Path) -> str:
    slurm.kill("node1")
    time.sleep(20)
    slurm.revive("node1")
    return job


FAULTS = {
    each.__name__: each
    for each in (nothing, warned, preempted, cancelled, requeued, lost_node, lost_first_node)
}


def submit(slurm: Machines, work: Work, out: Path, *options: str) -> str:
    words = ["--partition=low", "--time=20", f"--output={out}.log", *work.options, *options]
    return slurm.sbatch(*words, ROOT / "slurm" / f"{work.template}.sbatch", *work.words(out))


def limit(slurm: Machines, work: Work, out: Path) -> str:
    """A job of one minute, warned 40 s before its end; as many attempts as it takes."""
    return submit(slurm, work, out, "--nodes=3", "--time=1", "--signal=B:USR1@40")


def main() -> None:
    if reason := obstacle():
        sys.exit(reason)
    works = [each for each in sys.argv[1:] if each in ("featurize", "ablate")]
    wanted = [each for each in sys.argv[1:] if each not in works] or [*FAULTS, "time limit"]
    slurm = Machines()
    try:
        about = provenance()
        print(f"# Faults of jobs, {about['created']}\n\nCommit {about['commit']}; three hosts of ")
        print(f"two cores each on {about['hardware']}.\n")
        print("| work | fault | seconds | undisturbed | attempts | end state |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        dataset = slurm.shared / "dataset"
        slurm.on(
            "node1", ["xtal", "featurize", "prototypes:210", dataset, "--selection", "miller:2"]
        )
        plan = slurm.shared / "grid.toml"
        plan.write_text(GRID.format(dataset=json.dumps(str(dataset))))
        for work in (featurizing(), grid(plan)):
            if works and work.template not in works:
                continue
            expected, usual = None, 0.0
            for name in wanted:
                out = slurm.shared / f"{work.template}-{name.replace(' ', '-')}"
                began = time.monotonic()
                if name == "time limit":
                    job = limit(slurm, work, out)
                else:
                    job = submit(slurm, work, out, "--nodes=3")
                    slurm.until(lambda o=out, w=work: w.begun(o), f"{out.name} began", 400)
                    job = FAULTS[name](slurm, job, work, out)
                end = slurm.ended(job, 900)
                seconds = time.monotonic() - began
                tried = (out.parent / f"{out.name}.jobs" / "attempts.jsonl").read_text()
                state = work.state(out) if end == "COMPLETED" else None
                if name == "nothing":
                    expected, usual = state, seconds
                same = "equal" if state == expected and state is not None else f"{end}, NOT EQUAL"
                count = tried.count("\n")
                print(
                    f"| {work.name} | {name.replace('_', ' ')} | {seconds:.0f} | {usual:.0f} "
                    f"| {count} | {same} |",
                    flush=True,
                )
                if same != "equal":
                    print(Path(f"{out}.log").read_text()[-2000:], file=sys.stderr, flush=True)
                slurm.run("scancel", "--user=root", check=False)
                slurm.until(lambda: len(slurm.idle()) == 3, "idle again", 120)
                left = [p for node in slurm.nodes for p in slurm.processes(node)]
                assert not left, f"left over after {name}: {left}"
    finally:
        slurm.close()


if __name__ == "__main__":
    main()
