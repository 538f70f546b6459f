"""No single crystal stops a job: it is rejected with the reason, and all others are there."""

import csv
import json
import os
import signal
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_mpi import MPIEXEC, needs_mpi
from test_resume import wait_until_gone
from tiny import SMALL, document, process, run, write_lines

from featurization import worker
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, Reject
from featurization.guard import Guard
from featurization.journal import deaths
from featurization.sources import open_source
from featurization.structures import crystal_from_cif
from featurization.validation import MAX_BYTES
from featurization.verify import verify

COUNT = 12
AXES = (("a", "alpha"), ("b", "beta"), ("c", "gamma"))


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


def test_compiled_code_that_takes_too_long(tmp_path: Path) -> None:
    """The alarm finds a kernel at work, which comes back with a SystemError."""
    heavy = copper(2.5, (8, 8, 8)) | {"material_id": "m5"}
    for number, site in enumerate(heavy["structure"]["sites"]):
        site["abc"] = [x + 0.02 * (number * k % 7 / 7) for k, x in enumerate(site["abc"], 1)]
    lines = [document(f"m{i}", 4 + i / 50) for i in range(COUNT)]
    lines[5] = heavy
    spec = write_lines(tmp_path / "s.jsonl", lines)
    config = FeaturizationConfig(selection="sphere:3", max_points=1_000_000, symprec=1e-3)
    worker.warm_up(config)
    source = open_source(str(spec))
    before = time.process_time()
    crystal = worker.crystal_of(source, list(source.records())[5], config)
    standard, _ = worker.standardize(crystal, config.cell, config.symprec)
    between = time.process_time()
    diffraction_cloud(standard, config)
    cloud = time.process_time() - between
    seconds = between - before + cloud / 2
    assert cloud > seconds, "most of the time is not that of the kernel"
    run(spec, tmp_path / "out", config.model_copy(update={"max_seconds": seconds}))
    whole_but(tmp_path / "out", spec, "m5", f"took longer than max_seconds = {seconds:g}")


def relabelled(*_: object) -> None:
    try:
        while True:
            pass
    except BaseException as error:
        raise Reject("cell", f"symmetry search failed: {error}") from None


def ignored(crystal: Crystal, *arguments: Any) -> object:
    try:
        while True:
            pass
    except Reject:
        return STANDARDIZE(crystal, *arguments)


def ignored_twice(*arguments: Any) -> object:
    try:
        while True:
            pass
    except Reject:
        return ignored(*arguments)


STANDARDIZE = worker.standardize


@pytest.mark.parametrize("swallowing", [relabelled, ignored, ignored_twice])
def test_code_that_swallows_the_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swallowing: Any
) -> None:
    def slow(crystal: Crystal, *arguments: Any) -> object:
        return (swallowing if crystal.id == "m5" else STANDARDIZE)(crystal, *arguments)

    monkeypatch.setattr(worker, "standardize", slow)
    spec = source(tmp_path)
    run(spec, tmp_path / "out", SMALL.model_copy(update={"max_seconds": 0.3}))
    monkeypatch.undo()
    whole_but(tmp_path / "out", spec, "m5", "took longer than max_seconds = 0.3")


def test_a_guard_changes_nothing_but_what_is_late(tmp_path: Path) -> None:
    def wait(seconds: float, then: type[BaseException] | None = None) -> None:
        begun = time.process_time()
        try:
            while time.process_time() < begun + seconds:
                pass
        finally:
            if then:
                raise then

    with Guard(tmp_path / "at", 0.1) as guard:
        with pytest.raises(KeyError), guard.watching(0):
            raise KeyError
        for raised, left in ((KeyError, Reject), (KeyboardInterrupt, KeyboardInterrupt)):
            with pytest.raises(left), guard.watching(1):
                wait(60, then=raised)
        with guard.watching(3):
            pass
        wait(0.2)


def test_an_alarm_in_a_destructor(tmp_path: Path) -> None:
    """The interpreter ignores what is raised there: not a word of it, and the next alarm counts."""

    class Slow:
        def __del__(self) -> None:
            while not guard._late:
                pass

    def unlike() -> None:
        class Bad:
            def __del__(self) -> None:
                raise Reject("cell", "another")

        Bad()

    def never_ends() -> None:
        Slow()
        while True:
            pass

    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda lost: heard.append(str(lost.exc_value)))
        with Guard(tmp_path / "at", 0.1) as guard:
            with guard.watching(0):
                unlike()
            assert heard == ["cell: another"]
            with pytest.raises(Reject, match="took longer"), guard.watching(1):
                never_ends()
        assert heard == ["cell: another"]


def test_long_ids_and_reasons_are_shortened(tmp_path: Path) -> None:
    long = 150_000
    lines = [
        document("a" * 256),
        document("b" * 257),
        {"material_id": "c" * long},
        document("d", elements=("Q" * long, "Cl")),
    ]
    spec = write_lines(tmp_path / "s.jsonl", lines)
    assert run(spec, tmp_path / "out")["structures"] == 1
    rows = rejected(tmp_path / "out")
    assert max(len(cell) for row in rows for cell in row) < 400
    assert rows[0] == ("b" * 257, "source", "id of 257 characters; at most 256")
    assert rows[1][0] == "c" * 300 + f"… ({long} characters)"
    assert "QQQ… (1500" in rows[2][2]
    assert verify(tmp_path / "out", [str(spec)], sample=1)["problems"] == []


