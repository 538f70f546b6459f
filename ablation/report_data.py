"""A folder of a grid, finished or not, or of one training run, read and checked.

| kind     | files                                                                        |
|----------|------------------------------------------------------------------------------|
| ablation | grid.json, results.parquet, predictions-TASK.parquet (`ablation.grid_folder`) |
| run      | config.json, metrics.json, predictions.parquet; history.csv of one network   |
"""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from ablation import grid_folder
from ablation.catalogue import find_dataset
from ablation.checked_files import blaming, read_json, read_table, require, validated
from ablation.report_study import Effect, Report, Study
from ablation.tables import Tables, write_statistics
from ablation.trials import REFERENCE, Condition, Trials, read_trials
from cluster.errors import UserError
from training.metrics import Interval, confusion_matrix

FILES = {
    "ablation": grid_folder.FILES,
    "run": ("config.json", "metrics.json", "predictions.parquet"),
}


class _Interval(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    value: float | None
    low: float | None
    high: float | None


class _RunMetrics(grid_folder.TaskDocument):
    task: str
    split: str
    structures: int
    metrics: dict[str, _Interval]
    confusion_matrix: tuple[tuple[int, ...], ...]
    primary_metric: str = "auroc"
    provenance: dict[str, Any] = Field(default_factory=dict)
    attribution: str = ""


def read_report(folder: Path, dataset: Path | None = None) -> Report:
    """Read a folder of either kind; of a grid, write its tables on the way.

    Args:
        dataset: where the dataset is now, by default where the folder says.

    Raises:
        UserError: the folder is neither kind, a file is missing or broken, a column or field is
            missing or of the wrong type, or a prediction is not a class or a probability.
    """
    if (folder / "grid.json").is_file():
        return _of_grid(write_statistics(folder, dataset=dataset))
    if (folder / "metrics.json").is_file() or (folder / "config.json").is_file():
        return _of_run(folder, dataset)
    raise UserError(
        f"{folder} is neither an ablation nor a training run",
        remedy="give a folder with "
        + "; or one with ".join(", ".join(names) for names in FILES.values()),
    )


def _of_grid(tables: Tables) -> Report:
    document = tables.grid.document
    return Report(
        kind="ablation",
        studies=tuple(_study(tables, task) for task in tables.grid.trials),
        models=document.models,
        arms={arm.name: arm.model_dump(exclude={"name"}) for arm in document.arms},
        results=tables.grid.results,
        planned=document.trials,
        history=(),
        settings={
            "models": list(document.models),
            "modes": list(document.modes),
            "seeds": list(document.seeds),
            "training": document.training,
        },
        place=tables.place,
        dataset=document.dataset,
        dataset_summary=document.dataset_summary,
        provenance=document.provenance,
        attribution=document.attribution,
    )


def _study(tables: Tables, task: str) -> Study:
    document = tables.grid.document
    of_task = document.tasks[task]
    trials = tables.grid.trials[task]
    rows = {
        name: [row for row in table.to_pylist() if row["task"] == task]
        for name, table in tables.by_name.items()
        if name != "crystals"
    }
    metrics: dict[Condition, dict[str, Interval]] = {}
    for row in rows["metrics"]:
        metrics.setdefault(_condition(row), {})[row["metric"]] = _interval(row)
    model = document.models[0]
    if not any(condition.model == model for condition in metrics):
        model = next(iter(metrics)).model
    if document.primary_metric not in next(iter(metrics.values())):
        raise UserError(
            f"grid.json names the primary metric {document.primary_metric!r}, which is none of "
            f"{', '.join(next(iter(metrics.values())))}",
            remedy="name one of these",
        )
    size = len(of_task.classes)
    reference = trials.reference(model)
    own = {} if reference is None else trials.probabilities[reference]
    matrices = [confusion_matrix(trials.labels, p_NC) for p_NC in own.values()]
    return Study(
        task=task,
        title=of_task.title or task.replace("_", " "),
        question=of_task.question,
        classes=of_task.classes,
        unit=of_task.unit,
        threshold=of_task.threshold,
        primary=document.primary_metric,
        model=model,
        trials=trials,
        metrics=metrics,
        effects=tuple(_effect(row) for row in rows["effects"]),
        contrast=rows["contrasts"][0] if rows["contrasts"] else None,
        losses=tuple(rows["losses"]),
        confusion=np.sum([np.zeros((size, size), dtype=np.int64), *matrices], axis=0),
        class_counts=of_task.class_counts,
    )


def _effect(row: dict[str, Any]) -> Effect:
    return Effect(
        condition=_condition(row),
        reference=_number(row["none"]),
        value=_number(row["value"]),
        difference=_interval(row, "difference"),
        seeds=int(row["seeds"]),
        p_holm=_number(row["p_holm"]),
        verdict=row["verdict"] or "",
        row=row,
    )


def _condition(row: dict[str, Any]) -> Condition:
    return Condition(row["model"], row["arm"], row["strength"], row["mode"])


def _of_run(folder: Path, dataset: Path | None) -> Report:
    require(folder, FILES["run"], "run")
    path = folder / "metrics.json"
    run = validated(_RunMetrics, path, read_json(path))
    config = read_json(folder / "config.json")
    if run.primary_metric not in run.metrics:
        raise UserError(
            f"{path} has no metric {run.primary_metric!r}",
            remedy=f"evaluate the run again; it has {', '.join(run.metrics) or 'none'}",
        )
    size = len(run.classes)
    if {size} != {len(run.confusion_matrix), *map(len, run.confusion_matrix)}:
        raise UserError(
            f"{path}: confusion_matrix is not {size} × {size}", remedy="evaluate the run again"
        )
    settings = config.get("training", {})
    own = {k: v for k, v in config.items() if k not in ("dataset", "provenance", "identity")}
    model = str((settings or own).get("model", "network"))
    identity = config.get("identity")
    summary = identity if isinstance(identity, dict) else {}
    named = str(config.get("dataset") or "")
    study = Study(
        task=run.task,
        title=run.title or run.task.replace("_", " "),
        question=run.question,
        classes=run.classes,
        unit=run.unit,
        threshold=run.threshold,
        primary=run.primary_metric,
        model=model,
        trials=_run_trials(folder / "predictions.parquet", size, run.split, model),
        metrics={
            Condition(model, REFERENCE): {
                name: _interval(found.model_dump()) for name, found in run.metrics.items()
            }
        },
        effects=(),
        contrast=None,
        losses=(),
        confusion=np.array(run.confusion_matrix, dtype=np.int64),
        class_counts=run.class_counts,
    )
    return Report(
        kind="run",
        studies=(study,),
        models=(model,),
        arms={},
        results=(),
        planned=None,
        history=_history(folder / "history.csv"),
        settings={"training": settings or own},
        place=find_dataset(folder, named, summary, dataset),
        dataset=named,
        dataset_summary=summary,
        provenance=run.provenance,
        attribution=run.attribution,
    )


def _run_trials(path: Path, classes: int, split: str, model: str) -> Trials:
    """The rows of one split as those of one trial of the untouched input."""
    names = [f"p{c}" for c in range(classes)]
    table = read_table(path, ("id", "group", "label", "split", *names))
    with blaming(path):
        keep = np.array([side == split for side in table["split"].to_pylist()], dtype=bool)
        table = table.filter(pa.array(keep)).select(["id", "group", "label", *names])
        texts = {"trial": "run", "model": model, "arm": REFERENCE, "mode": "retrain"}
        for name, value in texts.items():
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
        table = table.append_column("strength", pa.nulls(len(table), pa.float64()))
        table = table.append_column("seed", pa.array([0] * len(table), pa.int64()))
        trials = read_trials(table)
        grid_folder.check_classes(trials, classes)
    return trials


def _history(path: Path) -> tuple[dict[str, float], ...]:
    """Epochs; none of trees and baselines, which have no epochs, nor of an ensemble's members."""
    if not path.exists():
        return ()
    with blaming(path), path.open(newline="", encoding="utf-8") as stream:
        return tuple(
            {name: float(text) if text else math.nan for name, text in row.items()}
            for row in csv.DictReader(stream)
        )


def _interval(row: dict[str, Any], value: str = "value") -> Interval:
    return Interval(_number(row[value]), _number(row["low"]), _number(row["high"]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
