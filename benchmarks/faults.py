"""Faults at random moments of featurization: is the dataset what it is without them?

    python -m benchmarks.faults SOURCE [DATASETS] [SEED] > DATE-faults.md

SOURCE is what `xtal featurize` takes, of a few thousand crystals. Each dataset is begun on 1 to 4
ranks, struck STRUCK times, each time by another fault and with other ranks, and then ended; then a
shard of it is damaged and repaired, REPAIRED times. The exit code is 1 if a dataset is not what it
is without faults. TMPDIR says on which disk to work. Linux and MPICH only.

A moment is no time but an amount of progress, so many bytes in the folder, and up to LATER seconds
more, so that a slow machine is struck at the same places as a fast one.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1, Signals
from typing import Any

from benchmarks.model import print_table
from cluster.provenance import provenance
from featurization import journal
from featurization.manifest import read_manifest

STRUCK, REPAIRED = 6, 2  # times a dataset
LATER = 0.05
HANGS = 300.0  # s of a job, after which it is taken to hang
SETTINGS = "shard_structures = 32\n"  # few, so that there is much to tear
XTAL = (sys.executable, "-c", "import xtal; xtal.main()")
BESIDE_PYTHON = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE_PYTHON) if BESIDE_PYTHON.exists() else "mpiexec"
SHARDS, JOURNAL, NOTHING = "shards/*.h5", f"{journal.FOLDER}/done-*.jsonl", "nothing"
KILLED = "SIGKILL to all processes"
Process = subprocess.Popen[bytes]
Damage = Callable[[Path, random.Random], None]


def children(process: int) -> list[int]:
    text = ""
    with suppress(OSError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in text.split()]


def ranks_of(job: Process) -> list[int]:  # mpiexec starts a proxy, which starts them
    return [rank for proxy in children(job.pid) for rank in children(proxy)]


def victims(job: Process, whom: str, choose: random.Random) -> list[int]:
    ranks = ranks_of(job)
    if whom == "one":
        return choose.sample(ranks, min(1, len(ranks)))
    return [job.pid] if whom == "mpiexec" else [job.pid, *children(job.pid), *ranks]


def cut(path: Path, choose: random.Random) -> None:
    os.truncate(path, choose.randrange(path.stat().st_size))


def flip(path: Path, choose: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    path.write_bytes(data)


@dataclass(frozen=True)
class Strike:
    """A signal to some processes of a job, and what is then done to a file that it left."""

    signal: Signals
    whom: str  # "one" rank, "all" processes, "mpiexec"
    files: str = NOTHING
    damage: Damage = cut


STRIKES = {
    "SIGKILL to one rank": Strike(SIGKILL, "one"),
    KILLED: Strike(SIGKILL, "all"),
    "SIGKILL to mpiexec": Strike(SIGKILL, "mpiexec"),
    "SIGTERM to mpiexec": Strike(SIGTERM, "mpiexec"),  # which passes it on
    "SIGUSR1 to one rank": Strike(SIGUSR1, "one"),
    "all killed, a journal torn at a byte": Strike(SIGKILL, "all", JOURNAL, cut),
    "all killed, a shard truncated": Strike(SIGKILL, "all", SHARDS, cut),
    "all killed, a bit of a shard flipped": Strike(SIGKILL, "all", SHARDS, flip),
}
REPAIRS: dict[str, Damage] = {
    "finished, a shard truncated, `--repair`": cut,
    "finished, a bit of a shard flipped, `--repair`": flip,
    "finished, a shard removed, `--repair`": lambda path, choose: path.unlink(),
}


@dataclass(frozen=True)
class Target:
    """A dataset under fire."""

    source: str
    out: Path
    config: Path

    def start(self, size: int, *words: str | Path) -> Process:
        """`mpiexec -n SIZE xtal WORDS`; without words it featurizes."""
        words = words or ("featurize", self.source, self.out, "--config", self.config)
        launch = [MPIEXEC, "-n", str(size), *XTAL, *map(str, words)]
        with self.out.with_suffix(".said").open("wb") as said:
            return subprocess.Popen(launch, stdin=subprocess.DEVNULL, stdout=said, stderr=said)

    def ended(self, job: Process) -> int:
        try:
            return job.wait(HANGS)
        except subprocess.TimeoutExpired:
            for process in victims(job, "all", random.Random()):
                os.kill(process, SIGKILL)
            raise RuntimeError(f"a job took longer than {HANGS:g} s: {self.said()}") from None

    def run(self, size: int, *words: str | Path) -> None:
        """A job without faults, as `start`."""
        if code := self.ended(self.start(size, *words)):
            raise RuntimeError(f"exit code {code} without a fault: {self.said()}")

    def said(self) -> str:
        return self.out.with_suffix(".said").read_text(errors="replace").strip()[-600:]

    def progress(self) -> int:
        """Bytes of all files but the logs."""
        count = 0
        for folder in ("", "shards", journal.FOLDER):
            with suppress(OSError):  # not yet there, or not any more
                count += sum(entry.stat().st_size for entry in os.scandir(self.out / folder))
        return count

    def marks(self) -> set[str]:
        """Files of ranks that are at work, or were when they died."""
        return {path.name for path in (self.out / journal.FOLDER).glob("at-*")}

    def outcome(self) -> dict[str, Any]:
        """What neither a fault nor the number of ranks may change."""
        manifest = read_manifest(self.out)
        keys = ("structures", "rejected", "reject_stages", "points", "content_hash")
        listed = {row["file"] for row in manifest["shards"]}
        found = {str(p.relative_to(self.out)) for p in self.out.rglob("*") if p.is_file()}
        others = {name for name in found - listed if not name.startswith(("logs/", "damaged/"))}
        text = (self.out / "rejects.csv").read_text(encoding="utf-8")
        answer = {key: manifest[key] for key in keys} | {"rejects.csv": text}
        return answer | {"missing": listed - found, "others": others}

    def strike(self, size: int, at: float, strike: Strike, choose: random.Random) -> bool:
        """Strike a job on `size` ranks once the folder has `at` bytes; False if it ended before.

        Raises:
            RuntimeError: it hangs, or its exit code is not one of a job that was struck.
        """
        before, job = self.marks(), self.start(size)
        while job.poll() is None and (self.progress() < at or len(ranks_of(job)) < size):
            time.sleep(0.001)
        time.sleep(choose.uniform(0, LATER))
        heeds = strike.signal != SIGKILL and len(self.marks() - before) == size
        if job.poll() is None:
            for process in victims(job, strike.whom, choose):
                with suppress(ProcessLookupError):
                    os.kill(process, strike.signal)
        code = self.ended(job)
        plan = self.out / journal.FOLDER / "plan.json"
        if (self.out / "manifest.json").exists() and not plan.exists():
            return False
        if code in (0, 1, 2) or (heeds and code != 75):
            raise RuntimeError(f"exit code {code} after {strike}: {self.said()}")
        return True


class Campaign:
    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.choose = target, random.Random(seed)
        self.strikes = cycle(self.choose.sample([*STRIKES], len(STRIKES)))
        self.repairs = cycle(self.choose.sample([*REPAIRS], len(REPAIRS)))
        self.tried, self.lost = Counter[str](), Counter[str]()
        self.since: list[str]  # faults since the last comparison
        target.run(1)
        self.expected, self.bytes = target.outcome(), target.progress()

    def compare(self, *options: str) -> None:
        self.target.run(self.choose.randint(1, 4), "verify", self.target.out, *options)
        for key, value in self.target.outcome().items():
            if value != self.expected[key]:
                raise RuntimeError(f"{key} is {value}, without faults {self.expected[key]}")
        self.tried.update(self.since)
        self.since = []

    def dataset(self) -> None:
        target, choose = self.target, self.choose
        shutil.rmtree(target.out, ignore_errors=True)
        for left in range(STRUCK, 0, -1):
            name, now = next(self.strikes), target.progress()
            at, strike = now + (self.bytes - now) * choose.random() / left, STRIKES[name]
            self.since.append(name)
            if not target.strike(choose.randint(1, 4), at, strike, choose):
                self.since.pop()
                break
            if found := [path for path in target.out.glob(strike.files) if path.stat().st_size]:
                strike.damage(choose.choice(sorted(found)), choose)
            elif strike.files != NOTHING:
                self.since[-1] = KILLED
        target.run(choose.randint(1, 4))
        self.compare()
        for name in islice(self.repairs, REPAIRED):
            REPAIRS[name](choose.choice(sorted(target.out.glob(SHARDS))), choose)
            self.since.append(name)
            self.compare("--repair")

    def survives(self) -> bool:
        self.since = []
        try:
            self.dataset()
        except (RuntimeError, OSError, ValueError) as error:
            print(f"after {self.since}: {error}", file=sys.stderr)
            self.tried.update(self.since)
            self.lost.update(set(self.since))
            return False
        return True


def main() -> int:
    source, datasets, seed = [*sys.argv[1:], *("5", "0")[len(sys.argv) - 2 :]]
    with tempfile.TemporaryDirectory() as name:
        target = Target(source, Path(name) / "out", Path(name) / "config.toml")
        target.config.write_text(SETTINGS)
        campaign = Campaign(target, int(seed))
        survivors = sum(campaign.survives() for _ in range(int(datasets)))
    by, made = provenance(), campaign.expected
    print(f"# Faults of featurization, {by['created']}\n")
    print(f"Commit {by['commit']}; {by['hardware']}; seed {seed}; {made['structures']:,} crystals,")
    print(f"{made['rejected']:,} rejects: {survivors} of {datasets} datasets as without faults.\n")
    rows = [(n, str(campaign.tried[n]), str(campaign.lost[n])) for n in [*STRIKES, *REPAIRS]]
    print_table(("fault", "times tried", "lost"), rows)
    return 0 if survivors == int(datasets) else 1


if __name__ == "__main__":
    sys.exit(main())
