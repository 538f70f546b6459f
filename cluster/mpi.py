"""The only file that imports mpi4py: the ranks of a job, or one process without MPI."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from cluster.errors import UserError

# What each launcher says of the number of processes that it started.
_LAUNCHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


Result = TypeVar("Result")


class Ranks(Protocol):
    """The few collective operations that featurization needs."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        """All ranks' values in rank order on rank 0, None elsewhere."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""

    def abort(self) -> None:
        """End every rank at once, after the traceback of the current exception is printed."""


class OneProcess:
    """A job of one rank without MPI."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def abort(self) -> None:
        pass  # the exception itself ends the only process


class MpiRanks:
    """The world communicator of an MPI job."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank = int(communicator.Get_rank())
        self.size = int(communicator.Get_size())

    def gather(self, value: Any) -> list[Any] | None:
        gathered: list[Any] | None = self._communicator.gather(value, root=0)
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self._communicator.bcast(value, root=0)

    def abort(self) -> None:
        # One dead rank would leave the others waiting for it for ever.
        print(f"rank {self.rank} of {self.size} failed:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        self._communicator.Abort(1)


def ranks() -> Ranks:
    """The ranks of this job; MPI is started only under a launcher (mpiexec, srun).

    Raises:
        UserError: the launcher started several processes but the MPI library sees one, which
            would make every process do all the work.
    """
    announced = max((int(os.environ.get(name) or 1) for name in _LAUNCHER_SIZES), default=1)
    if not any(name in os.environ for name in _LAUNCHER_SIZES):
        return OneProcess()
    try:
        from mpi4py import MPI
    except ImportError as error:
        if announced == 1:
            return OneProcess()
        raise UserError(
            f"started as {announced} processes, but mpi4py cannot be imported: {error}",
            remedy="pip install mpi4py mpich, or run one process",
        ) from None
    world = MpiRanks(MPI.COMM_WORLD)
    if world.size != announced:
        raise UserError(
            f"the launcher started {announced} processes, the MPI library sees {world.size}",
            remedy="use the mpiexec of mpi4py's own MPI, or srun --mpi=pmi2",
        )
    return world


def agree(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Do local work on every rank; if it is a `UserError` on one of them, it is one on all.

    Without this, the ranks that succeeded would wait for ever for the one that did not.
    """
    result: Any = None
    failure = None
    try:
        result = work()
    except UserError as error:
        failure = error.problem, error.remedy
    failures = ranks.broadcast([f for f in ranks.gather(failure) or [] if f])
    if failures:
        raise UserError(failures[0][0], remedy=failures[0][1])
    answer: Result = result
    return answer
