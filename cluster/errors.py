"""The exceptions that the command line explains without a traceback."""

from collections.abc import Callable
from typing import Any


class _Explained(Exception):
    """An exception with a way out; it can be sent to another process."""

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(f"{problem}\n  remedy: {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> "tuple[Callable[..., Any], tuple[Any, ...]]":
        # Exceptions are rebuilt from their message alone, on which a rank or a worker would choke.
        return _rebuilt, (type(self), self.problem, self.remedy)


class UserError(_Explained, ValueError):
    """Bad input or a bad request: the message names the value and the rule, `remedy` the way out.

    The command line prints both without a traceback and exits with 2.
    """

    exit_code = 2


class RunFailed(_Explained, RuntimeError):
    """The input was good and the work still failed: the command line exits with 1."""

    exit_code = 1


class Stopped(RunFailed):
    """A signal asked the work to stop, and what is done is safe: the same command goes on.

    The command line exits with 75 (EX_TEMPFAIL of sysexits.h), which batch scripts requeue.
    """

    exit_code = 75


class DiskFailed(RunFailed):
    """No room or no quota left, or a file system out of reach: the same command goes on later.

    The command line exits with 74 (EX_IOERR of sysexits.h), at which batch jobs wait and go on.
    """

    exit_code = 74


def _rebuilt(kind: type[_Explained], problem: str, remedy: str) -> _Explained:
    return kind(problem, remedy=remedy)
