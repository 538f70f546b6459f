"""Faults while jobs run on a SLURM of three hosts, and what each costs.

`python -m benchmarks.survival [featurize|train|ablate|demo] [FAULT …] [--times N]` needs root,
slurm-wlm and munge (tests/slurm/machines.py); demo is slurm/demo.sbatch, to which nothing happens.
Each job's end state is compared with that of a job that nothing happened to; lost are the seconds
that it took more. After each no process and no temporary file of it may be left on any host.
"""

import argparse
import hashlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.provenance import provenance
from cluster.slurm import seconds_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from grids import SIX, grid_file, rows_of  # noqa: E402
from machines import Machines, obstacle  # noqa: E402

SOURCE = "prototypes:100000"  # so that a time limit, in minutes, comes while each is at work
# Space, quotes, line break, a command, SLURM's own pattern, and what a URL would read.
HOSTILE = "a b'c\"d\n$(touch owned);%j#?&"


@dataclass(frozen=True, slots=True)
class Work:
    """Something to disturb."""

    verb: str
    title: str
    nodes: int
    options: tuple[str, ...]
    half: tuple[str, ...]  # options that leave room for a neighbour on the same nodes
    words: Callable[[Path], list[str]]
    begun: Callable[[Path], bool]
    state: Callable[[Path], Any]  # what must not depend on what happened


def featurizing() -> Work:
    return Work(
        "featurize",
        "featurize, 6 ranks",
        3,
        ("--ntasks-per-node=2",),
        ("--ntasks-per-node=1",),
        lambda out: [SOURCE, str(out), "--selection", "miller:2"],
        lambda out: any(out.glob("journal/at-*")),
        lambda out: json.loads((out / "manifest.json").read_text())["content_hash"],
    )


def training(dataset: Path) -> Work:
    def state(out: Path) -> Any:
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        model = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        return model, metrics, (out / "history.csv").read_text()

    words = ["--task", "crystal_system", "--epochs", "600", "--workers", "2"]
    return Work(
        "train",
        "training, 2 workers on Ray",
        2,
        ("--ntasks-per-node=1", "--cpus-per-task=2"),
        ("--cpus-per-task=1",),
        lambda out: [str(dataset), str(out), *words],
        lambda out: (path := out / "history.csv").exists() and path.read_text().count("\n") > 2,
        state,
    )


def grid(path: Path) -> Work:
    return Work(
        "ablate",
        "grid of 24 trials on Ray",
        3,
        ("--ntasks-per-node=1", "--cpus-per-task=2"),
        ("--cpus-per-task=1",),
        lambda out: [str(path), str(out)],
        lambda out: (path := out / "record.jsonl").exists() and path.read_text() != "",
        lambda out: repr(rows_of(out)),
    )


def nothing(slurm: Machines, job: str, work: Work, out: Path) -> str:
    return job


