"""What a grid leaves for its readers, made from its record; also of a grid that is not finished.

`grid.json` says what was asked, `test-TASK.parquet` which crystals answer. From these and the
record come `results.parquet`, one row a finished trial, and `predictions-TASK.parquet`.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ablation.catalogue import SUMMARY
from ablation.claim import CLAIM
from ablation.grid import GridConfig
from ablation.grid_folder import predictions_name
from ablation.parts import PARTS
from ablation.perturbations import ARMS, describe
from ablation.plan import Trial, plan
from ablation.record import Record
from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import replacing, write_text
from cluster.provenance import provenance
from featurization.attribution import attribution
from training.config import NOT_DECIDING
from training.dataset import CloudSet
from training.evaluate import prediction_table
from training.metrics import METRICS
from training.models.warmstart import check_formulas
from training.split import Parts

GRID = "grid.json"
_COLUMNS = ("trial", "task", "model", "arm", "strength", "mode", "seed", "status")
_TYPES = {"strength": pa.float64(), "seed": pa.int64()}


def begin(out: Path, grid: GridConfig, manifest: dict[str, Any], data: CloudSet) -> None:
    """Write `grid.json` and the tables of test crystals, or see that those there are the same.

    Raises:
        UserError: a question that cannot be asked, a run to begin with that has learned what is
            held out, or `out` holds a grid of other data or settings.
    """
    trainings = {task: _training(grid, task) for task in grid.all_tasks}
    parts = {task: Parts.of(data, training) for task, training in trainings.items()}
    if (init := grid.training.init) is not None:
        for own in parts.values():
            check_formulas(Path(init), Path(grid.dataset), data, own)
    tasks = {}
    for name, training in trainings.items():
        task = training.question
        tasks[name] = {
            "title": task.title,
            "question": task.question,
            "unit": task.unit,
            "threshold": task.threshold,
            "classes": list(task.classes),
            "class_counts": parts[name].class_counts(task.classes),
        }
    strengths = {arm.name: ARMS[arm.name].strength for arm in grid.choices}
    description = {
        "tasks": tasks,
        "models": list(grid.all_models),
        "arms": [
            {
                "name": name,
                "strength": None if strength is None else strength.name,
                "unit": "" if strength is None else strength.unit,
                "identity": None if strength is None else strength.identity,
                "family": ARMS[name].family,
                "description": describe(name),
            }
            for name, strength in strengths.items()
        ],
        "modes": list(grid.modes),
        "seeds": list(grid.seeds),
        "primary_metric": "auroc",
        "dataset": grid.dataset,
        "dataset_summary": {key: manifest[key] for key in SUMMARY},
        "training": grid.training.model_dump(exclude={"seed", "task", "model"}),
        "overrides": grid.overrides,
        "grid": grid.model_dump(exclude_defaults=True),
        "trials": len(plan(grid, manifest["content_hash"])),
        "provenance": provenance(),
        "attribution": attribution(manifest["sources"]),
    }
    if (out / GRID).exists():
        _compare(out, json.loads(json.dumps(description)))
    for name, part in parts.items():
        nothing = np.empty((len(part.rows["test"]), 0))
        table = prediction_table(data, part, {"test": nothing}).drop_columns(["split"])
        _write(out / f"test-{name}.parquet", [table], table.schema)
    write_text(out / GRID, json.dumps(description, indent=1, ensure_ascii=False))


def refuse_strangers(out: Path) -> None:
    """Raise `UserError` if `out` is something else than a grid's folder or a new one.

    A driver that died before it wrote `grid.json` leaves what `begin` and its claim had written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", remedy="give the path of a new folder")
    if not out.exists() or (out / GRID).exists():
        return
    begun = (CLAIM, PARTS, "test-*.parquet", ".*.tmp")
    if not all(any(map(path.match, begun)) for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no grid", remedy="give a new folder")


def read_plan(out: Path) -> tuple[GridConfig, list[Trial]]:
    """The grid of a folder and its trials, from `grid.json` alone.

    Raises:
        UserError: no grid.
    """
    path = out / GRID
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        grid, content_hash = found["grid"], found["dataset_summary"]["content_hash"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{out} holds no grid: it has no {GRID}",
            remedy=f"xtal ablate GRID.toml {out} makes one",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not of a grid: {type(error).__name__}: {error}", remedy="run the grid again"
        ) from None
    config = build_config(GridConfig, grid, where=str(path))
    return config, plan(config, content_hash)


def write_tables(out: Path) -> int:
    """Write `results.parquet` and `predictions-TASK.parquet` of what is done; returns the trials.

    Raises:
        UserError: no grid.
    """
    grid, planned = read_plan(out)
    record = Record(out)
    done = [trial for trial in planned if record.is_done(trial.id)]
    rows = [record.rows[trial.id] for trial in done]
    names = (*_COLUMNS, *METRICS, "seconds", "commit")
    metrics = dict.fromkeys((*METRICS, "seconds"), pa.float64())
    types = _TYPES | metrics
    columns = {
        name: pa.array([row[name] for row in rows], types.get(name, pa.string())) for name in names
    }
    results = pa.table(columns)
    _write(out / "results.parquet", [results], results.schema)
    for task in grid.all_tasks:
        own = [trial for trial in done if trial.training.task == task]
        if own:
            batches = _predictions(out, task, own, record)
            first = next(batches)
            _write(out / predictions_name(task), chain([first], batches), first.schema)
    return len(done)


def _predictions(out: Path, task: str, trials: list[Trial], record: Record) -> Iterator[pa.Table]:
    """The test crystals of each trial with its probabilities."""
    test = pq.read_table(out / f"test-{task}.parquet")
    texts = {name: test[name].combine_chunks().dictionary_encode() for name in ("id", "group")}
    for trial in trials:
        probability_NC = record.probabilities(trial.id)
        assert probability_NC is not None
        count = len(probability_NC)
        who: dict[str, Any] = {}
        for name in ("trial", "model", "arm", "strength", "mode", "seed"):
            value = trial.identity[name]
            if name in _TYPES:
                who[name] = pa.array([value] * count, _TYPES[name])
            else:
                who[name] = pa.array([value] * count, pa.string()).dictionary_encode()
        who |= texts | {"label": test["label"]}
        yield pa.table(who | {f"p{c}": column for c, column in enumerate(probability_NC.T)})


def _write(path: Path, tables: Any, schema: pa.Schema) -> None:
    """A Parquet file of tables one after the other, whole or not at all."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _training(grid: GridConfig, task: Any) -> Any:
    """A training of a task: all its models ask the same question of the same crystals.

    Raises:
        UserError: a model has its own split or threshold.
    """
    trainings = [grid.training_of(task, model, grid.seeds[0]) for model in grid.all_models]
    for training in trainings[1:]:
        for name in ("threshold", "validation_fraction", "test_fraction"):
            ours, theirs = getattr(training, name), getattr(trainings[0], name)
            if ours != theirs:
                raise UserError(
                    f"{name} = {ours} of model {training.model}, {theirs} of {trainings[0].model}",
                    remedy=f"give {name} for all models of a task",
                )
    return trainings[0]


def _compare(out: Path, asked: dict[str, Any]) -> None:
    """A grid may grow, but neither its data nor its settings may change."""
    there = json.loads((out / GRID).read_text(encoding="utf-8"))
    for key in ("training", "dataset_summary", "overrides"):
        changed = {k for k in asked[key] if there[key].get(k, asked[key][k]) != asked[key][k]}
        if names := ", ".join(sorted(changed - NOT_DECIDING)):
            raise UserError(
                f"{out} holds another grid: {key}: {names} differ",
                remedy="give a new folder; tasks, models, arms, modes and seeds may be added",
            )
