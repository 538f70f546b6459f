"""The `xtal` command: crystals → diffraction clouds → trained models → ablations → a report."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from cluster.commands import register
from cluster.config import build_config, read_toml
from cluster.errors import RunFailed, Stopped, UserError
from cluster.files import disk_explained
from cluster.mpi import agree
from cluster.mpi import ranks as mpi_ranks
from cluster.terminal import (
    AsJson,
    OptionsFile,
    bar,
    complain,
    err,
    out,
    show_json,
    summary,
    throughput,
)
from featurization.fetch_commands import fetching

app = typer.Typer(
    name="xtal",
    help="Ask whether the structure of a crystal alone, without chemistry, tells what it does. "
    "Verbs in the order of the data: fetch, featurize, inspect, verify, train, evaluate, predict, "
    "ablate, report, propensity; demo does all of them. On a cluster: submit, jobs, watch, cancel, "
    "dashboard. "
    "--debug anywhere shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with the full configuration.")
]

app.add_typer(fetching, name="fetch")


@app.command()
def featurize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .jsonl[.gz|.zst] of Materials Project documents, a folder of CIF/POSCAR files "
            "with id_prop.csv, a .csv with a cif column, a Matbench or JARVIS .json[.gz|.zip], a "
            "CIF or POSCAR file, or prototypes[:COUNT[:SEED]].",
        ),
    ],
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dataset.")],
    config: ConfigFile = None,
    radiation: Annotated[
        str | None,
        typer.Option(
            help="xray, xray_pymatgen, neutron or electron; several with commas, such as "
            "xray,neutron, give one intensity column each."
        ),
    ] = None,
    cell: Annotated[
        str | None, typer.Option(help="primitive, conventional, niggli or as_given.")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="miller:3 (|h|,|k|,|l| ≤ 3) or sphere:1.2 (|q| ≤ 1.2 1/Å).")
    ] = None,
    symprec: Annotated[float | None, typer.Option(help="Symmetry tolerance in Å.")] = None,
    b_iso: Annotated[float | None, typer.Option(help="Debye–Waller B in Å².")] = None,
    occupancy: Annotated[
        str | None, typer.Option(help="Partly occupied sites: average or reject.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the values in an id_prop.csv without header row.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add the new ids of SOURCE to the dataset in OUT.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what is to do in OUT and what it takes; write nothing."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn crystals into diffraction clouds: OUT/shards, manifest.json, rejects.csv, dataset.h5.

    Runs on one core as it is, on many under `mpiexec -n 8` or srun.
    After any interruption the same command goes on, with any number of ranks.
    """
    from featurization.config import FeaturizationConfig
    from featurization.featurize import featurize as run
    from featurization.forecast import forecast

    ranks = mpi_ranks()
    with _fatal_for_all(ranks):
        several = [each.strip() for each in radiation.split(",")] if radiation is not None else []
        flags = {
            "radiation": several[0] if several else None,
            "also_radiation": several[1:] or None,
            "cell": cell,
            "selection": selection,
            "symprec": symprec,
            "b_iso": b_iso,
            "occupancy": occupancy,
            "id_prop_label": label,
        }
        settings = agree(ranks, lambda: _settings(FeaturizationConfig, config, flags))
        if dry_run:
            expected = agree(
                ranks, lambda: forecast(source, dataset, settings, ranks, append=append)
            )
            if ranks.rank == 0 and as_json:
                named = {"out" if k == str(dataset) else k: v for k, v in expected.rows.items()}
                show_json({"expected": named, "warnings": expected.warnings})
            elif ranks.rank == 0:
                summary(f"{source}: what to expect; nothing was written", expected.rows)
            for warning in expected.warnings:
                complain("warning", warning)
            return
        with throughput(ranks.rank == 0, ranks.size) as update:
            manifest = run(source, dataset, settings, ranks, progress=update, append=append)
    if ranks.rank == 0:
        counts = {
            "structures": manifest["structures"],
            "rejected": manifest["rejected"],
            "points stored": manifest["points"],
            "shards": len(manifest["shards"]),
            "content hash": manifest["content_hash"],
        }
        if as_json:
            show_json({"dataset": dataset} | {k.replace(" ", "_"): v for k, v in counts.items()})
        else:
            summary(
                f"dataset {dataset}",
                counts
                | {
                    "rejected": f"{manifest['rejected']} (see rejects.csv)",
                    "content hash": manifest["content_hash"][:16],
                },
            )
        for each in manifest["sources"]:
            if each["damage"]:
                complain("warning", f"{each['spec']} ends early: {each['damage']}")


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    id: Annotated[
        str | None, typer.Argument(metavar="ID", help="A crystal: its reflections.")
    ] = None,
    top: Annotated[int, typer.Option(help="Reflections to list; --json has all.", min=1)] = 20,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw cloud and powder pattern into this .png, .svg or .pdf."),
    ] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is inside a dataset, or one crystal's reflections and powder pattern."""
    from featurization.inspection import inspect_crystal, inspect_dataset, read_diffraction
    from featurization.inspection_tables import show_crystal, show_dataset

    if id is None:
        if picture is not None:
            raise UserError("--picture needs a crystal", remedy=f"xtal inspect {dataset} ID")
        answer = inspect_dataset(dataset)
    else:
        one = read_diffraction(dataset, id)
        if picture is not None:
            from featurization.inspection_figure import write_picture

            write_picture(one, picture)
        answer = inspect_crystal(one)
    if as_json:
        show_json(answer)
    elif id is None:
        show_dataset(answer)
    else:
        show_crystal(answer, top)
        if picture is not None:
            out.print(f"picture: {picture}", soft_wrap=True)