def half(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """Nothing happens to work on half of the cores, whose threads round otherwise."""
    return job


def warned(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """SIGUSR1 to the batch step, as before a time limit."""
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    return job


def preempted(slurm: Machines, job: str, work: Work, out: Path) -> str:
    urgent = slurm.sbatch("--partition=batch", "--nodes=3", "--exclusive", "--wrap=sleep 5")
    slurm.ended(urgent, 300)
    return job


def cancelled(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """Cancelled, then the same submitted again on another number of nodes."""
    slurm.run("scancel", job)
    slurm.ended(job)
    return submit(slurm, work, out, f"--nodes={5 - work.nodes}")


def requeued(slurm: Machines, job: str, work: Work, out: Path) -> str:
    slurm.run("scontrol", "requeue", job)
    return job


def _lost(slurm: Machines, node: str, job: str) -> str:
    """A job that SLURM lets go on (--no-kill) still holds the node when it is back."""
    slurm.kill(node)
    time.sleep(20)
    slurm.start(node)
    words = ("sinfo", "-h", "-N", "-p", "batch", "-t", "idle,alloc,mix", "-o", "%N")
    slurm.until(lambda: node in slurm.run(*words).stdout.split(), f"{node} is back", 60)
    return job


def lost_node(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """The last node's slurmd and all its processes are killed."""
    return _lost(slurm, slurm.nodes[work.nodes - 1], job)


def lost_first_node(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """That with the batch step and Ray's head."""
    return _lost(slurm, slurm.nodes[0], job)


def neighbour(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """The same work a second time on the other core of the same nodes, cancelled midway."""
    other = out.with_name(out.name + "-neighbour")
    second = submit(slurm, work, other, f"--nodes={work.nodes}", *work.half)
    slurm.until(lambda: work.begun(other), f"{other.name} began", 400)
    assert slurm.job(second)["NodeList"] == slurm.job(job)["NodeList"]
    slurm.run("scancel", second)
    return job


def hostile_name(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """OUT is called such as no one should, and the job is requeued as well."""
    return requeued(slurm, job, work, out)


def time_limit(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """The limit comes within a minute or two, and SLURM's warning before it."""
    elapsed = seconds_of(slurm.job(job)["RunTime"])
    _set_limit(slurm, job, int(elapsed // 60) + 1)
    slurm.requeued(job)
    _set_limit(slurm, job, 20)
    return job


def time_out(slurm: Machines, job: str, work: Work, out: Path) -> str:
    """The limit comes without a warning and SLURM kills all, then the same is submitted again."""
    elapsed = seconds_of(slurm.job(job)["RunTime"])
    _set_limit(slurm, job, int(elapsed // 60) + 1)
    assert slurm.ended(job, 200) == "TIMEOUT"
    nothing_left(slurm)
    return submit(slurm, work, out, f"--nodes={work.nodes}")


def nothing_left(slurm: Machines) -> None:
    """No process and no temporary file of a job is left on any host."""
    for node in slurm.nodes:
        slurm.until(lambda n=node: not slurm.processes(n), f"nothing is left on {node}", 30)
        assert not slurm.left_in_tmp(node)


def _set_limit(slurm: Machines, job: str, minutes: int) -> None:
    slurm.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")


FAULTS = {
    each.__name__.replace("_", " "): each
    for each in (
        nothing, half, warned, time_limit, time_out, preempted, cancelled, requeued, lost_node,
        lost_first_node, neighbour, hostile_name,
    )
}  # fmt: skip


def submit(slurm: Machines, work: Work, out: Path, *options: str) -> str:
    log = f"--output={out.parent}/{work.verb}.log"
    words = ["--partition=low", "--time=20", log, *work.options, *options]
    return slurm.sbatch(*words, ROOT / "slurm" / f"{work.verb}.sbatch", *work.words(out))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one job ended."""

    state: Any  # None if it did not complete
    said: str  # by SLURM
    seconds: float
    attempts: int


def disturbed(slurm: Machines, work: Work, name: str, place: Path) -> Outcome:
    """One job with one fault."""
    place.mkdir(parents=True)
    out = place / (HOSTILE if name == "hostile name" else "out")
    options = [f"--nodes={work.nodes}"]
    signals = {"time limit": "USR1", "time out": "URG"}  # which nobody hears
    options += [f"--signal=B:{signals[name]}@20"] if name in signals else []
    options += work.half if name in ("half", "neighbour") else ()
    began = time.monotonic()
    job = submit(slurm, work, out, *options)
    slurm.until(lambda: work.begun(out), f"{place} began", 400)
    job = FAULTS[name](slurm, job, work, out)
    said = slurm.ended(job, 900)
    seconds = time.monotonic() - began
    attempts = (out.parent / f"{out.name}.jobs" / "attempts.jsonl").read_text().count("\n")
    slurm.run("scancel", "--user=root", check=False)
    slurm.until(lambda: len(slurm.idle()) == 3, "idle again", 120)
    nothing_left(slurm)
    assert not list(slurm.shared.rglob("owned"))
    state = work.state(out) if said == "COMPLETED" else None
    if state is None:
        log = (place / f"{work.verb}.log").read_text()
        print(f"{work.verb}, {name}: {said}\n{log[-4000:]}", file=sys.stderr, flush=True)
    return Outcome(state, said, seconds, attempts)


def demo(slurm: Machines) -> None:
    """slurm/demo.sbatch on two nodes, from its submission to the report."""
    out = slurm.shared / "demo"
    began = time.monotonic()
    words = ["--nodes=2", "--ntasks-per-node=2", f"--output={out}.log"]
    job = slurm.sbatch(*words, ROOT / "slurm" / "demo.sbatch", out)
    said = slurm.ended(job, 1800)
    print(f"\ndemo.sbatch on two nodes: {said} after {time.monotonic() - began:.0f} s", flush=True)
    if not (out / "ablation" / "report.html").exists():
        sys.exit(Path(f"{out}.log").read_text())
    nothing_left(slurm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help="works and faults; all by default")
    parser.add_argument("--times", type=int, default=1)
    given = parser.parse_args()
    if reason := obstacle():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    slurm = Machines()
    try:
        about = provenance()
        print(f"# Faults of jobs, {about['created']}\n\nCommit {about['commit']}; three hosts of ")
        print(f"two cores each on {about['hardware']}.\n")
        print("| work | fault | times | end state equal | attempts | seconds | lost |")
        print("|---|---|---|---|---|---|---|", flush=True)
        dataset = slurm.shared / "dataset"
        words = ["xtal", "featurize", "prototypes:210", dataset, "--selection", "miller:2"]
        slurm.on("node1", words)
        path = slurm.shared / "grid.toml"
        plan = grid_file(path, dataset, arms=SIX, seeds=4, epochs=120, width=32)
        works = (featurizing(), training(dataset), grid(plan))
        wanted = [name for name in given.what if name in FAULTS] or [*FAULTS]
        like = ("half",) if "neighbour" in wanted else ()
        for work in works:
            if {"demo", *(w.verb for w in works)} & {*given.what} and work.verb not in given.what:
                continue
            undisturbed: dict[str, tuple[Any, float]] = {}
            for name in dict.fromkeys(("nothing", *like, *wanted)):
                place = slurm.shared / work.verb / name.replace(" ", "-")
                found = [disturbed(slurm, work, name, place / str(n)) for n in range(given.times)]
                seconds = statistics.median(each.seconds for each in found)
                if name in ("nothing", "half"):
                    undisturbed[name] = found[0].state, seconds
                expected, usual = undisturbed["half" if name == "neighbour" else "nothing"]
                equal = sum(each.state is not None and each.state == expected for each in found)
                attempts = sorted(each.attempts for each in found)
                count = (
                    f"{attempts[0]}–{attempts[-1]}" if attempts[0] < attempts[-1] else attempts[0]
                )
                print(
                    f"| {work.title} | {name} | {given.times} | {equal} | {count} "
                    f"| {seconds:.0f} | {seconds - usual:+.0f} |",
                    flush=True,
                )
        if "demo" in given.what or not given.what:
            demo(slurm)
    finally:
        slurm.close()


if __name__ == "__main__":
    main()
