"""Many ranks give what one process gives, and a failure of one rank is the failure of the job.

Ranks are threads where only the logic matters, and processes of a real `mpiexec` elsewhere.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpi4py
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import SMALL, broken, document, process, run, write_lines

from cluster.errors import UserError
from cluster.mpi import Board, LocalBoard, OneProcess, Ranks, _choose_network, agree, ranks
from featurization import finish, resume
from featurization.featurize import featurize
from featurization.verify import verify

BESIDE_PYTHON = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE_PYTHON) if BESIDE_PYTHON.exists() else shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")
LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def test_a_process_that_hangs_in_the_library_ends(tmp_path: Path) -> None:
    """Within C, where no exception of Python arrives."""
    (tmp_path / "mpi4py").mkdir()
    hang = "import ctypes\nctypes.PyDLL(None).sleep(30)\n"
    (tmp_path / "mpi4py" / "__init__.py").write_text(hang)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from cluster import mpi\n"
    script += "mpi._STARTING = 1\nmpi.ranks()"
    done = process([sys.executable, "-c", script], timeout=25, PMI_SIZE="2")
    assert done.returncode == -signal.SIGALRM


class _Own:
    """A rank's hold on the board of all."""

    def __init__(self, board: LocalBoard, rank: int) -> None:
        self.claim, self.stop, self.rows = board.claim, board.stop, board.rows
        self.attend, self.close = board.attend, board.close
        self.post = lambda row: board.post(row, rank)


