"""After any death the same command goes on, and nothing is lost.

What is compared is a run without any fault on one rank. Deaths are forked processes that exit at
the k-th of their file operations, for every k, and real ranks of `mpiexec` that are killed.
"""

import errno
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mpi import MPIEXEC, Threads, needs_mpi
from tiny import ROOT, SMALL, broken, contents, document, forked, process, run, write_lines

from cluster.errors import RunFailed, UserError
from cluster.mpi import OneProcess, Ranks
from featurization import finish, resume, worker
from featurization.featurize import featurize
from featurization.verify import verify
from featurization.worker import Progress

OPERATIONS = ("replace", "fsync", "unlink", "rmdir", "mkdir", "pwrite", "open")
FEW = SMALL.model_copy(update={"shard_structures": 2})
# In blocks, and shards, of two: crystals; a duplicate and a crystal; rejects; duplicates only.
LINES = [
    *(document("a"), document("b", 4.1)),
    *(document("a", 4.2), document("c", 4.3)),
    *(broken("x"), broken("y")),
    *(document("b", 4.4), document("c", 4.5)),
]
MORE = [document("b", 7), document("p"), broken("z"), document("q", 4.1), document("p", 4.2)]
Fault = Callable[[str, Any], None]


@contextmanager
def faulty(at: int, fault: Fault) -> Iterator[list[str]]:
    """`fault(name, first argument)` before the at-th operation on a file and all that follow."""
    done: list[str] = []
    before = {name: getattr(os, name) for name in OPERATIONS}
    opened = io.open

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if "/logs/" not in str(arguments[0]):  # which may fail as they like
                done.append(name)
            if len(done) > at:
                fault(name, arguments[0])
            return original(*arguments, **named)

        return operation

    def opening(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        function = counted("write", opened) if mode.strip("bt") != "r" else opened
        return function(path, mode, *arguments, **named)

    for name, original in before.items():
        setattr(os, name, counted(name, original))
    io.open = opening
    try:
        yield done
    finally:
        io.open = opened
        for name, original in before.items():
            setattr(os, name, original)


def die(name: str, argument: Any) -> None:
    os._exit(9)


def die_torn(name: str, argument: Any) -> None:
    """Of what was to be fsynced, only a part is on the disk."""
    if name == "fsync" and (size := os.fstat(argument).st_size) > 8:
        path = Path(f"/proc/self/fd/{argument}").resolve()
        if path.is_file():
            os.truncate(path, size - 8)
    os._exit(9)


def full(name: str, argument: Any) -> None:
    if name not in ("unlink", "rmdir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a forked process; 0 if it comes to its end."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


def core(out: Path) -> dict[str, Any]:
    """What must depend neither on faults nor on the number of ranks."""
    manifest = json.loads((out / "manifest.json").read_text())
    keys = ("structures", "rejected", "reject_stages", "points", "content_hash", "config")
    answer = {key: manifest[key] for key in keys} | {"csv": (out / "rejects.csv").read_text()}
    answer["sources"] = [{**s, "without_shard": None, "block": None} for s in manifest["sources"]]
    listed = {row["file"] for row in manifest["shards"]}
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    logs = {name for name in found if name.startswith(("logs/", "damaged/"))}
    extra = found - logs - listed - {"manifest.json", "rejects.csv", "dataset.h5"}
    return answer | {"missing": listed - found, "extra": extra}


def whole(out: Path, sources: list[str], sample: int = 4) -> dict[str, Any]:
    assert verify(out, sources, sample)["problems"] == []
    return core(out)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BLOCK", 2)
    # Asks git, which would take most of the time.
    monkeypatch.setattr(finish, "provenance", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Case:
    """A source, what one run makes of it, and a folder in which runs are disturbed."""

    def __init__(self, folder: Path, append: bool, lines: Sequence[Any] = LINES) -> None:
        self.folder, self.append = folder, append
        self.out = folder / "out"
        self.specs = [str(write_lines(folder / "s.jsonl", lines))]
        self.start = folder / "start"
        if append:
            run(self.specs[0], self.start, FEW)
            self.specs.append(str(write_lines(folder / "more.jsonl", MORE)))
        self.begin()
        self.go()
        self.expected = whole(self.out, self.specs)

    def begin(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.append:
            shutil.copytree(self.start, self.out)

    def go(self) -> dict[str, Any]:
        return featurize(self.specs[-1], self.out, FEW, OneProcess(), append=self.append)


# Every so many of the file operations fail in this suite; with 1, all do, which takes minutes.
EVERY = 20


@pytest.mark.parametrize(
    ("fault", "append", "first"),
    [(die, False, 0), (die_torn, False, 3), (die, True, 1), (die_torn, True, 5)],
)
def test_death_at_a_file_operation(tmp_path: Path, fault: Fault, append: bool, first: int) -> None:
    case = Case(tmp_path, append)
    at, code = first, 9
    while code == 9:
        case.begin()

        def doomed(at: int = at) -> None:
            with faulty(at, fault):
                case.go()

        code = in_child(doomed)
        case.go()
        assert whole(case.out, case.specs, sample=1) == case.expected, at
        at += EVERY
    assert code == 0
    assert at > 70


def test_that_test_finds_an_end_that_removes_the_plan_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(out: Path) -> None:
        for path in sorted((out / "journal").iterdir(), key=lambda path: path.name == "plan.json"):
            path.unlink()
        (out / "journal").rmdir()

    monkeypatch.setattr(finish, "remove_journal", remove)
    case = Case(tmp_path, append=True)
    case.begin()
    with faulty(10**9, die) as operations:
        case.go()
    case.begin()

    def doomed() -> None:
        with faulty(len(operations) - 2, die):  # before the plan is unlinked
            case.go()

    assert in_child(doomed) == 9
    assert [path.name for path in (case.out / "journal").iterdir()] == ["plan.json"]
    case.go()
    with pytest.raises(AssertionError):
        assert whole(case.out, case.specs, sample=1) == case.expected


@pytest.mark.parametrize(("append", "first"), [(False, 2), (True, 4)])
def test_disk_that_is_full_from_a_file_operation_on(
    tmp_path: Path, append: bool, first: int
) -> None:
    case = Case(tmp_path, append)
    at, failed = first, True
    while failed:
        case.begin()
        said = ""
        try:
            with faulty(at, full):
                case.go()
        except (UserError, RunFailed) as error:
            said = str(error)
        failed = "No space left" in said and "make room" in said
        assert failed or not said
        case.go()
        assert whole(case.out, case.specs, sample=1) == case.expected, at
        at += EVERY
    assert at > 60


@pytest.mark.parametrize("limit", [10, 1500, 14_000, 15_600])
def test_limit_of_file_size(tmp_path: Path, limit: int) -> None:
    case = Case(tmp_path, append=False)
    case.begin()

    def doomed() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(
            RunFailed if limit > 1000 else (RunFailed, UserError), match="make room"
        ):
            case.go()

    assert in_child(doomed) == 0
    case.go()
    assert whole(case.out, case.specs) == case.expected


def test_disk_that_is_full(tmp_path: Path) -> None:
    case = Case(tmp_path, append=False)
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*words: str) -> bool:
        done = subprocess.run(["mount", *words, str(disk)], capture_output=True, check=False)
        return done.returncode == 0

    if not shutil.which("mount") or not mount("-t", "tmpfs", "-o", "size=40k", "none"):
        pytest.skip("only root may mount a small disk")
    try:
        out = disk / "out"
        with pytest.raises(RunFailed, match="No space left"):
            run(case.specs[0], out, FEW)
        assert mount("-o", "remount,size=1m")
        run(case.specs[0], out, FEW)
        assert whole(out, case.specs) == case.expected
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Killed(Exception):
    pass


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(deaths=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 130)), max_size=3))
def test_deaths_of_jobs_with_many_ranks(
    tmp_path_factory: pytest.TempPathFactory, deaths: list[tuple[int, int]]
) -> None:
    case = Case(tmp_path_factory.mktemp("deaths"), append=False)
    case.begin()
    for size, at in deaths:
        dead = []

        def kill(name: str, argument: Any, dead: list[bool] = dead) -> None:
            dead.append(True)
            raise Killed

        def watch(progress: Progress, dead: list[bool] = dead) -> None:
            if dead:
                raise Killed

        def job(each: Ranks, watch: Any = watch, dead: list[bool] = dead) -> dict[str, Any]:
            try:
                return featurize(case.specs[0], case.out, FEW, each, watch)
            except Exception:
                dead.append(True)  # ends the others, as mpiexec would
                raise

        with faulty(at, kill):
            outcomes = Threads(size).run(job)
        assert bool(dead) == any(isinstance(each, Exception) for each in outcomes)
    case.go()
    assert whole(case.out, case.specs, sample=1) == case.expected
    shutil.rmtree(case.folder)


