"""What a grid leaves in its folder, finished or not.

| file                       | content                                                        |
|----------------------------|----------------------------------------------------------------|
| `grid.json`                | tasks, models, arms, modes, seeds, dataset, …: `GridDocument`  |
| `results.parquet`          | a row a finished trial                                         |
| `predictions-TASK.parquet` | a row a finished trial and test crystal, see `ablation.trials` |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ablation.checked_files import blaming, read_json, read_table, require, validated
from ablation.trials import Trials, read_trials
from cluster.errors import UserError
from training.metrics import score

FILES = ("grid.json", "results.parquet")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TaskDocument(_Part):
    """One question of the grid."""

    title: str = ""
    question: str
    classes: tuple[str, ...] = Field(min_length=2)
    unit: str = ""
    threshold: float | None = None
    class_counts: dict[str, dict[str, int]] = {}


class ArmDocument(_Part):
    """One arm of the grid; `strength` is the name of its parameter."""

    name: str
    family: str = ""
    strength: str | None = None
    unit: str = ""
    description: str = ""


class GridDocument(_Part):
    """`grid.json`."""

    tasks: dict[str, TaskDocument] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    arms: tuple[ArmDocument, ...]
    modes: tuple[str, ...] = ("retrain",)
    seeds: tuple[int, ...]
    trials: int | None = None  # planned
    primary_metric: str = "auroc"
    dataset: str = ""
    dataset_summary: dict[str, Any] = {}
    training: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    attribution: str = ""


@dataclass(frozen=True, slots=True)
class GridFolder:
    """A grid's folder, read and checked."""

    document: GridDocument
    results: tuple[Mapping[str, Any], ...]  # rows of results.parquet
    trials: Mapping[str, Trials]  # task → its trials, in the grid's order; those that have any


def predictions_name(task: str) -> str:
    """Name of the file with the predictions of a task."""
    return f"predictions-{task}.parquet"


def read_grid_folder(folder: Path) -> GridFolder:
    """Read what is there so far.

    Raises:
        UserError: a file is missing or broken, no task has a finished trial, or predictions do not
            fit each other or the classes of their task.
    """
    require(folder, FILES, "ablation")
    path = folder / "grid.json"
    document = validated(GridDocument, path, read_json(path))
    for name in document.tasks:
        if Path(predictions_name(name)).name != predictions_name(name):
            raise UserError(f"{path}: task {name!r} is no name of a file", remedy="rename it")
    results = read_table(folder / "results.parquet", ("task", "model", "arm", "seed", "status"))
    trials = {}
    for name, task in document.tasks.items():
        path = folder / predictions_name(name)
        if not path.is_file():
            continue
        table = read_table(path, ())
        if not table.num_rows:
            continue
        with blaming(path):
            found = read_trials(table)
            check_classes(found, len(task.classes))
        trials[name] = found
    if not trials:
        expected = ", ".join(predictions_name(name) for name in document.tasks)
        raise UserError(
            f"{folder} has no predictions yet ({expected})",
            remedy="wait until the first trial has finished",
        )
    return GridFolder(document, tuple(results.to_pylist()), trials)


def check_classes(trials: Trials, classes: int) -> None:
    """Raise UserError when labels or columns are not those of the classes, or no probabilities."""
    for condition, by_seed in trials.probabilities.items():
        for seed, p_NC in by_seed.items():
            try:
                score(trials.labels, p_NC)
            except ValueError as error:
                raise UserError(
                    f"arm {condition.arm!r}, seed {seed}: {error}", remedy="run this trial again"
                ) from None
            if p_NC.shape[1] != classes:
                raise UserError(
                    f"{p_NC.shape[1]} columns of probabilities for {classes} classes",
                    remedy="evaluate the trials again, with the classes that the folder names",
                )
