"""What `xtal submit` knows of the verbs that it submits: their options, and what they refuse."""

import copy
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from cluster.errors import UserError

_UsageError: Any = typer.BadParameter.__base__  # typer does not name it
SETTINGS = "settings"  # in the context of a verb: a function of its parameters that may refuse them


def verb_of(context: Any, verb: str) -> Any:
    """The verb's own command."""
    command = context.find_root().command.get_command(context, verb)
    return getattr(command, "commands", {}).get("run", command)  # of ablate


class _Submits(TyperCommand):
    """Help and completion show more than is read here: `shown`."""

    _reads = False

    def shown(self, context: Any, own: list[Any]) -> list[Any]:
        raise NotImplementedError

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        return own if self._reads else self.shown(ctx, own)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._reads = True
        try:
            return super().parse_args(ctx, args)
        finally:
            self._reads = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._reads = False
        super().format_help(ctx, formatter)


class SubmitsVerb(_Submits):
    """The verb of the same name has options, too, which are passed on."""

    def shown(self, context: Any, own: list[Any]) -> list[Any]:
        names = {each.name for each in own}
        theirs = [
            copy.copy(each)
            for each in verb_of(context, str(self.name)).params
            if each.param_type_name == "option" and each.name not in names
        ]
        for each in theirs:
            each.rich_help_panel = f"Options of xtal {self.name}"
        return own + theirs


class SubmitsChain(_Submits):
    """The task is that of `xtal train`."""

    def shown(self, context: Any, own: list[Any]) -> list[Any]:
        (theirs,) = (each for each in verb_of(context, "train").params if each.name == "task")
        mine = copy.copy(theirs)
        (asked,) = (each for each in own if each.name == "task")
        mine.default, mine.show_default = asked.default, True
        return [mine if each is asked else each for each in own]


def grids(context: typer.Context, incomplete: str) -> list[str]:
    """What `xtal ablate` offers for its grid."""
    grid = verb_of(context, "ablate").params[0]
    return [each.value for each in grid.shell_complete(context, incomplete)]


def workers(words: Sequence[str]) -> list[str]:
    """Words that make a training use the whole job, unless `words` say how many workers it has."""
    said = any(word.partition("=")[0] == "--workers" for word in words)
    return [] if said else ["--workers", "0"]


def check_words(context: typer.Context, verb: str, words: Sequence[str]) -> None:
    """Let the verb itself look at its words: a wrong one is found now, not in the queue.

    Raises:
        UserError: it would refuse them, or a configuration that they name.
    """
    try:
        read = verb_of(context, verb).make_context(verb, list(words))
    except _UsageError as error:
        remedy = f"see xtal {verb} --help; paths go first"
        raise UserError(f"xtal {verb}: {error}", remedy=remedy) from None
    read.obj[SETTINGS](read.params)