def journaled(out: Path) -> list[dict[str, Any]]:
    paths = (out / "journal").glob("done-*")
    return [json.loads(line[9:]) for path in paths for line in path.read_text().splitlines()]


def interrupted(case: Case, at: int = 48) -> None:
    """A folder with commits that a process left when it died."""
    case.begin()

    def doomed() -> None:
        with faulty(at, die):
            case.go()

    assert in_child(doomed) == 9
    assert list((case.out / "journal").glob("done-*"))
    assert list((case.out / "shards").glob("*.h5"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [flip, cut, empty, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_of_an_unfinished_run(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    case = Case(tmp_path, append=False)
    interrupted(case)
    victim = min((case.out / "shards").glob("*.h5"))
    damage(victim)
    case.go()
    assert whole(case.out, case.specs) == case.expected
    assert not victim.exists()
    assert (case.out / "damaged" / victim.name).exists() == (damage is not Path.unlink)


def test_what_is_committed_is_not_done_again(tmp_path: Path) -> None:
    case = Case(tmp_path, append=False)
    interrupted(case)
    kept = contents(case.out / "shards")
    done = sum(b - a for each in journaled(case.out) for a, b in each["ranges"])
    begun: list[int] = []
    featurize(
        case.specs[0], case.out, FEW, OneProcess(), lambda progress: begun.append(progress.done)
    )
    assert begun[0] == done > 0
    after = contents(case.out / "shards")
    assert kept.keys() <= after.keys()
    # Of a is a second one in the next shard, which the end therefore writes anew.
    assert after[min(kept)] == kept[min(kept)]


def test_another_question_to_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, append=False)
    interrupted(case)
    before = contents(case.out)
    with pytest.raises(UserError, match=r"config\.symprec: 0\.1 there, 0\.05 asked for"):
        run(case.specs[0], case.out, FEW.model_copy(update={"symprec": 0.05}))
    write_lines(tmp_path / "s.jsonl", LINES[1:])
    with pytest.raises(UserError, match=r"source\.sha256: '[0-9a-f]{64}' there"):
        case.go()
    assert contents(case.out) == before


def feeding(monkeypatch: pytest.MonkeyPatch, at: str, change: Callable[[], object]) -> None:
    """`change` once, when the crystal of an id is worked on."""
    original = worker.standardize
    left = [change]

    def standardize(crystal: Any, *arguments: Any) -> Any:
        if crystal.id == at and left:
            left.pop()()
        return original(crystal, *arguments)

    monkeypatch.setattr(worker, "standardize", standardize)


def test_source_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, append=False)
    case.begin()
    path = Path(case.specs[0])
    more = json.dumps(document("late")) + "\n"
    feeding(monkeypatch, "a", lambda: path.write_text(path.read_text() + more))
    case.go()
    assert core(case.out) == case.expected
    with pytest.raises(UserError, match="holds another dataset"):
        case.go()


@pytest.mark.parametrize("kept", [True, False])
def test_source_rewritten_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    long = [each | {"more": "than a reader takes at once" * 500} for each in LINES]
    case = Case(tmp_path, append=False, lines=long)
    case.begin()
    path = Path(case.specs[0])
    text = path.read_text()
    # The same length, so that nothing but the contents tells.
    other = text.replace('"c"', '"d"') if kept else text[:20_000]
    feeding(monkeypatch, "a", lambda: path.write_text(other))
    with pytest.raises(RunFailed, match=r"s\.jsonl changed while it was read"):
        case.go()
    with pytest.raises(UserError, match=r"source\.sha256"):
        case.go()
    path.write_text(text)
    case.go()
    assert whole(case.out, case.specs) == case.expected


def test_folder_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifs"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.vasp").write_text(POSCAR)
    feeding(monkeypatch, "a", lambda: (folder / "d.vasp").write_text(POSCAR.replace("4", "5")))
    with pytest.raises(RunFailed, match="files of the source changed"):
        run(folder, tmp_path / "out", FEW)
    (folder / "d.vasp").write_text(POSCAR)
    run(folder, tmp_path / "out", FEW)
    run(folder, tmp_path / "expected", FEW)
    assert whole(tmp_path / "out", [str(folder)]) == core(tmp_path / "expected")


POSCAR = "Cs Cl\n1.0\n4 0 0\n0 4 0\n0 0 4\nCs Cl\n1 1\nDirect\n0 0 0\n.5 .5 .5\n"


def test_compressed_source_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, append=False)
    packed = tmp_path / "s.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(case.specs[0]).read_bytes()))
    feeding(monkeypatch, "a", lambda: packed.write_bytes(b"garbage"))
    run(packed, tmp_path / "packed", FEW)
    assert core(tmp_path / "packed")["content_hash"] == case.expected["content_hash"]


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz", "s.csv", "s.json", "s.cif", "s.vasp"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 5000, bytes(range(256)) * 20])
def test_garbage(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError):
            run(tmp_path / name, tmp_path / "out", FEW)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_append(tmp_path: Path) -> None:
    case = Case(tmp_path, append=True)
    old = contents(case.start / "shards")
    new = contents(case.out / "shards")
    assert {name: new[name][0] for name in old} == {name: old[name][0] for name in old}
    case.begin()
    before = contents(case.out / "shards")  # with the times of this copy
    case.go()
    assert {name: contents(case.out / "shards")[name] for name in before} == before
    both = write_lines(tmp_path / "both.jsonl", [*LINES, *MORE])
    run(both, tmp_path / "both", FEW)
    one, two = core(tmp_path / "both"), case.expected
    assert (one["content_hash"], one["points"]) == (two["content_hash"], two["points"])
    # b is there since the first source; of both p the first is kept.
    sources = json.loads((case.out / "manifest.json").read_text())["sources"]
    assert [source["records"] for source in sources] == [8, 5]
    rows = json.loads((case.out / "manifest.json").read_text())["shards"]
    assert sum(r["present"] for r in rows) + sources[1]["without_shard"]["present"] == 1
    # Twice, and once more the first source: nothing to do.
    finished = contents(case.out)
    case.go()
    run(case.specs[0], case.out, FEW)
    assert contents(case.out) == finished
    with pytest.raises(UserError, match=r"another configuration \(config\.b_iso"):
        featurize(
            str(both), case.out, FEW.model_copy(update={"b_iso": 1}), OneProcess(), append=True
        )
    assert contents(case.out) == finished


