"""A trained model → predictions of the held-out crystals → whole-set metrics with intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import replacing, write_text
from cluster.provenance import provenance
from featurization.crystal import ATTRIBUTION
from featurization.manifest import read_manifest
from training import checkpoint
from training.config import TrainingConfig
from training.dataset import CloudSet, load
from training.loop import MODEL, device, predict
from training.metrics import confusion_matrix, evaluate
from training.models import PointNet
from training.split import Parts
from training.tensorboard import log_evaluation


def load_model(path: Path) -> tuple[PointNet, dict[str, Any]]:
    """A model file → the network on this machine's device, and its `config` and `identity`."""
    weights, state = checkpoint.read(path)
    config = TrainingConfig(**state["config"])
    model = PointNet(len(config.question.classes), config.width, q_scale=1.0, intensity_scale=1.0)
    model.load_state_dict(weights)
    return model.to(device()).eval(), state


def predictions_of(
    model: PointNet, data: CloudSet, parts: Parts, config: TrainingConfig
) -> dict[str, NDArray[np.float64]]:
    """Split → (n, C) probabilities of its crystals, for validation and test."""
    return {
        side: torch.from_numpy(predict(model, data, parts.rows[side], config.batch_size))
        .double()
        .softmax(dim=1)
        .numpy()
        for side in ("validation", "test")
    }


def prediction_table(
    data: CloudSet, parts: Parts, probabilities: dict[str, NDArray[np.float64]]
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


def evaluate_run(run: Path, dataset: Path | None = None) -> dict[str, Any]:
    """Evaluate the model of a training run on its test split.

    Writes `predictions.parquet` and `metrics.json` into `run` and returns the latter's content.

    Args:
        dataset: where the dataset is now, when it has moved since the training.

    Raises:
        UserError: no finished run, or a dataset of other content than the model was trained on.
    """
    try:
        recorded = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{run} is no training run: it has no config.json", remedy="run xtal train first"
        ) from None
    folder = dataset or Path(recorded["dataset"])
    config = build_config(TrainingConfig, recorded["training"], where=str(run / "config.json"))
    if not (run / MODEL).exists():
        raise UserError(
            f"the training in {run} has not finished", remedy="finish it with xtal train --resume"
        )
    found = read_manifest(folder)["content_hash"]
    model, state = load_model(run / MODEL)
    if found != state["identity"]["content_hash"]:
        raise UserError(
            f"{folder} has content hash {found[:12]}…, the model was trained on "
            f"{state['identity']['content_hash'][:12]}…",
            remedy="give the dataset of the training with --dataset",
        )
    data = load(folder, config.radiation)
    parts = Parts.of(data, config)
    probabilities = predictions_of(model, data, parts, config)
    with replacing(run / "predictions.parquet") as temporary:
        pq.write_table(prediction_table(data, parts, probabilities), temporary)
    answer = summarize(data, parts, probabilities["test"], config)
    answer |= {"best_epoch": state["best_epoch"], "provenance": provenance()}
    log_evaluation(run, data, parts, probabilities["test"], config.question, answer)
    write_text(run / "metrics.json", json.dumps(answer, indent=1, ensure_ascii=False))
    return answer


def summarize(
    data: CloudSet, parts: Parts, probability_NC: NDArray[np.float64], config: TrainingConfig
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
        "metrics": {
            name: {"value": _plain(i.value), "low": _plain(i.low), "high": _plain(i.high)}
            for name, i in intervals.items()
        },
        "confusion_matrix": confusion_matrix(target, probability_NC).tolist(),
        "class_counts": parts.class_counts(task.classes),
        "attribution": ATTRIBUTION,
    }


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
