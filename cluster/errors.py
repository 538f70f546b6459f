"""The exceptions that the command line explains without a traceback."""

from collections.abc import Callable


class UserError(ValueError):
    """Bad input or a bad request: the message names the value and the rule, `remedy` the way out.

    The command line prints both without a traceback and exits with 2.
    """

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(f"{problem}\n  remedy: {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[Callable[[str, str], "UserError"], tuple[str, str]]:
        # Exceptions are rebuilt from their message alone, on which a rank or a worker would choke.
        return _rebuilt, (self.problem, self.remedy)


def _rebuilt(problem: str, remedy: str) -> UserError:
    return UserError(problem, remedy=remedy)


class RunFailed(RuntimeError):
    """The input was good and the work still failed: the command line exits with 1."""

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(f"{problem}\n  remedy: {remedy}")
