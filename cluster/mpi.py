"""The only file that imports mpi4py: the ranks of a job, or one process without MPI."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DiskFailed, RunFailed, Stopped, UserError
from cluster.files import disk_failed

# What each launcher says of the number of processes that it started.
_LAUNCHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_STARTING = 300  # s, in which all ranks meet, or never will
# Where a stopped counter stands: room for further claims below the largest int64.
_BEYOND = 1 << 62

Result = TypeVar("Result")


class Ranks(Protocol):
    """What featurization needs of a parallel job."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        """All ranks' values in rank order on rank 0, None elsewhere."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""

    def board(self, width: int) -> "Board":
        """A new board with rows of `width` numbers; every rank calls this."""

    def abort(self) -> None:
        """End every rank at once, after the traceback of the current exception is printed.

        The exit code is that of `DiskFailed` if it is the disk's fault, else 1.
        """


class Board(Protocol):
    """What all ranks share while they work apart: a counter, and a row of numbers a rank."""

    def claim(self, step: int) -> int:
        """The counter, which at once moves on by `step`: no two ranks get the same number."""

    def stop(self) -> None:
        """From now on every rank claims numbers beyond all work."""

    def post(self, row: Sequence[int]) -> None:
        """Show this rank's row to rank 0."""

    def attend(self) -> None:
        """Let others reach the board; rank 0 calls this often, best after every millisecond."""

    def rows(self) -> NDArray[np.int64]:
        """On rank 0, (size, width): the rows as last posted."""

    def close(self) -> None:
        """Every rank calls this once its work is over."""


class LocalBoard:
    """The board of ranks that share memory."""

    def __init__(self, size: int, width: int) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._rows = np.zeros((size, width), dtype=np.int64)

    def claim(self, step: int) -> int:
        with self._lock:
            self._next += step
            return self._next - step

    def stop(self) -> None:
        with self._lock:
            self._next = _BEYOND

    def post(self, row: Sequence[int], rank: int = 0) -> None:
        self._rows[rank] = row

    def attend(self) -> None:
        pass

    def rows(self) -> NDArray[np.int64]:
        return self._rows.copy()

    def close(self) -> None:
        pass


class MpiBoard:
    """The board of an MPI job: memory of rank 0 that the others reach without its help.

    Measured by benchmarks/claims.py: `Win.allocate` gives shared memory within a node, so that a
    claim takes microseconds whatever rank 0 does. Between nodes without remote atomics, and under
    srun without shared memory (`_choose_network`), it waits until rank 0 is inside of MPI
    (`attend`), as it would for a server of messages.
    """

    def __init__(self, mpi: Any, communicator: Any, width: int) -> None:
        self._mpi, self._communicator = mpi, communicator
        self._rank, self._size, self._width = communicator.rank, communicator.size, width
        words = 1 + self._size * width if self._rank == 0 else 0
        self._window = mpi.Win.Allocate(8 * words, 8, comm=communicator)
        self._memory = np.frombuffer(self._window.tomemory(), dtype=np.int64)
        self._memory[:] = 0
        communicator.Barrier()
        self._window.Lock_all()

    def claim(self, step: int) -> int:
        found = np.zeros(1, dtype=np.int64)
        self._window.Fetch_and_op(np.array([step], dtype=np.int64), found, 0, 0, self._mpi.SUM)
        self._window.Flush(0)
        return int(found[0])

    def stop(self) -> None:
        found = np.zeros(1, dtype=np.int64)
        beyond = np.array([_BEYOND], dtype=np.int64)
        self._window.Fetch_and_op(beyond, found, 0, 0, self._mpi.REPLACE)
        self._window.Flush(0)

    def post(self, row: Sequence[int]) -> None:
        place = 1 + self._rank * self._width
        self._window.Put(np.array(row, dtype=np.int64), 0, place)
        self._window.Flush_local(0)

    def attend(self) -> None:
        if self._rank == 0:
            self._communicator.Iprobe()

    def rows(self) -> NDArray[np.int64]:
        self.attend()
        self._window.Sync()
        return self._memory[1:].reshape(self._size, self._width).copy()

    def close(self) -> None:
        self._window.Unlock_all()
        self._window.Free()