def test_native_code_that_hangs(tmp_path: Path) -> None:
    command = [sys.executable, *words(tmp_path, 0.4)]
    first = process(command, HOW="hang")
    assert first.returncode == -signal.SIGVTALRM, first.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    [mark] = (tmp_path / "out" / "journal").glob("at-*")
    assert mark.read_text().startswith(f"{5:019d}\nStack (most recent call first)")
    second = process(command, HOW="hang")
    assert second.returncode == 0, second.stderr
    reason = (
        "hung in native code, which ended its process; to try it again: xtal verify OUT --retry"
    )
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
    reason += "; to try it again: xtal verify OUT --retry"
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
    assert reasons[8].startswith("its process died 3 times while at this crystal; to try")
    assert sorted(suspects) == [7, 9]


def test_alarms_are_those_of_before(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGTERM)]
    run(source(tmp_path), tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGTERM)] == before
    assert os.listdir(tmp_path / "out" / "logs") == ["rank-00000.log"]


# What each crystal adds to the memory of a process, MiB, and its points or why it has none.
PEAK = """
import json, sys
from pathlib import Path
from featurization.config import FeaturizationConfig
from featurization.crystal import Reject
from featurization.sources import JsonLines
from featurization.worker import warm_up, featurize_one

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

warm_up(FeaturizationConfig())
before = peak()
answers = []
source = JsonLines(Path(sys.argv[1]))
for record, settings in zip(source.records(), json.loads(sys.argv[2]), strict=True):
    Path("/proc/self/clear_refs").write_text("5")
    try:
        answer = len(featurize_one(source, record, FeaturizationConfig(**settings)).cloud.hkl)
    except Reject as reject:
        answer = str(reject)
    answers.append([peak() - before, answer])
print(json.dumps(answers))
"""


def copper(edge: float, times: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """A document of a supercell of simple copper, edges in Å."""
    matrix = [[edge * times[i] if i == k else 0.0 for k in range(3)] for i in range(3)]
    sites = [
        {
            "species": [{"element": "Cu", "occu": 1}],
            "abc": [n / m for n, m in zip(at, times, strict=True)],
        }
        for at in product(*map(range, times))
    ]
    return {"material_id": "m", "structure": {"lattice": {"matrix": matrix}, "sites": sites}}


def layer(thin: float, wide: float) -> Any:
    """A document of one atom in a cell that is wide in two directions."""
    given = copper(1.0)
    given["structure"]["lattice"]["matrix"] = [[wide, 0, 0], [0, wide + 1, 0], [0, 0, thin]]
    return given


# Document and settings of the worst of each kind that is taken.
WORST: list[tuple[Any, dict[str, Any]]] = [
    (copper(4) | {"more": [{"a": 1}] * 1_040_000}, {}),
    (
        copper(30.1),
        {"cell": "as_given", "also_radiation": ["xray_pymatgen", "neutron", "electron"]},
    ),
    (layer(0.55, 1190), {"selection": "sphere:0.21", "cell": "as_given", "symprec": 1e-4}),
    (copper(2.5, (10, 10, 20)), {}),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_worst_crystals_that_are_taken_stay_below_300_mib(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    lines = (json.dumps(given, separators=(",", ":")) for given, _ in WORST)
    path.write_text("\n".join(lines))
    settings = json.dumps([each for _, each in WORST])
    done = process([sys.executable, "-c", PEAK, path, settings])
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [type(points) for _, points in answers] == [int] * len(WORST), answers
    assert answers[0][0] > 100, "the text is not near the limit"
    assert answers[1][1] > 90_000
    assert answers[2][1] > 90_000
    assert max(used for used, _ in answers) < 300, answers


def test_what_would_take_too_much_memory_is_a_reject(tmp_path: Path) -> None:
    long = document("long") | {"more": "x" * MAX_BYTES}
    skewed = copper(1.0) | {"material_id": "skewed"}
    skewed["structure"]["lattice"]["matrix"] = [[49.4, 0, 0], [0, 1000, 0], [0, 0, 2.15]]
    spec = write_lines(tmp_path / "s.jsonl", [document("a"), long, skewed])
    run(spec, tmp_path / "out")
    (a, stage, reason), (b, stage_b, reason_b) = rejected(tmp_path / "out")
    assert (a, stage) == ("long", "source")
    assert reason.startswith("8.0 MiB of text; must be ≤ 8 MiB: leave out")
    assert (b, stage_b) == ("skewed", "cell")
    assert "edges of 2.15 and 1e+03 Å with symprec 0.1 Å" in reason_b
    assert "use a smaller symprec" in reason_b


def test_cif_of_too_many_atoms_is_not_expanded() -> None:
    head = "data_x\n" + "".join(f"_cell_length_{x} 90\n_cell_angle_{y} 90\n" for x, y in AXES)
    head += "_space_group_name_H-M_alt '{}'\nloop_\n_atom_site_label\n"
    head += "".join(f"_atom_site_fract_{x}\n" for x in "xyz")
    many = "".join(f"Si 0.1{n:04d} 0.2 0.3\n" for n in range(10_001))
    with pytest.raises(Reject, match="10001 rows of atoms; must be 1 to 10000"):
        crystal_from_cif(head.format("P 1") + many, "x", {})
    few = "".join(f"Si 0.1{n:04d} 0.23 0.37\n" for n in range(0, 1000, 10))
    with pytest.raises(Reject, match=r"\d+ atoms; must be 1 to 10000"):
        crystal_from_cif(head.format("F m -3 m") + few, "x", {})
