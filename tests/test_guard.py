"""No single crystal stops a job: it is rejected with the reason, and all others are there."""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from test_mpi import MPIEXEC, needs_mpi
from test_resume import wait_until_gone
from tiny import SMALL, document, process, run, write_lines

from featurization import worker
from featurization.crystal import Crystal
from featurization.journal import deaths
from featurization.verify import verify

COUNT = 12


def source(folder: Path) -> Path:
    lines = [document(f"m{i}", 4 + i / 50) for i in range(COUNT)]
    return write_lines(folder / "s.jsonl", lines)


def rejected(out: Path) -> list[tuple[str, str, str]]:
    with (out / "rejects.csv").open(newline="") as stream:
        return [(row["id"], row["stage"], row["reason"]) for row in csv.DictReader(stream)]


def whole_but(out: Path, spec: Path, lost: str, reason: str) -> None:
    """All crystals but one are there, which is rejected with the reason."""
    assert rejected(out) == [(lost, "guard", reason)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["structures"] == COUNT - 1
    assert verify(out, [str(spec)], sample=COUNT)["problems"] == []


# A job that goes wrong at m5 in the way that HOW tells.
BAD = """
import ctypes, os, signal, time
from featurization import resume, worker
resume.BLOCK = 4
standardize = worker.standardize
native = ctypes.PyDLL(None)  # keeps the lock of the interpreter, so that no alarm is heard

def bad(crystal, *arguments):
    if crystal.id == "m5":
        if os.environ["HOW"] == "hang":
            many = ctypes.create_string_buffer(400_000_000)
            native.qsort(many, ctypes.c_size_t(len(many)), ctypes.c_size_t(1), native.strcmp)
        if os.environ["HOW"] == "kill":
            time.sleep(0.3)  # the other ranks are at m0 and m8 by then
            os.kill(os.getpid(), signal.SIGKILL)
    if crystal.id in ("m0", "m8") and os.environ["HOW"] == "kill":
        time.sleep(0.6)  # is always at work when m5 ends the job
    return standardize(crystal, *arguments)

worker.standardize = bad
import xtal
xtal.main()
"""


def words(folder: Path, seconds: float) -> list[str | Path]:
    settings = folder / "c.toml"
    settings.write_text(f'selection = "miller:2"\nmax_seconds = {seconds}\n')
    return ["-c", BAD, "featurize", source(folder), folder / "out", "--config", settings]


def test_too_many_atoms(tmp_path: Path) -> None:
    large = document("large", 8)
    apart = [each | {"abc": [x / 2 for x in each["abc"]]} for each in large["structure"]["sites"]]
    large["structure"]["sites"] = apart + document("as they were")["structure"]["sites"][1:]
    spec = write_lines(tmp_path / "s.jsonl", [document("a"), large])
    run(spec, tmp_path / "out", SMALL.model_copy(update={"max_atoms": 2}))
    [row] = rejected(tmp_path / "out")
    assert row[:2] == ("large", "structure")
    assert "3 atoms exceed max_atoms = 2" in row[2]


def test_python_code_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standardize = worker.standardize

    def slow(crystal: Crystal, *arguments: object) -> object:
        while crystal.id == "m5":
            pass
        return standardize(crystal, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "standardize", slow)
    spec = source(tmp_path)
    run(spec, tmp_path / "out", SMALL.model_copy(update={"max_seconds": 0.5}))
    monkeypatch.undo()
    whole_but(tmp_path / "out", spec, "m5", "took longer than max_seconds = 0.5")


def test_native_code_that_hangs(tmp_path: Path) -> None:
    command = [sys.executable, *words(tmp_path, 0.4)]
    first = process(command, HOW="hang")
    assert first.returncode == -signal.SIGVTALRM, first.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    [mark] = (tmp_path / "out" / "journal").glob("at-*")
    assert mark.read_text().startswith(f"{5:019d}\nStack (most recent call first)")
    second = process(command, HOW="hang")
    assert second.returncode == 0, second.stderr
    reason = "hung in native code, which ended its process"
    whole_but(tmp_path / "out", tmp_path / "s.jsonl", "m5", reason)


@needs_mpi
def test_a_crystal_that_kills_its_process(tmp_path: Path) -> None:
    command = [str(MPIEXEC), "-n", "3", sys.executable, *words(tmp_path, 30)]
    for _ in range(3):
        assert process(command, HOW="kill").returncode not in (0, 2, 75)
        wait_until_gone(tmp_path / "out")
    done = process(command, HOW="kill")
    assert done.returncode == 0, done.stderr
    reason = "its process died 3 times while at this crystal"
    whole_but(tmp_path / "out", tmp_path / "s.jsonl", "m5", reason)


def test_who_is_to_blame(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()

    def mark(attempt: int, rank: int, text: str) -> None:
        (folder / f"at-{attempt:04d}-{rank:05d}").write_text(text)

    for attempt in (1, 2):
        for rank, record in enumerate((7, 8, 9)):
            mark(attempt, rank, f"{record:019d}\n")
    mark(1, 3, " " * 19 + "\n")  # between two blocks
    mark(1, 4, "")  # before the first
    mark(2, 5, f"{3:019d}\nStack …")
    reasons, suspects = deaths(tmp_path)
    assert list(reasons) == [3]
    assert "native code" in reasons[3]
    assert sorted(suspects) == [7, 8, 9]
    mark(3, 0, f"{8:019d}\n")
    reasons, suspects = deaths(tmp_path)
    assert reasons[8] == "its process died 3 times while at this crystal"
    assert sorted(suspects) == [7, 9]


def test_alarms_are_those_of_before(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGTERM)]
    run(source(tmp_path), tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGTERM)] == before
    assert os.listdir(tmp_path / "out" / "logs") == ["rank-00000.log"]
