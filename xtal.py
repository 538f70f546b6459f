"""The `xtal` command: crystals → diffraction clouds → trained models → ablations → a report."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cluster.config import build_config, read_toml
from cluster.errors import RunFailed, UserError
from cluster.mpi import agree
from cluster.mpi import ranks as mpi_ranks

app = typer.Typer(
    name="xtal",
    help="Ask whether the structure of a crystal alone, without chemistry, tells what it does. "
    "Verbs in the order of the data: featurize, verify, train, evaluate, ablate, report; demo "
    "does all of them. --debug anywhere shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
# Paths and messages are shown as they are, not read as markup.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with the full configuration.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")]


@app.command()
def featurize(
    source: Annotated[
        str,
        typer.Argument(
            help="A .jsonl[.gz|.zst] of Materials Project documents, a folder of CIF/POSCAR files "
            "with id_prop.csv, a .csv with a cif column, a Matbench or JARVIS .json[.gz|.zip], a "
            "CIF or POSCAR file, or prototypes[:COUNT[:SEED]]."
        ),
    ],
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dataset.")],
    config: ConfigFile = None,
    radiation: Annotated[
        str | None, typer.Option(help="xray, xray_pymatgen, neutron or electron.")
    ] = None,
    cell: Annotated[
        str | None, typer.Option(help="primitive, conventional, niggli or as_given.")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="miller:3 (|h|,|k|,|l| ≤ 3) or sphere:1.2 (|q| ≤ 1.2 1/Å).")
    ] = None,
    symprec: Annotated[float | None, typer.Option(help="Symmetry tolerance in Å.")] = None,
    b_iso: Annotated[float | None, typer.Option(help="Debye–Waller B in Å².")] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the values in an id_prop.csv without header row.")
    ] = None,
) -> None:
    """Turn crystals into diffraction clouds: OUT/shards, manifest.json, rejects.csv, dataset.h5.

    Runs on one core as it is, on many as `mpiexec -n 8 xtal featurize …` or under srun.
    """
    from featurization.config import FeaturizationConfig
    from featurization.featurize import featurize as run

    ranks = mpi_ranks()
    with _fatal_for_all(ranks):
        flags = {
            "radiation": radiation,
            "cell": cell,
            "selection": selection,
            "symprec": symprec,
            "b_iso": b_iso,
            "id_prop_label": label,
        }
        settings = agree(ranks, lambda: _settings(FeaturizationConfig, config, flags))
        with _bar("featurizing", None, shown=ranks.rank == 0) as update:
            manifest = run(source, dataset, settings, ranks, progress=update)
    if ranks.rank == 0:
        _summary(
            f"dataset {dataset}",
            {
                "structures": manifest["structures"],
                "rejected": f"{manifest['rejected']} (see rejects.csv)",
                "points stored": manifest["points"],
                "shards": len(manifest["shards"]),
                "content hash": manifest["content_hash"][:16],
            },
        )


@app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    source: Annotated[
        str | None, typer.Option(help="Where the crystals came from, to recompute a sample.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Crystals to compute again.", min=0)] = 16,
    as_json: AsJson = False,
) -> None:
    """Check a dataset: checksums, completeness, finiteness, and a recomputed random sample."""
    from featurization.shards import read_manifest
    from featurization.sources import open_source
    from featurization.verify import verify as run

    manifest = read_manifest(dataset)
    label = manifest["config"]["id_prop_label"]
    try:
        opened = open_source(source or manifest["source_spec"], id_prop_label=label)
    except UserError:
        if source is not None:
            raise
        opened = None  # the source has moved; the answer says that nothing was recomputed
    answer = run(dataset, opened, sample)
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        _summary(f"dataset {dataset}", {k: v for k, v in answer.items() if k != "problems"})
        for problem in answer["problems"]:
            _complain("problem", problem)
    if not answer["ok"]:
        raise typer.Exit(1)


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    run: Annotated[Path, typer.Argument(help="Folder for the training run.")],
    task: Annotated[
        str | None,
        typer.Option(help="crystal_system, bulk_modulus, shear_modulus, band_gap or stability."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cut between the classes, in the label's unit.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="pointnet.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, order and rotations.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share each batch.")] = None,
    config: ConfigFile = None,
    resume: Annotated[bool, typer.Option(help="Go on from RUN's checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a classifier on a dataset and evaluate it on the held-out test crystals."""
    from training.config import TrainingConfig
    from training.train import train as run_training

    flags = {
        "task": task,
        "threshold": threshold,
        "model": model,
        "epochs": epochs,
        "seed": seed,
        "workers": workers,
    }
    settings = _settings(TrainingConfig, config, flags)
    with _bar(settings.question.question, settings.epochs, shown=not as_json) as update:
        answer = run_training(
            dataset,
            run,
            settings,
            resume=resume,
            progress=lambda at: update(at.epoch + at.step / at.steps),
        )
    _show_metrics(run, answer, as_json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    dataset: Annotated[
        Path | None, typer.Option(help="Where the dataset is now, if it has moved.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained model again: metrics of the test crystals with 95 % intervals."""
    from training.evaluate import evaluate_run

    _show_metrics(run, evaluate_run(run, dataset), as_json)


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", help="Which arms and seeds.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results.")],
    dataset: Annotated[Path | None, typer.Option(help="Dataset instead of the grid's.")] = None,
    dry_run: Annotated[bool, typer.Option(help="List the trials and stop.")] = False,
) -> None:
    """Perturb the input, train again, compare. The same command goes on after a crash."""
    from ablation.grid import read_grid, trials
    from ablation.report import write_report
    from ablation.run import run_grid
    from featurization.shards import read_manifest

    settings = read_grid(grid, dataset=None if dataset is None else str(dataset.resolve()))
    if dry_run:
        planned = trials(settings, read_manifest(Path(settings.dataset))["content_hash"])
        table = Table("trial", "arm", "seed", "epochs", title=settings.training.question.question)
        for trial in planned:
            table.add_row(trial.id, trial.arm, str(trial.training.seed), str(trial.training.epochs))
        out.print(table)
        out.print(f"{len(planned)} trials; nothing was run")
        return
    total = len(settings.arms) * len(settings.seeds) * settings.training.epochs
    with _bar(settings.training.question.question, total) as update:
        counts = run_grid(settings, folder, progress=update)
        update(total)
    _summary(f"grid {folder}", dict(counts))
    if counts["failed"]:
        raise RunFailed(
            f"{counts['failed']} trials failed",
            remedy=f"see their tracebacks in {folder / 'results.jsonl'}; run again to retry them",
        )
    out.print(f"report: {write_report(folder, dataset=Path(settings.dataset))}", soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A grid's or training's folder.")],
    dataset: Annotated[
        Path | None, typer.Option(help="Where the dataset is now, if it has moved.")
    ] = None,
) -> None:
    """Write DIR/report.html, one file that opens offline, and the tables behind it."""
    from ablation.report import write_report

    out.print(f"report: {write_report(folder, dataset=dataset)}", soft_wrap=True)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder for it all.")] = Path(
        "xtal-demo"
    ),
    source: Annotated[
        str | None, typer.Option(help="Your own crystals; default: the embedded prototypes.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="The question to ask; other than crystal_system needs labels.")
    ] = "crystal_system",
) -> None:
    """The whole experiment in a few minutes: featurize, train, six arms × two seeds, report."""
    from ablation.demo import Stage, run_demo

    def stage(at: Stage) -> Any:
        return _bar(at.title, at.total)

    answer = run_demo(folder, source, task, stage)
    out.print()
    for line in answer.sentences:
        out.print(line, highlight=False)
    out.print(f"\nreport: {answer.report}", soft_wrap=True)


def main() -> None:
    """Entry point: exit code 0 on success, 2 for bad input, 1 for anything else."""
    # Threads that wait for each other asleep: spinning makes a step four times slower as soon as
    # another process wants the cores. OpenMP reads this when torch is imported, in the verbs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError):
            _complain("error", str(error))
            sys.exit(2)
        if isinstance(error, RunFailed):
            _complain("failed", str(error))
            sys.exit(1)
        _complain("failed", f"{type(error).__name__}: {error}")
        err.print("  --debug shows where")
        sys.exit(1)


def _settings(kind: type[Any], path: Path | None, flags: dict[str, Any]) -> Any:
    """A configuration from a TOML file, with flags before it."""
    values = {} if path is None else read_toml(path)
    given = {name: value for name, value in flags.items() if value is not None}
    where = "options" if path is None else f"{path} and options"
    return build_config(kind, values | given, where=where)


@contextmanager
def _fatal_for_all(ranks: Any) -> Iterator[None]:
    """End all ranks when one fails; a `UserError` is the same on all, and only rank 0 prints it."""
    try:
        yield
    except UserError:
        if ranks.rank != 0:
            sys.exit(2)
        raise
    except BaseException:  # a Rust panic is no Exception
        ranks.abort()
        raise


@contextmanager
def _bar(title: str, total: float | None, *, shown: bool = True) -> Iterator[Any]:
    """A progress bar; yields a function that takes how much is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}" + ("" if total is None else "/{task.total:.0f}")),
        TimeElapsedColumn(),
        *(() if total is None else (TimeRemainingColumn(),)),
    )
    with Progress(*columns, console=err, disable=not shown) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done: progress.update(bar, completed=done)


def _complain(kind: str, message: str) -> None:
    err.print(Text.assemble((kind, "red"), f": {message}"), soft_wrap=True)


def _summary(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    out.print(table)


def _show_metrics(run: Path, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, indent=1))
        return
    sides = answer["class_counts"]
    counts = Table("class", *sides, title=answer["question"], title_justify="left")
    for name in answer["classes"]:
        counts.add_row(name, *(str(classes[name]) for classes in sides.values()))
    out.print(counts)
    table = Table("test metric", "value", "95 % interval", title_justify="left")
    for name, interval in answer["metrics"].items():
        value, low, high = (
            "–" if interval[k] is None else f"{interval[k]:.3f}" for k in ("value", "low", "high")
        )
        table.add_row(name, value, f"{low} … {high}")
    out.print(table)
    out.print(f"written: {run}/metrics.json, predictions.parquet, tensorboard/", soft_wrap=True)


if __name__ == "__main__":
    main()