def test_append_of_known_ids_only(tmp_path: Path) -> None:
    case = Case(tmp_path, append=True)
    before = core(case.out)
    changed = write_lines(tmp_path / "again.jsonl", [document("a", 9), document("q", 9)])
    for _ in range(2):
        manifest = featurize(str(changed), case.out, FEW, OneProcess(), append=True)
        assert manifest["content_hash"] == before["content_hash"]
        assert manifest["sources"][2]["without_shard"] == {"records": [[0, 2]], "present": 2}
    assert whole(case.out, [*case.specs, str(changed)])["csv"] == before["csv"]


def test_append_to_nothing(tmp_path: Path) -> None:
    source = str(write_lines(tmp_path / "s.jsonl", LINES))
    with pytest.raises(UserError, match="holds no dataset"):
        featurize(source, tmp_path / "out", FEW, OneProcess(), append=True)


def wait_until_gone(out: Path) -> None:
    """mpiexec ends a little before the last of the ranks that it kills."""
    text = "".join(path.read_text() for path in (out / "logs").glob("*"))
    for number in re.findall(r" process (\d+) on ", text):
        state = Path(f"/proc/{number}/stat")
        with suppress(OSError):
            while int(number) != os.getpid() and state.read_text().rpartition(")")[2][1] != "Z":
                time.sleep(0.01)


