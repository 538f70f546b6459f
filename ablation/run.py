"""Run a grid of trials on long-lived Ray actors; what is done is never done again.

`OUT/results.jsonl` is the record: one line a trial, appended and fsynced when it ends. The tables
are made from it and from the trials' predictions whenever the grid is complete.
"""

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ablation.grid import GridConfig, Trial, trials
from ablation.perturbations import ARMS, describe, perturb
from ablation.tables import write_statistics
from cluster.errors import UserError
from cluster.files import replacing, write_text
from cluster.provenance import commit, provenance
from cluster.ray_session import cards, cores, ray_for
from featurization.config import RadiationName
from featurization.crystal import ATTRIBUTION
from featurization.manifest import read_manifest
from training.config import NOT_DECIDING
from training.dataset import CloudSet, load
from training.ensemble import fit_members, load_members
from training.evaluate import prediction_table, predictions_of
from training.loop import CHECKPOINT, MODEL
from training.metrics import METRICS, score
from training.split import Parts

_RECORD = "results.jsonl"


def run_grid(
    grid: GridConfig, out: Path, progress: Callable[[int], None] = lambda epochs: None
) -> dict[str, int]:
    """Run the trials of a grid that have no result in `out` yet, then write its tables.

    Args:
        progress: called with the number of epochs that are finished, over all trials.

    `out` gets grid.json, results.jsonl, results.parquet, predictions-TASK.parquet, trials/ID/ and
    what `ablation.tables` writes.

    Returns:
        Numbers of trials: `done`, `failed`, `skipped` (done before).

    Raises:
        UserError: no dataset, no usable classes, or `out` holds another grid.
    """
    dataset = Path(grid.dataset)
    manifest = read_manifest(dataset)
    planned = trials(grid, manifest["content_hash"])
    data = load(dataset, grid.training.radiation)
    parts = Parts.of(data, grid.training)
    _claim(out, grid, manifest, parts)
    before = _results(out)
    todo = [t for t in planned if not _is_done(out, t, before)]
    if todo:
        _run(todo, len(planned), out, dataset, grid, progress)
    results = _results(out)
    done = [trial for trial in planned if results[trial.id]["status"] == "done"]
    if len(done) == len(planned):
        _write_tables(out, planned, results)
        write_statistics(out, dataset=dataset)
    return {
        "done": len(done),
        "failed": len(planned) - len(done),
        "skipped": len(planned) - len(todo),
    }


def run_trial(data: CloudSet, trial: Trial, folder: Path) -> dict[str, Any]:
    """One trial on the reference data of its grid; returns its row of the results.

    Perturbs, trains (from the trial's checkpoint if there is one), predicts the test split and
    leaves `predictions.parquet` in `folder`.
    """
    start = time.perf_counter()
    config = trial.training
    perturbed = perturb(data, trial.arm, None, config.seed)
    parts = Parts.of(perturbed, config)
    identity = {"trial": trial.id, "arm": trial.arm}
    fit_members(folder, perturbed, config, identity=identity, resume=True)
    probabilities = predictions_of(load_members(folder, config), perturbed, parts)
    table = prediction_table(perturbed, parts, {"test": probabilities["test"]})
    with replacing(folder / "predictions.parquet") as temporary:
        pq.write_table(table, temporary)
    scores = score(parts.target_N[parts.rows["test"]].numpy(), probabilities["test"])
    for name in (CHECKPOINT, MODEL):
        for path in folder.rglob(name):
            path.unlink()
    return (
        {"status": "done"}
        | {name: float(scores[name][0]) for name in METRICS}
        | {"seconds": round(time.perf_counter() - start, 3)}
    )


