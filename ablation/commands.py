"""Verbs of `xtal` that ask what an answer rests on: ablate, report, propensity, demo, watch."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from cluster.errors import RunFailed, UserError
from cluster.submit_verbs import SETTINGS
from cluster.terminal import AsJson, OptionsFile, bar, completed, out, show_json, summary
from training.tasks import TASKS

_BUILT_IN = sorted(path.stem for path in (Path(__file__).parent / "grids").glob("*.toml"))


class _Ablate(TyperGroup):
    """`xtal ablate GRID.toml OUT` is `xtal ablate run GRID.toml OUT`."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        argument = self.commands["run"].params[0]
        return super().shell_complete(ctx, incomplete) + argument.shell_complete(ctx, incomplete)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


ablating = typer.Typer(
    cls=_Ablate,
    help="Perturb the input, train again, compare: xtal ablate GRID OUT runs a grid of trials, and "
    "goes on after a crash; xtal ablate status OUT shows how far it is. "
    "The options of a run: xtal ablate run --help.",
    no_args_is_help=True,
)


def _part(text: str) -> Any:
    from ablation.parts import Part

    return Part.parse(text)


def _settings(given: Mapping[str, Any]) -> Any:
    """The grid that options give."""
    from ablation.grid import read_grid

    dataset = given["dataset"]
    return read_grid(given["grid"], dataset=None if dataset is None else str(dataset.resolve()))


@ablating.command("run", context_settings={"obj": {SETTINGS: _settings}})
def ablate(
    grid: Annotated[
        Path,
        typer.Argument(
            metavar="GRID",
            help=f"A TOML file, or one that is built in: {', '.join(_BUILT_IN)}.",
            autocompletion=completed(_BUILT_IN),
        ),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder for the results.")
    ] = None,
    dataset: Annotated[Path | None, typer.Option(help="Dataset instead of the grid's.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Time a training of each model, say what all take, stop."),
    ] = False,
    part: Annotated[
        Any,
        typer.Option(
            parser=_part,
            metavar="N/M",
            help="2/8 runs the second eighth alone; a later call without it gathers.",
        ),
    ] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Perturb the input, train again, compare. The same command goes on after a crash.

    A report and its tables come at the end; no trial is stopped early, however hopeless.
    """
    from ablation.forecast import forecast, show
    from ablation.report import write_report
    from ablation.run import run_grid
    from ablation.status import live

    settings = _settings({"grid": grid, "dataset": dataset})
    if dry_run:
        expected = forecast(settings, folder, part)
        if as_json:
            seconds = {"alone": 0.0, "shared": expected.shared, "shares": expected.shares}
            needs = {"seconds": seconds, "memory": expected.memory}
            show_json({"counts": expected.counts, "expected": expected.rows} | needs)
        else:
            show(expected)
        return
    if folder is None:
        raise UserError("OUT is not given", remedy=f"xtal ablate {grid} OUT")
    with live() as update:
        counts = run_grid(settings, folder, progress=update, part=part)
    whole = part is None and not counts["failed"]
    page = write_report(folder, dataset=Path(settings.dataset)) if whole else None
    if as_json:
        show_json(dict(counts) | {"report": page})
    else:
        summary(f"grid {folder}", dict(counts))
    if counts["failed"]:
        raise RunFailed(
            f"{counts['failed']} trials failed",
            remedy=f"xtal ablate status {folder} shows why; run again to retry them",
        )
    if page is not None and not as_json:
        out.print(f"report: {page}", soft_wrap=True)


@ablating.command("status")
def ablate_status(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a grid.")],
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """How far a grid is, from its files alone, while it runs or after."""
    from ablation.status import show, status

    answer = status(folder)
    if as_json:
        show_json(answer)
    else:
        show(folder, answer)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A grid's or training's folder.")],
    dataset: Annotated[
        Path | None, typer.Option(help="Where the dataset is now, if it has moved.")
    ] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Write DIR/report.html, one file that opens offline, and the tables behind it."""
    from ablation.layout import write_tables
    from ablation.record import RECORD
    from ablation.report import write_report

    if (folder / RECORD).exists():  # a grid, perhaps one that is at work
        write_tables(folder)
    page = write_report(folder, dataset=dataset)
    if as_json:
        show_json({"report": page})
    else:
        out.print(f"report: {page}", soft_wrap=True)


def propensity(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset folder.")],
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Training runs of one yes-or-no task on it."),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for table and picture.")],
    members: Annotated[
        int, typer.Option(help="Fewest held-out crystals of a prototype.", min=1)
    ] = 5,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Rank structure prototypes by how often they have a property, whatever their chemistry.

    A run of composition_only among them says what the formula alone predicts.
    """
    from ablation.propensity import propensity as run

    held, table = run(dataset, runs, folder, members=members)
    rows = table.to_pylist()
    if as_json:
        show_json(rows)
        return
    shown = Table(title=f"{held.task}: {len(rows)} prototypes, {len(held.ids)} held-out crystals")
    shown.add_column("prototype", no_wrap=True)
    for name in ("held out", held.positive, "95 % interval", *held.predicted):
        shown.add_column(name, justify="right")
    for row in rows:
        ends = f"{row['observed_low']:.2f}–{row['observed_high']:.2f}"
        said = (f"{row[name]:.2f}" for name in ("observed", *held.predicted))
        shown.add_row(row["prototype"], str(row["members"]), next(said), ends, *said)
    out.print(shown)
    out.print(f"written: {folder}/propensity.parquet, .csv, .svg, .png", soft_wrap=True)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for it all.")] = Path(
        "xtal-demo"
    ),
    source: Annotated[
        str | None, typer.Option(help="Your own crystals; default: the embedded prototypes.")
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="The question to ask; other than crystal_system needs labels.",
            autocompletion=completed(TASKS),
        ),
    ] = "crystal_system",
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """The whole experiment in a few minutes: featurize, train, six arms × two seeds, report."""
    from ablation.demo import Stage, run_demo

    def stage(at: Stage) -> Any:
        return bar(at.title, at.total, shown=not as_json)

    answer = run_demo(folder, source, task, stage)
    if as_json:
        show_json({"answer": answer.sentences, "report": answer.report})
        return
    out.print()
    for line in answer.sentences:
        out.print(line, highlight=False)
    out.print(f"\nreport: {answer.report}", soft_wrap=True)


def watch(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A dataset, training or grid, or a folder of them."),
    ],
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1)] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and stop.")] = False,
    config: OptionsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Say how far work is, from files alone: over ssh, without Ray; ends when the work has."""
    from ablation.watch import watch as look_again

    for at, text in look_again(run, every, once=once):
        if as_json:
            print(json.dumps(asdict(at), default=str), flush=True)
        else:
            out.print(text, soft_wrap=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.add_typer(ablating, name="ablate")
    app.command()(report)
    app.command()(propensity)
    app.command()(demo)
    app.command()(watch)
