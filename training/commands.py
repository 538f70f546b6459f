"""Verbs of `xtal` that train and use what is trained: train, evaluate, predict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import names
from cluster.submit_verbs import SETTINGS
from cluster.terminal import (
    AsJson,
    ConfigFile,
    OptionsFile,
    bar,
    complain,
    completed,
    configured,
    show_json,
    summary,
)
from training.config import ModelName, TrainingConfig
from training.tasks import TASKS

_DEFAULTS = TrainingConfig()
# Options of a training that set keys of its configuration.
_FLAGS = ("task", "also", "threshold", "model", "members", "epochs", "init", "seed", "workers")


def train(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder for the training run.")],
    task: Annotated[
        str | None,
        typer.Option(
            help=f"The question: {', '.join(TASKS)}; or all: one network for all classes that the "
            f"dataset has labels of. Default: {_DEFAULTS.task}.",
            autocompletion=completed((*TASKS, "all")),
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Cut between the classes, in the label's unit; default: the task's."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(names(ModelName))}. Baselines are lattice_only, powder, "
            f"composition_only and majority. Default: {_DEFAULTS.model}.",
            autocompletion=completed(names(ModelName)),
        ),
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(
            help="Models of an ensemble; their spread is the uncertainty. "
            f"Default: {_DEFAULTS.members}."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Passes over the training set; default: {_DEFAULTS.epochs}."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="A finished run whose weights the network begins with.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"Weights, order and rotations; default: {_DEFAULTS.seed}."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share each batch; 0: one a GPU, without GPUs one a node of the "
            "job, unless the configuration or the model says otherwise. "
            f"Default: {_DEFAULTS.workers}."
        ),
    ] = None,
    config: ConfigFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from RUN's checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time a few steps, say what all take, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a classifier on a dataset and evaluate it on the held-out test crystals."""
    from training.distributed import whole_job
    from training.metrics_tables import show
    from training.timing import expect
    from training.train import questions_of
    from training.train import train as run_training

    given: dict[str, Any] = {
        "config": config,
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
        given["task"], *given["also"] = questions_of(dataset)
    settings = _settings(given)
    if workers == 0 and settings.workers == 1 and not settings.in_one_process:
        settings = _settings(given | {"workers": whole_job()})
    if dry_run:
        expected = expect(dataset, settings)
        if as_json:
            seconds = {"alone": expected.alone, "shared": expected.shared}
            needs = {"seconds": seconds, "memory": expected.memory}
            show_json({"expected": expected.rows} | needs)
        else:
            summary("what to expect; nothing was trained", expected.rows)
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


def _settings(given: Mapping[str, Any]) -> TrainingConfig:
    """The configuration that options give; which questions all are, only a dataset can say."""
    flags = {name: given.get(name) for name in _FLAGS}
    flags["task"] = None if flags["task"] == "all" else flags["task"]
    flags["workers"] = flags["workers"] or None
    return configured(TrainingConfig, given["config"], flags)


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    dataset: Annotated[
        Path | None, typer.Option(help="Where the dataset is now, if it has moved.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The question that --against and --leaks are about, and the one shown; default: "
            "first."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run, on the same test crystals, to compare with.")
    ] = None,
    leaks: Annotated[
        bool, typer.Option("--leaks", help="Count test crystals with a near-duplicate in training.")
    ] = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained model again: metrics of the test crystals with 95 % intervals.

    metrics.json also has calibration, metrics by class and crystal system, and of an ensemble how
    its doubt goes with error; of a model of several questions all that for each, in `also`.
    """
    from training.evaluate import evaluate_run
    from training.metrics_tables import show

    answer = evaluate_run(run, dataset, task=task, against=against, leaks=leaks)
    if as_json:
        show_json(answer)
    else:
        show(run, answer.get("also", {}).get(task, answer))


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished training run.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE…", help="Crystals as for featurize, or folders of datasets."
        ),
    ],
    table: Annotated[Path, typer.Option("--out", help="Table to write: .csv, .parquet or .jsonl.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="A question of the model, or all of them: a row for each; default: first.",
            autocompletion=completed((*TASKS, "all")),
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that featurize beside this one.", min=1)
    ] = 1,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Predict crystals with a trained model: one row each, in the order of the sources.

    What cannot be read is a row with a reason. lower and upper are the extremes of the ensemble's
    members; of a number, the ends of a 90 % interval; else they are empty.
    """
    from training.predict import predict as run_prediction

    with bar("crystals", None, shown=not as_json) as update:
        counts = run_prediction(
            run,
            sources,
            table,
            task=task,
            processes=processes,
            progress=update,
            warn=lambda text: complain("warning", text),
        )
    if as_json:
        show_json(counts)
    else:
        summary(f"predictions {table}", dict(counts))


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command(context_settings={"obj": {SETTINGS: _settings}})(train)
    app.command()(evaluate)
    app.command()(predict)