class OneProcess:
    """A job of one rank without MPI."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def board(self, width: int) -> Board:
        return LocalBoard(1, width)

    def abort(self) -> None:
        pass  # the exception itself ends the only process


class MpiRanks:
    """The world communicator of an MPI job."""

    def __init__(self, mpi: Any) -> None:
        self._mpi, self._communicator = mpi, mpi.COMM_WORLD
        communicator = self._communicator
        self.rank = int(communicator.Get_rank())
        self.size = int(communicator.Get_size())

    def gather(self, value: Any) -> list[Any] | None:
        gathered: list[Any] | None = self._communicator.gather(value, root=0)
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self._communicator.bcast(value, root=0)

    def board(self, width: int) -> Board:
        return MpiBoard(self._mpi, self._communicator, width)

    def abort(self) -> None:
        # One dead rank would leave the others waiting for it for ever. One write, so that the
        # lines of two ranks do not mix.
        sys.stderr.write(f"rank {self.rank} of {self.size} failed:\n{traceback.format_exc()}")
        sys.stderr.flush()
        time.sleep(0.5)  # the launcher forwards it, but not once it is told to abort
        disk = disk_failed(sys.exception())
        self._communicator.Abort(DiskFailed.exit_code if disk else 1)


def ranks() -> Ranks:
    """The ranks of this job; MPI is started only under a launcher (mpiexec, srun).

    SIGALRM ends the process if the ranks have not met within 5 minutes.

    Raises:
        UserError: the launcher started several processes but the MPI library sees one, which
            would make every process do all the work.
    """
    announced = max((int(os.environ.get(name) or 1) for name in _LAUNCHER_SIZES), default=1)
    if not any(name in os.environ for name in _LAUNCHER_SIZES):
        return OneProcess()
    _choose_network()
    # The default action of its signal ends a process that hangs in the MPI library, too.
    signal.alarm(_STARTING)
    try:
        from mpi4py import MPI
    except ImportError as error:
        if announced == 1:
            return OneProcess()
        raise UserError(
            f"started as {announced} processes, but mpi4py cannot be imported: {error}",
            remedy="pip install mpi4py mpich, or run one process",
        ) from None
    finally:
        signal.alarm(0)
    world = MpiRanks(MPI)
    if world.size != announced:
        raise UserError(
            f"the launcher started {announced} processes, the MPI library sees {world.size}",
            remedy="use the mpiexec of mpi4py's own MPI, or srun --mpi=pmi2",
        )
    return world


def _choose_network() -> None:
    """Let the MPI of pip (mpich) meet by libfabric under srun, unless the environment chooses.

    By UCX, its own choice, a rank tells its address in 5 KiB of which a line may be longer than the
    1,024 bytes that SLURM's pmi2 reads as one. By libfabric, beside shared memory for ranks of one
    node, MPICH 5.0.2 hung in one of four meetings (benchmarks/LOG.md): they use it as well.
    """
    found = find_spec("mpi4py")
    places = (found and found.submodule_search_locations) or []
    # The wheel, which finds pip's MPI; mpi4py built for a site's MPI has no such file.
    wheel = any(Path(place).glob("MPI.mpich.*") for place in places)
    other = {"MPI4PY_LIBMPI", "MPI4PY_MPIABI"} & {*os.environ}
    if "SLURM_PROCID" in os.environ and wheel and not other:
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        if os.environ["MPIR_CVAR_CH4_NETMOD"] == "ofi":
            os.environ.setdefault("MPIR_CVAR_NOLOCAL", "1")
        if interface := os.environ.get("XTAL_RAY_INTERFACE"):
            os.environ.setdefault("FI_TCP_IFACE", interface)


def agree(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Do local work on every rank; if one of them raises a `UserError` or `RunFailed`, all do.

    Without this, the ranks that succeeded would wait for ever for the one that did not.
    """
    result: Any = None
    failure = None
    try:
        result = work()
    except (UserError, RunFailed) as error:
        failure = error
    failures = [each for each in ranks.gather(failure) or [] if each]
    failures.sort(key=lambda each: isinstance(each, Stopped))  # what went wrong goes first
    if first := ranks.broadcast(failures[0] if failures else None):
        raise first
    answer: Result = result
    return answer


def on_rank_0(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Rank 0's answer, or the `UserError` or `RunFailed` that it raises, on every rank."""
    answer: Result = ranks.broadcast(agree(ranks, lambda: work() if ranks.rank == 0 else None))
    return answer