@app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the crystals are now, to recompute a sample; one for each source, in order."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set what is damaged aside and do its crystals again.")
    ] = False,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Do again what was rejected for its time or its process's death."
        ),
    ] = False,
    sample: Annotated[int, typer.Option(help="Crystals to compute again.", min=0)] = 16,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Check a dataset: checksums, an account of every record, and a recomputed random sample.

    Runs under mpiexec and srun as featurize does.
    """
    from featurization.repair import repair as mend
    from featurization.restore import restore
    from featurization.verify import check_specs
    from featurization.verify import verify as run

    ranks = mpi_ranks()
    with _fatal_for_all(ranks):
        repaired: list[str] = []
        if repair:
            with throughput(ranks.rank == 0, ranks.size) as update:
                repaired += ["manifest.json"] * restore(dataset, source or [], ranks, update)
        specs = agree(ranks, lambda: check_specs(dataset, source or []))
        answer = run(dataset, specs, sample, ranks)
        if retry or (repair and not answer["ok"]):
            repaired += answer["damaged"]
            with throughput(ranks.rank == 0, ranks.size) as update:
                mend(dataset, answer["damaged"], specs, ranks, update, retry=retry)
            specs = agree(ranks, lambda: check_specs(dataset, source or []))
            answer = run(dataset, specs, sample, ranks)
        answer |= {"repaired": repaired} if repair or retry else {}
    if ranks.rank != 0:
        raise typer.Exit(0 if answer["ok"] else 1)
    if as_json:
        show_json(answer)
    else:
        listed = ("sources", "problems")
        shown = {k.replace("_", " "): v for k, v in answer.items() if v not in ("", [])}
        summary(f"dataset {dataset}", {k: shown[k] for k in shown if k not in listed})
        for each in answer["sources"]:
            out.print(f"source {each['spec']}: {each['state']}", soft_wrap=True)
        for problem in answer["problems"]:
            complain("problem", problem)
    if not answer["ok"]:
        raise typer.Exit(1)


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder for the training run.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="crystal_system, bulk_modulus, shear_modulus, band_gap, stability, or all: one "
            "network for all that the dataset has labels of; numbers: log_bulk_modulus, "
            "log_shear_modulus."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cut between the classes, in the label's unit.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="pointnet, harmonic, attention, powder_cnn, boosted, blend; "
            "baselines: majority, lattice_only, powder, composition_only."
        ),
    ] = None,
    members: Annotated[
        int | None, typer.Option(help="Models of an ensemble; their spread is the uncertainty.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    init: Annotated[
        str | None, typer.Option(help="A finished run whose weights the network begins with.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, order and rotations.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share each batch.")] = None,
    config: ConfigFile = None,
    resume: Annotated[bool, typer.Option(help="Go on from RUN's checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time a few steps, say what all take, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a classifier on a dataset and evaluate it on the held-out test crystals."""
    from training.config import TrainingConfig
    from training.metrics_tables import show
    from training.timing import expect
    from training.train import questions_of
    from training.train import train as run_training

    flags: dict[str, Any] = {
        "task": task,
        "threshold": threshold,
        "model": model,
        "members": members,
        "epochs": epochs,
        "init": init,
        "seed": seed,
        "workers": workers,
    }
    if task == "all":
        flags["task"], *flags["also"] = questions_of(dataset)
    settings = _settings(TrainingConfig, config, flags)
    if dry_run:
        expected = expect(dataset, settings)
        if as_json:
            show_json(expected)
        else:
            summary("what to expect; nothing was trained", expected)
        return
    total = settings.members * settings.passes
    with bar(settings.question.question, total, shown=not as_json) as update:
        answer = run_training(
            dataset,
            run,
            settings,
            resume=resume,
            progress=lambda at: update(at.epoch + at.step / at.steps),
        )
    if as_json:
        show_json(answer)
    else:
        show(run, answer)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    dataset: Annotated[
        Path | None, typer.Option(help="Where the dataset is now, if it has moved.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run, on the same test crystals, to compare with.")
    ] = None,
    leaks: Annotated[
        bool, typer.Option(help="Count test crystals with a near-duplicate in training.")
    ] = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained model again: metrics of the test crystals with 95 % intervals.

    metrics.json also has calibration, metrics by class and crystal system, and of an ensemble how
    its doubt goes with error.
    """
    from training.evaluate import evaluate_run
    from training.metrics_tables import show

    answer = evaluate_run(run, dataset, against=against, leaks=leaks)
    if as_json:
        show_json(answer)
    else:
        show(run, answer)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished training run.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Crystals as for featurize, or the folder of a dataset."
        ),
    ],
    table: Annotated[Path, typer.Option("--out", help="Table to write: .csv, .parquet or .jsonl.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="A question of the model, or all of them: a row for each; default: first."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that featurize beside this one.", min=1)
    ] = 1,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Predict crystals with a trained model: one row each, in the order of the source.

    What cannot be read is a row with a reason. lower and upper are the extremes of the ensemble's
    members; of a model without an ensemble they are empty.
    """
    from training.predict import predict as run_prediction

    with bar("crystals", None, shown=not as_json) as update:
        counts = run_prediction(run, source, table, task=task, processes=processes, progress=update)
    if as_json:
        show_json(counts)
    else:
        summary(f"predictions {table}", dict(counts))