class Threads:
    """Ranks that are threads; values travel pickled, as they do between processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._here = threading.local()
        self._meet = threading.Barrier(size, timeout=20)
        self._table: list[bytes] = [b""] * size

    @property
    def rank(self) -> int:
        return int(self._here.rank)

    def _all(self, value: Any) -> list[Any]:
        self._table[self.rank] = pickle.dumps(value)
        self._meet.wait()
        everything = [pickle.loads(each) for each in self._table]  # noqa: S301
        self._meet.wait()
        return everything

    def gather(self, value: Any) -> list[Any] | None:
        everything = self._all(value)
        return everything if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        return self._all(value)[0]

    def board(self, width: int) -> Board:
        if self.rank == 0:
            self._board = LocalBoard(self.size, width)
        self._meet.wait()
        return _Own(self._board, self.rank)

    def abort(self) -> None:
        self._meet.abort()

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        """What `work` returns, or the exception that it raises, on each rank."""
        outcomes: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self._here.rank = rank
            try:
                outcomes[rank] = work(self)
            except Exception as error:
                outcomes[rank] = error
                if not isinstance(error, UserError):
                    self.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return outcomes


def core(folder: Path) -> dict[str, Any]:
    """What must not depend on the number of ranks."""
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = ("structures", "rejected", "reject_stages", "points", "content_hash", "config")
    parts = [
        {key: value for key, value in source.items() if key not in ("block", "without_shard")}
        for source in manifest["sources"]
    ]
    csv = (folder / "rejects.csv").read_text()
    return {key: manifest[key] for key in keys} | {"sources": parts, "csv": csv}


def mixed_lines(count: int) -> list[Any]:
    """Crystals, with rejects and with duplicates that lie in other blocks, hence other ranks."""
    lines: list[Any] = []
    for i in range(count):
        if i % 11 == 3:
            lines.append(broken(f"b{i}"))
        elif i % 7 == 5:
            lines.append(document(f"m{i // 3}", 4 + i / 50))
        else:
            lines.append(document(f"m{i}", 4 + i / 50, band_gap=i / 10))
    return lines


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ids=st.lists(st.integers(0, 6), max_size=24),
    size=st.integers(1, 5),
    block=st.integers(1, 4),
    shard=st.integers(1, 4),
)
def test_any_number_of_ranks_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], size: int, block: int, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    # Crystal 0 is broken; equal ids have different cells, so that the one kept shows.
    lines = [document(f"m{id}", 4 + i / 9) if id else broken("b") for i, id in enumerate(ids)]
    source = str(write_lines(folder / "s.jsonl", lines))
    config = SMALL.model_copy(update={"shard_structures": shard})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "BLOCK", block)
        many = Threads(size).run(lambda each: featurize(source, folder / "many", config, each))
    if not any(ids):
        assert all(isinstance(each, UserError) for each in many)
        assert len({str(each) for each in many}) == 1
        assert not (folder / "many" / "manifest.json").exists()
    else:
        run(source, folder / "one", config)
        assert core(folder / "many") == core(folder / "one")
        assert all(each == many[0] for each in many)
        assert verify(folder / "many", [source], sample=99)["problems"] == []
    shutil.rmtree(folder)


def test_that_test_finds_a_driver_that_forgets_duplicates_of_other_ranks(tmp_path: Path) -> None:
    source = str(write_lines(tmp_path / "s.jsonl", [document("a", 4), document("a", 5)]))
    run(source, tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "BLOCK", 1)
        patch.setattr(finish, "_drop_duplicates", lambda *_: None)
        Threads(2).run(lambda each: featurize(source, tmp_path / "two", SMALL, each))
    assert core(tmp_path / "two")["structures"] == 2 > core(tmp_path / "one")["structures"]


@given(failing=st.sets(st.integers(0, 3)), size=st.integers(1, 4))
def test_agree(failing: set[int], size: int) -> None:
    def work(each: Ranks) -> int:
        def local() -> int:
            if each.rank in failing:
                raise UserError(f"rank {each.rank}", remedy="r")
            return each.rank

        return agree(each, local)

    outcomes = Threads(size).run(work)
    guilty = sorted(rank for rank in failing if rank < size)
    if guilty:
        assert all(isinstance(each, UserError) for each in outcomes)
        assert {(e.problem, e.remedy) for e in outcomes} == {(f"rank {guilty[0]}", "r")}
    else:
        assert outcomes == list(range(size))


def test_agree_passes_other_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        agree(OneProcess(), lambda: 1 / 0)


def test_user_errors_travel() -> None:
    error = UserError("value 3", remedy="give 2")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is UserError
    assert (str(copy), copy.problem, copy.remedy) == (str(error), "value 3", "give 2")


def test_refusals_reach_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    source = str(write_lines(tmp_path / "s.jsonl", [document("a")]))
    for spec in (source, str(tmp_path / "nothing")):
        outcomes = Threads(3).run(lambda e, s=spec: featurize(s, tmp_path / "out", SMALL, e))
        assert [type(each) for each in outcomes] == [UserError] * 3


def test_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    # In a batch job's shell, before srun, there is one process.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    alone = ranks()
    assert isinstance(alone, OneProcess)
    assert (alone.rank, alone.size, alone.gather(3), alone.broadcast(4)) == (0, 1, [3], 4)
    alone.abort()


def mpi(size: int, *arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    assert MPIEXEC is not None
    return process([MPIEXEC, "-n", str(size), sys.executable, *arguments], timeout=timeout)


XTAL = "import xtal; xtal.main()"


@needs_mpi
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mpiexec_gives_what_one_process_gives(tmp_path: Path, size: int) -> None:
    source = write_lines(tmp_path / "s.jsonl", mixed_lines(150))
    done = mpi(size, "-c", XTAL, "featurize", source, tmp_path / "many", "--selection", "miller:2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("content hash") == 1
    run(source, tmp_path / "one")
    assert core(tmp_path / "many") == core(tmp_path / "one")
    assert core(tmp_path / "one")["rejected"] > 20
    logs = sorted(path.name for path in (tmp_path / "many" / "logs").iterdir())
    assert logs == [f"rank-{rank:05d}.log" for rank in range(size)]


@needs_mpi
def test_more_ranks_than_records(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a"), document("a"), broken("b")])
    done = mpi(3, "-c", XTAL, "featurize", source, tmp_path / "out", "--selection", "miller:2")
    assert done.returncode == 0, done.stderr
    assert core(tmp_path / "out")["structures"] == 1


@needs_mpi
@pytest.mark.parametrize("case", ["strangers", "wrong option", "nothing left"])
def test_user_error_is_said_once(tmp_path: Path, case: str) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    options: list[str] = []
    if case == "strangers":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    elif case == "wrong option":
        options = ["--symprec", "7"]
    else:
        write_lines(source, [broken("b")] * 70)
    done = mpi(2, "-c", XTAL, "featurize", source, tmp_path / "out", *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stderr.count("remedy:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


# Rank 1 fails, in the way that HOW tells, while rank 0 waits for it.
FAILING = """
import os, signal, sys, time
import xtal
from cluster.mpi import ranks
from featurization import resume, worker