class _Trainer:
    """A Ray actor: holds the dataset and runs one trial after the other."""

    def __init__(self, dataset: str, radiation: RadiationName | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._data = load(Path(dataset), radiation)

    def run(self, trial: Trial, folder: str) -> dict[str, Any]:
        try:
            return run_trial(self._data, trial, Path(folder))
        except Exception:
            return {"status": "failed", "error": traceback.format_exc()}


def _run(
    todo: list[Trial],
    total: int,
    out: Path,
    dataset: Path,
    grid: GridConfig,
    progress: Callable[[int], None],
) -> None:
    processes = min(grid.processes or cores(), len(todo))
    finished = total - len(todo)
    failed = 0
    made_by = commit()
    epochs = grid.training.epochs
    with ray_for(processes):
        import ray

        # Ray takes whole GPUs, or equal parts of one that several trials then share.
        gpus = cards(torch.cuda.device_count())
        share = 0 if not gpus else 1 / max(1, -(-processes // gpus))
        kind: Any = ray.remote(num_cpus=1, num_gpus=share)(_Trainer)
        threads = max(1, cores() // processes)
        idle = [
            kind.remote(str(dataset), grid.training.radiation, threads) for _ in range(processes)
        ]
        running: dict[Any, tuple[Any, Trial]] = {}
        queue = list(todo)
        while queue or running:
            while queue and idle:
                actor, trial = idle.pop(), queue.pop(0)
                folder = out.resolve() / "trials" / trial.id
                folder.mkdir(parents=True, exist_ok=True)
                running[actor.run.remote(trial, str(folder))] = actor, trial
            done, _ = ray.wait(list(running), timeout=0.5)
            for reference in done:
                actor, trial = running.pop(reference)
                try:
                    row = ray.get(reference)
                except ray.exceptions.RayError as error:  # the actor itself is gone
                    row = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                    actor = kind.remote(str(dataset), grid.training.radiation, threads)
                _append(out / _RECORD, _identify(trial, made_by) | row)
                idle.append(actor)
                finished += row["status"] == "done"
                failed += row["status"] == "failed"
            partial = sum(_epochs(out / "trials" / t.id) for _, t in running.values())
            whole = (finished + failed) * epochs
            progress(whole + partial)


def _identify(trial: Trial, made_by: str) -> dict[str, Any]:
    return {
        "trial": trial.id,
        "task": trial.training.task,
        "model": trial.training.model,
        "arm": trial.arm,
        "strength": None,
        "mode": "retrain",
        "seed": trial.training.seed,
        "commit": made_by,
    }


def _claim(out: Path, grid: GridConfig, manifest: dict[str, Any], parts: Parts) -> None:
    """Write `grid.json`; refuse a folder whose grid asks another question or has other data."""
    task = grid.training.question
    description = {
        "tasks": {
            task.name: {
                "title": task.title,
                "question": task.question,
                "unit": task.unit,
                "threshold": task.threshold,
                "classes": list(task.classes),
                "class_counts": parts.class_counts(task.classes),
            }
        },
        "models": [grid.training.model],
        "arms": [
            {"name": arm, "family": ARMS[arm].family, "description": describe(arm)}
            for arm in grid.arms
        ],
        "seeds": list(grid.seeds),
        "trials": len(grid.arms) * len(grid.seeds),
        "primary_metric": "auroc",
        "dataset": grid.dataset,
        "dataset_summary": {
            key: manifest[key]
            for key in ("sources", "structures", "rejected", "points", "content_hash", "config")
        },
        "training": grid.training.model_dump(exclude={"seed"}),
        "provenance": provenance(),
        "attribution": ATTRIBUTION,
    }
    path = out / "grid.json"
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        for key in ("training", "dataset_summary"):
            asked = json.loads(json.dumps(description[key]))
            changed = {k for k in asked if there[key].get(k) != asked[k]} - NOT_DECIDING
            if changed:
                raise UserError(
                    f"{out} holds another grid: {key}: {', '.join(sorted(changed))} differ",
                    remedy="give a new folder; only arms and seeds may be added to a grid",
                )
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", remedy="give the path of a new folder")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no grid", remedy="give a new folder")
    write_text(path, json.dumps(description, indent=1, ensure_ascii=False))


def _is_done(out: Path, trial: Trial, results: dict[str, dict[str, Any]]) -> bool:
    recorded = results.get(trial.id, {}).get("status") == "done"
    return recorded and (out / "trials" / trial.id / "predictions.parquet").exists()


def _results(out: Path) -> dict[str, dict[str, Any]]:
    """Trial → its last line in the record; a line torn by a crash is not there."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        lines = (out / _RECORD).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["trial"]] = row
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    # A leading newline closes a line that a crash has torn.
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps(row))
        stream.flush()
        os.fsync(stream.fileno())


def _epochs(folder: Path) -> int:
    """Epochs that a running trial has finished."""
    try:
        return len((folder / "history.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


def _write_tables(out: Path, planned: list[Trial], results: dict[str, dict[str, Any]]) -> None:
    parts = []
    for trial in planned:
        table = pq.read_table(out / "trials" / trial.id / "predictions.parquet")
        row = results[trial.id]
        texts = ("trial", "model", "arm", "mode")
        who = {name: pa.array([row[name]] * len(table), pa.string()) for name in texts}
        who["strength"] = pa.array([row["strength"]] * len(table), pa.float64())
        who["seed"] = pa.array([row["seed"]] * len(table), pa.int64())
        parts.append(pa.table(who | {n: table[n] for n in table.column_names if n != "split"}))
    predictions = pa.concat_tables(parts)
    rows = [results[trial.id] for trial in planned]
    names = ("trial", "task", "model", "arm", "strength", "mode", "seed", "status")
    columns = (*names, *METRICS, "seconds", "commit")
    tables = {
        "results": pa.table(
            {
                name: pa.array(
                    [row[name] for row in rows], pa.float64() if name == "strength" else None
                )
                for name in columns
            }
        ),
        f"predictions-{planned[0].training.task}": predictions,
    }
    for name, table in tables.items():
        with replacing(out / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)
