"""A finished folder of trials or of one training run, read and checked: known by its files.

| kind     | files                                                                       |
|----------|-----------------------------------------------------------------------------|
| ablation | grid.json, results.parquet, predictions.parquet, metrics.parquet, effects.parquet |
| run      | config.json, metrics.json, predictions.parquet, history.csv                 |
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ablation.report_study import REFERENCE, Effect, Study, Trial
from cluster.errors import UserError
from training.metrics import Interval, confusion_matrix

_TABLES = ("results", "predictions", "metrics", "effects")
FILES = {
    "ablation": ("grid.json", *(f"{name}.parquet" for name in _TABLES)),
    "run": ("config.json", "metrics.json", "predictions.parquet", "history.csv"),
}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    task: str
    title: str = ""
    question: str
    classes: tuple[str, ...] = Field(min_length=2)
    unit: str = ""
    threshold: float | None = None
    primary_metric: str = "auroc"
    class_counts: dict[str, dict[str, int] | int] = {}
    provenance: dict[str, Any] = {}
    attribution: str = ""


_Model = TypeVar("_Model", bound=_Document)


class _Grid(_Document):
    model: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset: str = ""
    dataset_summary: dict[str, Any] = {}
    arm_descriptions: dict[str, str] = {}
    training: dict[str, Any] = {}


class _Interval(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    value: float | None
    low: float | None
    high: float | None


class _RunMetrics(_Document):
    split: str
    structures: int
    metrics: dict[str, _Interval]
    confusion_matrix: tuple[tuple[int, ...], ...]


def read_study(folder: Path) -> Study:
    """Read an ablation or run folder.

    Raises:
        UserError: the folder is neither kind, a file is missing or broken, a column or field is
            missing or of the wrong type, or a prediction is not a class or a probability.
    """
    if (folder / "grid.json").is_file():
        return _read_ablation(folder)
    if (folder / "metrics.json").is_file() or (folder / "config.json").is_file():
        return _read_run(folder)
    raise UserError(
        f"{folder} is neither an ablation nor a training run",
        remedy="give a folder with "
        + "; or one with ".join(", ".join(names) for names in FILES.values()),
    )


def _read_ablation(folder: Path) -> Study:
    _require(folder, "ablation")
    path = folder / "grid.json"
    grid = _validated(_Grid, path, _json(path))
    results = _table(folder / "results.parquet", ("arm", "seed", "status")).to_pylist()
    metrics: dict[str, dict[str, Interval]] = {}
    columns: tuple[str, ...] = ("arm", "metric", "value", "low", "high")
    with _blaming(path := folder / "metrics.parquet"):
        for row in _table(path, columns).to_pylist():
            metrics.setdefault(str(row["arm"]), {})[str(row["metric"])] = _interval(row, "value")
    effects: dict[str, dict[str, Effect]] = {}
    columns = ("arm", "metric", "none", "value", "difference", "low", "high", "seeds")
    with _blaming(path := folder / "effects.parquet"):
        for row in _table(path, columns).to_pylist():
            effects.setdefault(str(row["arm"]), {})[str(row["metric"])] = Effect(
                reference=_number(row["none"]),
                value=_number(row["value"]),
                difference=_interval(row, "difference"),
                seeds=int(row["seeds"]),
            )
    if REFERENCE not in metrics or grid.primary_metric not in metrics[REFERENCE]:
        raise UserError(
            f"{folder / 'metrics.parquet'} has no {grid.primary_metric!r} of arm {REFERENCE!r}",
            remedy=f"run the trials of arm {REFERENCE!r}, which all others are compared with",
        )
    known = dict.fromkeys((*grid.arms, *metrics))
    predictions = folder / "predictions.parquet"
    trials = _trials(predictions, len(grid.classes))
    with _blaming(predictions):
        reference = [t for t in trials if t.arm == REFERENCE]
        matrices = [confusion_matrix(t.labels, t.probabilities) for t in reference]
    if not matrices:
        raise UserError(
            f"{predictions} has no row of arm {REFERENCE!r}",
            remedy=f"run the trials of arm {REFERENCE!r}, which all others are compared with",
        )
    return Study(
        kind="ablation",
        arms=tuple(arm for arm in known if arm in metrics),
        trials=trials,
        metrics=metrics,
        effects=effects,
        confusion=np.sum(matrices, axis=0),
        arm_descriptions=grid.arm_descriptions,
        results=tuple(results),
        history=(),
        settings={"model": grid.model, "seeds": list(grid.seeds), "training": grid.training},
        dataset=grid.dataset,
        dataset_summary=grid.dataset_summary,
        **_shared(grid),
    )


def _read_run(folder: Path) -> Study:
    _require(folder, "run")
    path = folder / "metrics.json"
    run = _validated(_RunMetrics, path, _json(path))
    config = _json(folder / "config.json")
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
    own = {k: v for k, v in config.items() if k not in ("dataset", "provenance", "identity")}
    return Study(
        kind="run",
        arms=(REFERENCE,),
        trials=_trials(folder / "predictions.parquet", len(run.classes), split=run.split),
        metrics={REFERENCE: {n: _interval(m.model_dump()) for n, m in run.metrics.items()}},
        effects={},
        confusion=np.array(run.confusion_matrix, dtype=np.int64),
        arm_descriptions={},
        results=(),
        history=_history(folder / "history.csv"),
        settings={"training": config.get("training", own)},
        dataset=str(config.get("dataset") or ""),
        dataset_summary=identity if isinstance(identity := config.get("identity"), dict) else {},
        **_shared(run),
    )


def _shared(document: _Document) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {}
    for name, value in document.class_counts.items():
        if isinstance(value, dict):
            counts[name] = value
        else:  # one split written flat: class → count
            counts.setdefault(getattr(document, "split", "all"), {})[name] = value
    return {
        "task": document.task,
        "title": document.title or document.task.replace("_", " "),
        "question": document.question,
        "classes": document.classes,
        "unit": document.unit,
        "threshold": document.threshold,
        "primary": document.primary_metric,
        "class_counts": counts,
        "provenance": document.provenance,
        "attribution": document.attribution,
    }


def _trials(path: Path, classes: int, *, split: str | None = None) -> tuple[Trial, ...]:
    """One trial an (arm, seed); a run (`split` given) has one, of the rows of that split."""
    names = [f"p{c}" for c in range(classes)]
    keys = ("arm", "seed") if split is None else ("split",)
    table = _table(path, ("id", "label", *keys, *names))
    rows: dict[tuple[str, int], list[int]] = {}
    with _blaming(path):
        ids = [str(name) for name in table["id"].to_pylist()]
        labels = np.array(table["label"].to_pylist(), dtype=np.int64)
        columns = [table[name].to_numpy() for name in names]
        probabilities = np.stack(columns, axis=1).astype(np.float64)
        for row, key in enumerate(zip(*(table[key].to_pylist() for key in keys), strict=True)):
            if split is None:
                rows.setdefault((str(key[0]), int(key[1])), []).append(row)
            elif key[0] == split:
                rows.setdefault((REFERENCE, 0), []).append(row)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes) | ~np.isfinite(probabilities).all(1))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{path}: row {row} (id {ids[row]!r}) has label {labels[row]} and probabilities "
            f"{probabilities[row].tolist()}; labels are 0 … {classes - 1}, probabilities finite",
            remedy="evaluate the trials again, with the classes that the folder names",
        )
    if not rows:
        raise UserError(f"{path} has no predictions to show", remedy="evaluate first")
    return tuple(
        Trial(arm, seed, tuple(ids[i] for i in part), labels[part], probabilities[part])
        for (arm, seed), part in rows.items()
    )


def _history(path: Path) -> tuple[dict[str, float], ...]:
    with _blaming(path), path.open(newline="", encoding="utf-8") as stream:
        return tuple(
            {name: float(text) if text else math.nan for name, text in row.items()}
            for row in csv.DictReader(stream)
        )


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn what broken content raises into a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path}: {error}", remedy="write the folder again") from error


def _require(folder: Path, kind: str) -> None:
    for name in FILES[kind]:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing; a folder of kind {kind!r} has it",
                remedy="let the command that writes the folder finish, then ask for the report",
            )


def _json(path: Path) -> dict[str, Any]:
    with _blaming(path):
        document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise UserError(f"{path} does not hold a JSON object", remedy="write the folder again")
    return document


def _validated(model: type[_Model], path: Path, document: dict[str, Any]) -> _Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: field {where!r}: {first['msg']}", remedy="write the folder again"
        ) from error


def _table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not Parquet: {error}", remedy="write it again") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}",
            remedy=f"write it again with {', '.join(columns)}",
        )
    return table


def _interval(row: Mapping[str, Any], value: str = "value") -> Interval:
    return Interval(_number(row[value]), _number(row["low"]), _number(row["high"]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