resume.BLOCK = 4
one = worker.entry_of

def slowly(*arguments):
    time.sleep(0.1)  # so that the other rank gets a block, too
    return one(*arguments)

class Panic(BaseException):
    "Like a Rust panic: no Exception."

def fail(*_):
    if os.environ["HOW"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise Panic("the reason")

if ranks().rank == 1:
    worker.write_shard = fail
else:
    worker.entry_of = slowly
xtal.main()
"""


@needs_mpi
@pytest.mark.parametrize("how", ["panic", "kill"])
def test_failure_of_one_rank_ends_the_job(tmp_path: Path, how: str) -> None:
    assert MPIEXEC is not None
    source = write_lines(tmp_path / "s.jsonl", mixed_lines(70))
    words = [MPIEXEC, "-n", "2", sys.executable, "-c", FAILING, "featurize", source]
    done = process([*words, tmp_path / "out", "--selection", "miller:2"], HOW=how, timeout=40)
    assert done.returncode != 0
    if how != "kill":
        assert "rank 1 of 2 failed" in done.stderr
        assert "the reason" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    # What it left behind is no obstacle.
    assert run(source, tmp_path / "out")["structures"] > 0


def test_launcher_of_another_mpi_is_noticed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    words = [sys.executable, "-c", XTAL, "featurize", source, tmp_path / "out"]
    done = process(words, PMI_SIZE="4", timeout=40)
    assert done.returncode == 2, done.stderr
    assert "the launcher started 4 processes, the MPI library sees 1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_launcher_without_mpi4py(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no MPI here')")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cluster.mpi as m; "
    words = [sys.executable, "-c", script + "print(type(m.ranks()).__name__)"]
    one = process(words, SLURM_STEP_NUM_TASKS="1")
    assert one.stdout.strip() == "OneProcess"
    many = process(words, SLURM_STEP_NUM_TASKS="3")
    assert many.returncode != 0
    assert "started as 3 processes, but mpi4py cannot be imported" in many.stderr


CHOOSING = (
    "MPIR_CVAR_CH4_NETMOD", "MPIR_CVAR_NOLOCAL", "FI_TCP_IFACE", "SLURM_PROCID",
    "XTAL_RAY_INTERFACE",
)  # fmt: skip


def test_pips_mpi_meets_by_libfabric_under_srun_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not list(Path(mpi4py.__path__[0]).glob("MPI.mpich.*")):
        pytest.skip("mpi4py is not the wheel that finds pip's MPI")

    def chosen(**given: str) -> str | None:
        with monkeypatch.context() as context:
            for name in (*CHOOSING, "MPI4PY_LIBMPI", "MPI4PY_MPIABI"):
                context.delenv(name, raising=False)
            for name, value in given.items():
                context.setenv(name, value)
            _choose_network()
            found = os.environ.pop("MPIR_CVAR_CH4_NETMOD", None)
            assert os.environ.pop("MPIR_CVAR_NOLOCAL", None) == ("1" if found == "ofi" else None)
            assert os.environ.pop("FI_TCP_IFACE", None) == given.get("XTAL_RAY_INTERFACE")
            return found

    assert chosen() is None
    assert chosen(SLURM_PROCID="0", XTAL_RAY_INTERFACE="ib0") == "ofi"
    assert chosen(SLURM_PROCID="0", MPIR_CVAR_CH4_NETMOD="ucx") == "ucx"
    assert chosen(SLURM_PROCID="0", MPI4PY_MPIABI="mpiabi") is None
