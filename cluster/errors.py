"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input or a bad request: the message names the value and the rule, `remedy` the way out.

    The command line prints both without a traceback and exits with 2.
    """

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(f"{problem}\n  remedy: {remedy}")
        self.problem = problem
        self.remedy = remedy
