"""The terminal: bars, tables and messages that stay readable in 80 columns and in a log file."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import unwrap
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cluster.config import AnyConfig, build_config, read_toml
from cluster.errors import UserError

# Paths and messages are shown as they are, not read as markup.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)
# In a log file, a line of progress as often, s.
_LINE_EVERY = 30.0


def options_from(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of a verb's options: flags go before them."""
    if path is None:
        return None
    options = {
        option.opts[0].removeprefix("--").replace("-", "_"): str(option.name)
        for option in context.command.params
        if option.param_type_name == "option" and not option.is_eager
    }
    kinds = get_type_hints(unwrap(context.command.callback or (lambda: None)))
    values = read_toml(path)
    problems = []
    for key, value in values.items():
        kind = kinds.get(options.get(key, ""))
        if key not in options:
            problems.append(f"{key}: unknown key")
        elif not _fits(value, kind):
            problems.append(f"{key} = {value!r}: must be {_spoken(kind)}")
    if problems:
        remedy = f"valid keys are {', '.join(options)}"
        raise UserError(f"{path}: " + "; ".join(problems), remedy=remedy)
    context.default_map = {options[key]: value for key, value in values.items()}
    return path


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file is of an option's type; as in JSON, a path is text."""
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except (TypeError, ValueError):  # the first is of a date, which JSON does not have
        return False
    return True


def _spoken(kind: Any) -> str:
    parts = [_spoken(part) for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is list:
        return f"a list of {parts[0]}"
    return " or ".join(parts) or ("str" if kind is Path else str(kind.__name__))


def completed(words: Iterable[str]) -> Callable[[str], list[str]]:
    """What the shell offers for an argument or option that takes one of these words."""
    known = list(words)

    def matching(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return matching


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")]
OptionsFile = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=options_from, is_eager=True, help="TOML file with these options."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with the full configuration.")
]


def configured(
    kind: type[AnyConfig],
    path: Path | None,
    flags: Mapping[str, Any],
    spelled: Mapping[str, str] = MappingProxyType({}),
) -> AnyConfig:
    """A configuration from a TOML file, with flags before it.

    Args:
        spelled: flags that are not named as what they set.
    """
    values = {} if path is None else read_toml(path)
    given = {name: value for name, value in flags.items() if value is not None}
    named = {name: spelled.get(name, f"--{name.replace('_', '-')}") for name in given}
    return build_config(kind, values | given, where=str(path), flags=named)


def show_json(result: Any) -> None:
    """A result on stdout for a program: one JSON document, paths as text."""
    print(json.dumps(result, indent=1, default=str, allow_nan=False))


@contextmanager
def bar(title: str, total: float | None, *, shown: bool = True) -> Iterator[Any]:
    """Progress: a bar in a terminal, a line now and then in a log file.

    Yields a function that takes how much is done, and, once it is known, `total`.
    """
    if shown and not err.is_terminal:
        began = said = time.monotonic()
        at: float | None = None
        told: float | None = None

        def line(done: float, **more: Any) -> None:
            nonlocal said, at, total
            at, total = done, more.get("total", total)
            if time.monotonic() > said + _LINE_EVERY:
                say()

        def say() -> None:
            nonlocal said, told
            said, told = time.monotonic(), at
            of = "" if total is None else f" of {total:,g}"
            took = f"{(time.monotonic() - began) / 60:,.1f} min"
            err.print(f"{title}: {at:,.4g}{of} in {took}", soft_wrap=True)

        yield line
        if at != told:  # there was something to do, and its end is not said yet
            say()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not shown) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done, **more: progress.update(bar, completed=done, **more)


@contextmanager
def throughput(shown: bool, ranks: int) -> Iterator[Any]:
    """Progress of featurization: a bar in a terminal, a line now and then in a log file.

    Yields a function that takes a `featurization.worker.Progress`.
    """
    began = said = time.monotonic()
    first = said_of = -1

    def words(at: Any) -> str:
        nonlocal first, began
        if first < 0 or at.done < first:  # another run begins
            first, began = at.done, time.monotonic()
        rate = (at.done - first) / max(1e-9, time.monotonic() - began)
        left = f"{(at.total - at.done) / rate / 60:,.1f} min left" if rate else "starting"
        balance = f", imbalance {at.imbalance:.2f}" if ranks > 1 else ""
        return f"{rate:,.0f} structures/s, {left}, {at.rejected:,} rejected{balance}"

    def line(at: Any) -> None:
        nonlocal said, said_of
        text = words(at)
        if time.monotonic() > said + _LINE_EVERY or (at.done == at.total != said_of):
            said, said_of = time.monotonic(), at.done
            err.print(f"{at.done:,} of {at.total:,}: {text}", soft_wrap=True)

    if not shown:
        yield lambda at: None
    elif err.is_terminal:
        with bar("featurizing", None) as update:
            yield lambda at: update(at.done, total=at.total, description=words(at))
    else:
        yield line


def complain(kind: str, message: str) -> None:
    """A message on stderr, such as an error with its remedy."""
    with suppress(OSError):  # a job's log may lie on a disk that is full
        err.print(Text.assemble((kind, "red"), f": {message}"), soft_wrap=True)


def summary(title: str, rows: dict[str, Any]) -> None:
    """A table of names and values."""
    # Not the table's own title, which is broken at the table's width.
    out.print(Text(title, style="italic"), soft_wrap=True)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # paths and hashes whole
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    out.print(table)


def duration(seconds: float | None) -> str:
    """Rounded for people."""
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
