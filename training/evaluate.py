"""A trained model → predictions of the held-out crystals → whole-set metrics with intervals."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.files import replacing, write_text
from cluster.provenance import provenance
from featurization.attribution import attribution
from featurization.manifest import read_manifest
from training.appraisal import appraise, compare, plain, predictions_of
from training.breakdown import by_part
from training.card import write_card
from training.config import TrainingConfig
from training.dataset import Clouds, open_clouds
from training.described import Kept
from training.ensemble import finite, load_run
from training.leakage import audit
from training.metrics import confusion_matrix, evaluate
from training.numbers import errors
from training.split import Parts
from training.tasks import TaskName
from training.tensorboard import log_evaluation

_SIDES = ("validation", "test")


def prediction_table(
    data: Clouds, parts: Parts, probabilities: dict[str, NDArray[np.float64]]
) -> pa.Table:
    """One row a crystal: id, group, split, label (class index), p0 … p{C−1}."""
    tables = []
    for side, probability_NC in probabilities.items():
        rows = parts.rows[side].numpy()
        columns: dict[str, Any] = {
            "id": data.ids[rows],
            "group": data.groups[rows],
            "split": [side] * len(rows),
            "label": parts.target_N[parts.rows[side]].numpy(),
        }
        columns |= {f"p{c}": probability_NC[:, c] for c in range(probability_NC.shape[1])}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def evaluate_run(
    run: Path,
    dataset: Path | None = None,
    *,
    data: Clouds | None = None,
    task: str | None = None,
    against: Path | None = None,
    leaks: bool = False,
) -> dict[str, Any]:
    """Evaluate the model of a training run on its test split.

    Writes a table of predictions for each question (`predictions_of`), `metrics.json` and
    `MODEL_CARD.md` into `run` and returns the content of the second: what is said of the first
    question, and in `also` the same of each other one by its name.

    Args:
        dataset: where the dataset is now, when it has moved since the training.
        data: what `open_clouds` gives for it, if that is known already.
        task: the question that `against` and `leaks` are about, by default the first.
        against: another evaluated run on the same test crystals to compare with.
        leaks: count the test crystals that have a near-duplicate in training, list them in
            `leakage.parquet`, and tell the metrics of the others apart.

    Raises:
        UserError: no finished run, a dataset of other content than the model was trained on, or a
            question that the model was not asked.
    """
    trained, recorded = load_run(run)
    config = trained.config
    names = (config.task, *config.also)
    about = next((name for name in names if name == (task or config.task)), None)
    if about is None:
        raise UserError(
            f"--task {task}: {run} was not asked about it",
            remedy=f"choose one of {', '.join(names)}",
        )
    folder = dataset or Path(recorded["dataset"])
    if dataset is None and not folder.exists():
        raise UserError(
            f"{folder}, the dataset of the training, is no longer there",
            remedy="say with --dataset where it is now",
        )
    manifest = read_manifest(folder)
    found, asked = manifest["content_hash"], recorded["identity"]["content_hash"]
    if found != asked:
        raise UserError(
            f"{folder} has content hash {found[:12]}…, the model was trained on {asked[:12]}…",
            remedy="give the dataset of the training with --dataset",
        )
    data = open_clouds(folder, config.radiation) if data is None else data
    parts = Parts.of(data, config)
    if parts.digest(data.ids) != recorded["identity"].get("split"):
        raise UserError(
            f"{run} was trained with another split of the same crystals than this version makes",
            remedy="train again, or use the version of xtal that trained it",
        )
    questions: dict[TaskName, Parts] = {config.task: parts, **parts.others}
    held = torch.cat([own.rows[side] for own in questions.values() for side in _SIDES]).unique()
    kept = Kept.of(run, recorded["identity"])  # by a training that waits for this
    logits_MNC = trained.logits(data, held, kept if kept.folder.is_dir() else None)
    answers: dict[str, dict[str, Any]] = {}
    for name, own in questions.items():
        places = {side: torch.searchsorted(held, own.rows[side]).numpy() for side in _SIDES}
        members = {
            side: finite(trained.shares(logits_MNC[:, places[side]], name)) for side in _SIDES
        }
        table = predictions_of(run, config, name)
        answers[name] = _question(data, own, members, config.asking(name), table)
        if name == config.task:
            first = members["test"].mean(axis=0)
        if leaks and name == about:
            leakage = table.with_name(table.name.replace("predictions", "leakage"))
            probability_NC = members["test"].mean(axis=0)
            answers[name]["leakage"] = _leakage(
                leakage, data, own, probability_NC, config.asking(name)
            )
    if against is not None:
        answers[about]["against"] = compare(run, against, data, questions[about], config, about)
    answer = answers.pop(config.task)
    if answers:
        answer["also"] = answers
    answer |= {"best_epoch": trained.states[0]["best_epoch"], "provenance": provenance()}
    answer["attribution"] = attribution(manifest["sources"])
    log_evaluation(run, data, parts, first, config.question, answer)
    write_text(run / "metrics.json", json.dumps(answer, indent=1, ensure_ascii=False))
    write_card(run)
    return answer


def _question(
    data: Clouds,
    parts: Parts,
    members: dict[str, NDArray[np.float64]],
    config: TrainingConfig,
    table: Path,
) -> dict[str, Any]:
    """All that is said of one question, whose predictions are written.

    Args:
        members: split → (M, n, C) probabilities of the members, for validation and test.
        config: asking this question alone.
    """
    probabilities = {side: each.mean(axis=0) for side, each in members.items()}
    with replacing(table) as temporary:
        pq.write_table(prediction_table(data, parts, probabilities), temporary)
    answer = summarize(data, parts, probabilities["test"], config)
    answer |= appraise(data, parts, members, config)
    if config.question.edges:
        answer["metrics"] = plain(_number_errors(data, parts, probabilities["test"], config))
    return answer


def _number_errors(
    data: Clouds, parts: Parts, probability_NC: NDArray[np.float64], config: TrainingConfig
) -> dict[str, Any]:
    """Errors of the number itself on the test split."""
    rows, task = parts.rows["test"].numpy(), config.question
    found = errors(
        task.values(data.labels[task.label][rows]),
        task.edges,
        probability_NC,
        data.groups[rows].tolist(),
        resamples=config.resamples,
    )
    return {name: asdict(interval) for name, interval in found.items()}


def _leakage(
    path: Path,
    data: Clouds,
    parts: Parts,
    probability_NC: NDArray[np.float64],
    config: TrainingConfig,
) -> dict[str, Any]:
    """The audit's counts, and the metrics of test crystals with and without a near-duplicate."""
    counts, table = audit(data, {side: rows.numpy() for side, rows in parts.rows.items()})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
    test = table.filter(pc.equal(table["split"], "test"))
    novelty = np.where(test["near_count"].to_numpy() > 0, "near", "new").tolist()
    rows = parts.rows["test"]
    target = parts.target_N[rows].numpy()
    by_novelty = by_part(
        target, probability_NC, novelty, test["group"].to_pylist(), resamples=config.resamples
    )
    return counts | {"by_novelty": plain({k: asdict(part) for k, part in by_novelty.items()})}


def summarize(
    data: Clouds, parts: Parts, probability_NC: NDArray[np.float64], config: TrainingConfig
) -> dict[str, Any]:
    """Metrics of the test split with 95 % intervals (groups resampled), as plain JSON values."""
    task = config.question
    rows = parts.rows["test"]
    target = parts.target_N[rows].numpy()
    groups = list(data.groups[rows.numpy()])
    intervals = evaluate(target, probability_NC, groups, resamples=config.resamples)
    return {
        "task": task.name,
        "question": task.question,
        "classes": list(task.classes),
        "split": "test",
        "structures": len(target),
        "groups": len(set(groups)),
        "metrics": plain({name: asdict(interval) for name, interval in intervals.items()}),
        "confusion_matrix": confusion_matrix(target, probability_NC).tolist(),
        "class_counts": parts.class_counts(task.classes),
    }