# A job in which every crystal takes 5 ms, and one of them is a case that nobody foresaw.
SLOW = """
import os, time
from featurization import resume, worker
resume.BLOCK = 4
standardize = worker.standardize

def slow(crystal, *arguments):
    time.sleep(0.005)
    if crystal.id == os.environ.get("FATAL"):
        raise RuntimeError("not foreseen")
    return standardize(crystal, *arguments)

worker.standardize = slow
import xtal
xtal.main()
"""
STEPS = 240


class Job:
    """A source on which two ranks work for a second, and the folder that they fill."""

    def __init__(self, folder: Path) -> None:
        lines = [document(f"m{i % 200}", 4 + i / 900) for i in range(STEPS)]
        lines[77] = broken("x")
        self.source = write_lines(folder / "s.jsonl", lines)
        self.out = folder / "out"
        self.settings = folder / "c.toml"
        self.settings.write_text('selection = "miller:2"\nshard_structures = 20\n')
        config = SMALL.model_copy(update={"shard_structures": 20})
        run(self.source, folder / "expected", config)
        self.expected = core(folder / "expected")

    def words(self, size: int) -> list[str]:
        words = ["-c", SLOW, "featurize", self.source, self.out, "--config", self.settings]
        return [str(word) for word in (MPIEXEC, "-n", size, sys.executable, *words)]

    def start(self, size: int) -> subprocess.Popen[str]:
        """A job that has begun to featurize on all ranks."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        wait_until_gone(self.out)
        before = self.attempts()
        job = subprocess.Popen(
            self.words(size), env=environment, text=True, stdout=pipe, stderr=pipe
        )
        while len(self.attempts() - before) < size:
            assert job.poll() is None
            time.sleep(0.01)
        return job

    def attempts(self) -> set[str]:
        return {path.name for path in (self.out / "journal").glob("at-*")}

    def ranks(self, attempt: int) -> list[int]:
        """Processes of an attempt, as their logs say."""
        logs = [path.read_text() for path in sorted((self.out / "logs").iterdir())]
        found = [re.findall(rf"attempt {attempt}, .* process (\d+) ", text) for text in logs]
        return [int(process) for processes in found for process in processes]


@needs_mpi
def test_killed_ranks_and_jobs(tmp_path: Path) -> None:
    job = Job(tmp_path)
    choose = random.Random(5)
    for attempt, (size, victims) in enumerate([(3, 1)], 1):
        running = job.start(size)
        time.sleep(choose.uniform(0.05, 0.4))
        for victim in choose.sample(job.ranks(attempt), victims):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        running.communicate(timeout=60)
        assert running.returncode not in (0, 1, 2)
    running = job.start(2)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert whole(job.out, [str(job.source)]) == job.expected


@needs_mpi
def test_walltime(tmp_path: Path) -> None:
    job = Job(tmp_path)
    before = 0
    for attempt, number in enumerate((signal.SIGTERM, signal.SIGUSR1), 1):
        running = job.start(2)
        time.sleep(0.2)
        if number == signal.SIGTERM:
            running.send_signal(number)  # mpiexec passes it on
        else:
            os.kill(job.ranks(attempt)[1], number)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 75, said
        assert said.count(f"stopped by {number.name}") == 1
        assert said.count("give the same command again") == 1
        assert "Traceback" not in said
        # Nobody is to blame, and what was begun is gone.
        assert not job.attempts()
        assert not list((job.out / "shards").glob(".*"))
        done = sum(b - a for each in journaled(job.out) for a, b in each["ranges"])
        assert before < done < STEPS
        before = done
    wait_until_gone(job.out)
    run(job.source, job.out, SMALL.model_copy(update={"shard_structures": 20}))
    assert whole(job.out, [str(job.source)]) == job.expected


@needs_mpi
def test_what_nobody_foresaw_is_told_in_one_place(tmp_path: Path) -> None:
    job = Job(tmp_path)
    done = process(job.words(2), FATAL="m120", timeout=60)
    assert done.returncode not in (0, 75)
    story = done.stderr[done.stderr.index("rank ") :]
    assert re.match(r"rank [01] of 2 failed:\nTraceback", story)
    assert "RuntimeError: not foreseen\nwhile at record 120 (id 'm120')" in story
    logs = [path.read_text() for path in (job.out / "logs").iterdir()]
    assert sum("while at record 120 (id 'm120')" in text for text in logs) == 1
    assert sum("RuntimeError: not foreseen" in text for text in logs) == 1
    wait_until_gone(job.out)
    run(job.source, job.out, SMALL.model_copy(update={"shard_structures": 20}))
    assert whole(job.out, [str(job.source)]) == job.expected