class _Ablate(TyperGroup):
    """`xtal ablate GRID.toml OUT` is `xtal ablate run GRID.toml OUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


ablation = typer.Typer(cls=_Ablate, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(
    ablation,
    name="ablate",
    help="Perturb the input, train again, compare: xtal ablate GRID OUT runs a grid of trials, and "
    "goes on after a crash; xtal ablate status OUT shows how far it is.",
)


def _part(text: str) -> Any:
    from ablation.parts import Part

    return Part.parse(text)


@ablation.command("run")
def ablate(
    grid: Annotated[
        Path,
        typer.Argument(metavar="GRID", help="A TOML file, or one that is built in: quick, paper."),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Folder for the results.")
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
    from ablation.grid import read_grid
    from ablation.report import write_report
    from ablation.run import run_grid
    from ablation.status import live

    settings = read_grid(grid, dataset=None if dataset is None else str(dataset.resolve()))
    if dry_run:
        expected = forecast(settings, folder, part)
        if as_json:
            show_json({"counts": expected.counts, "expected": expected.rows})
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


@ablation.command("status")
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


@app.command()
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


@app.command()
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


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for it all.")] = Path(
        "xtal-demo"
    ),
    source: Annotated[
        str | None, typer.Option(help="Your own crystals; default: the embedded prototypes.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="The question to ask; other than crystal_system needs labels.")
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


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A dataset, training or grid, or a folder of them.")],
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


register(app)


def main() -> None:
    """Entry point: exit code 0 on success, 2 for bad input, 74 and 75 as `cluster.errors` says."""
    # Threads that wait for each other asleep: spinning makes a step four times slower as soon as
    # another process wants the cores. OpenMP reads this when torch is imported, in the verbs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        with disk_explained():
            app(arguments)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError):
            complain("error", str(error))
            sys.exit(2)
        if isinstance(error, OSError) and error.filename and error.strerror:
            complain("failed", f"cannot read or write {error.filename}: {error.strerror}")
            sys.exit(1)
        if isinstance(error, RunFailed):
            complain("stopped" if isinstance(error, Stopped) else "failed", str(error))
            sys.exit(error.exit_code)
        complain("failed", f"{type(error).__name__}: {error}")
        err.print("  --debug shows where")
        sys.exit(1)


# Flags that are not named as what they set.
_SPELLED = {"id_prop_label": "--label", "also_radiation": "--radiation"}


def _settings(kind: type[Any], path: Path | None, flags: dict[str, Any]) -> Any:
    """A configuration from a TOML file, with flags before it."""
    values = {} if path is None else read_toml(path)
    given = {name: value for name, value in flags.items() if value is not None}
    spelled = {name: _SPELLED.get(name, f"--{name.replace('_', '-')}") for name in given}
    return build_config(kind, values | given, where=str(path), flags=spelled)


@contextmanager
def _fatal_for_all(ranks: Any) -> Iterator[None]:
    """End all ranks when one fails; what is the same on all of them only rank 0 prints."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if ranks.rank != 0:
            sys.exit(2 if isinstance(error, UserError) else error.exit_code)
        raise
    except BaseException:  # a Rust panic is no Exception
        ranks.abort()
        raise


if __name__ == "__main__":
    main()
