"""What a model's probabilities are worth beyond its metrics: calibration, parts, doubt, rivals.

Everything here is plain JSON values; the functions behind it say what each number means.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import UserError
from training.breakdown import by_class, by_part
from training.calibration import fit_temperature, log_loss, reliability, scaled
from training.comparison import delong, paired_bootstrap
from training.config import TrainingConfig
from training.dataset import Clouds
from training.metrics import score
from training.numbers import paired_errors
from training.split import Parts
from training.tasks import TaskName
from training.uncertainty import combine, doubt_and_error

FloatArray = NDArray[np.float64]
_LEAST = 1e-300  # a probability's logarithm must be finite


def appraise(
    data: Clouds, parts: Parts, members: Mapping[str, FloatArray], config: TrainingConfig
) -> dict[str, Any]:
    """Calibration, metrics by class and by crystal system, and how doubt goes with error.

    Args:
        members: split → (M, n, C) probabilities of the members, for validation and test.
    """
    rows = parts.rows["test"]
    target, groups = parts.target_N[rows].numpy(), data.groups[rows.numpy()].tolist()
    logits = {side: np.log(np.maximum(p.mean(axis=0), _LEAST)) for side, p in members.items()}
    temperature = fit_temperature(
        parts.target_N[parts.rows["validation"]].numpy(), logits["validation"]
    )
    ensemble = combine(members["test"])
    answer, sharper = ensemble.probabilities_NC, scaled(logits["test"], temperature)
    drawn = {"resamples": config.resamples}
    classes = by_class(target, answer, groups, **drawn)
    appraisal: dict[str, Any] = {
        "calibration": {
            "temperature": temperature,
            "log_loss": log_loss(target, logits["test"]),
            "log_loss_at_temperature": log_loss(target, logits["test"], temperature),
            "ece": float(score(target, answer)["ece"][0]),
            "ece_at_temperature": float(score(target, sharper)["ece"][0]),
            "reliability": [asdict(each) for each in reliability(target, answer, groups)],
        },
        "by_class": dict(zip(config.question.classes, map(_each, classes), strict=True)),
    }
    if config.question.threshold is not None:
        systems = data.crystal_systems[rows.numpy()].tolist()
        by_system = by_part(target, answer, systems, groups, **drawn)
        appraisal["by_crystal_system"] = {name: asdict(part) for name, part in by_system.items()}
    if config.members > 1:
        wrong = answer.argmax(axis=1) != target
        doubts = {"spread": ensemble.spread_N, "entropy": ensemble.entropy_N}
        appraisal["doubt"] = {
            name: asdict(doubt_and_error(wrong, doubt, groups, **drawn))
            for name, doubt in doubts.items()
        }
    return plain(appraisal)


def predictions_of(run: Path, config: TrainingConfig, task: str) -> Path:
    """Where a run's predictions are: of its first question, or of another that it answers."""
    return run / ("predictions.parquet" if task == config.task else f"predictions-{task}.parquet")


def compare(
    run: Path, other: Path, data: Clouds, parts: Parts, config: TrainingConfig, task: TaskName
) -> dict[str, Any]:
    """Two evaluated runs on the same test crystals, this one minus the other.

    Of a number, the errors of the number itself, as `training.numbers` has them.

    Args:
        parts: of this question.
        config: of `run`.
        task: the question; of a run that answers several it is another's only one, or the reverse.

    Raises:
        UserError: the other run has no predictions, or of other crystals or another question.
    """
    tables = []
    # A run of several questions has a table of its own of each but the first.
    named = other / f"predictions-{task}.parquet"
    rival = named if named.exists() else other / "predictions.parquet"
    for folder, path in ((run, predictions_of(run, config, task)), (other, rival)):
        if not path.exists():
            raise UserError(f"{path}: no such file", remedy=f"xtal evaluate {folder}")
        tables.append(pq.read_table(path, filters=[("split", "=", "test")]).sort_by("id"))
    own, reference = tables
    same = own.column_names == reference.column_names and all(
        own[name].equals(reference[name]) for name in ("id", "label")
    )
    if not same:
        raise UserError(
            f"{other} was tested on other crystals or asks another question than {run}",
            remedy="compare runs of one dataset, task, threshold and test_fraction",
        )
    target, groups = own["label"].to_numpy(), own["group"].to_pylist()
    asked = config.asking(task).question
    columns = [f"p{number}" for number in range(len(asked.classes))]
    value, reference_NC = (np.stack([t[c].to_numpy() for c in columns], axis=1) for t in tables)
    drawn = {"resamples": config.resamples}
    if asked.edges:
        # Both tables are in the order of the ids.
        rows = parts.rows["test"].numpy()
        rows = rows[np.argsort(data.ids[rows], kind="stable")]
        truth = asked.values(data.labels[asked.label][rows])
        pairs = paired_errors(truth, asked.edges, value, reference_NC, groups, **drawn)
    else:
        pairs = paired_bootstrap(target, value, reference_NC, groups, **drawn)
    answer: dict[str, Any] = {"run": str(other), "bootstrap": _each(pairs)}
    if len(columns) == 2:
        answer["delong"] = asdict(delong(target, value, reference_NC, groups))
    return plain(answer)


def _each(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in values.items()}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and knows no NumPy."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
