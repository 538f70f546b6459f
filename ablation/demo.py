"""The whole experiment at a laptop's size: featurize, train, six arms × two seeds, report."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ablation.grid import GridConfig
from ablation.report import write_report
from ablation.run import run_grid
from ablation.variants import on_ranks
from cluster.config import build_config
from cluster.errors import RunFailed, UserError
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest
from training.config import TrainingConfig
from training.train import train

PROTOTYPES = "prototypes:1400"
# Small clouds, a small network and about as many steps whatever the source: 13 trainings must fit.
_FEATURIZATION = FeaturizationConfig(selection="miller:2")
_TRAINING = {"width": 128, "batch_size": 16}
_CLOUDS_SEEN = 28_000
_SEEDS = (0, 1)
_CAVEAT = (
    "These crystals are decorated prototypes, each prototype on both sides of the split: a trial "
    "of the machinery, not of unseen structure types. Try --source with your own."
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the demo with a progress bar of its own."""

    title: str
    total: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The paper's question, this run's answer to it, and where to read more."""

    sentences: tuple[str, ...]
    report: Path


Bars = Callable[[Stage], AbstractContextManager[Callable[[float], None]]]


def run_demo(folder: Path, source: str | None, task: str, bar: Bars) -> Answer:
    """Run what is not there yet of the demo in `folder`; a second call goes on where one stopped.

    Args:
        source: as for `xtal featurize`; None takes the embedded prototypes.
        bar: opens a progress bar for a stage.

    Raises:
        UserError: from any of its parts.
    """
    training = build_config(TrainingConfig, {"task": task, **_TRAINING}, where="options")
    dataset = folder / "dataset"
    if source is None and task != "crystal_system":
        raise UserError(
            f"task {task} needs labels, and the embedded prototypes know only crystal_system",
            remedy="give your crystals with --source FILE",
        )
    with bar(Stage("featurize", None)) as update:
        on_ranks(source or PROTOTYPES, dataset, _FEATURIZATION, 2)
        structures = read_manifest(dataset)["structures"]
        update(structures)
    epochs = min(20, max(4, _CLOUDS_SEEN // structures))
    training = training.model_copy(update={"epochs": epochs})
    with bar(Stage("train", training.epochs)) as update:
        train(
            dataset,
            folder / "train",
            training,
            resume=True,
            progress=lambda at: update(at.epoch + at.step / at.steps),
        )
    grid = GridConfig(dataset=str(dataset.resolve()), seeds=_SEEDS, training=training)
    trials = len(grid.arms) * len(grid.seeds)
    ablation = folder / "ablation"
    with bar(Stage(f"ablate ({trials} trainings)", trials)) as update:
        counts = run_grid(grid, ablation, progress=lambda at: update(at.share))
    if counts["failed"]:
        raise RunFailed(
            f"{counts['failed']} trials failed",
            remedy=f"xtal ablate status {ablation} shows why; run the demo again to retry",
        )
    report = write_report(ablation, dataset=dataset)
    sentences = _sentences(ablation, training)
    return Answer(sentences if source else (*sentences, _CAVEAT), report)


def _sentences(folder: Path, training: TrainingConfig) -> tuple[str, ...]:
    task = training.question
    metrics = pq.read_table(folder / "metrics.parquet").to_pylist()
    effects = pq.read_table(folder / "effects.parquet").to_pylist()
    none = next(r for r in metrics if r["arm"] == "none" and r["metric"] == "auroc")
    lines = [
        "Does structure alone, without chemistry, tell what a crystal does?",
        f"Asked here: {task.question}",
        f"AUROC on unseen test groups: {_with_interval(none, 'value')} "
        f"({len(_SEEDS)} seeds; 0.5 is guessing, 1 is perfect).",
        "Its change when the pattern is perturbed and the model trained again:",
    ]
    for row in (r for r in effects if r["metric"] == "auroc"):
        lines.append(
            f"  {row['arm']:<20}{_with_interval(row, 'difference', '+')}  {row['verdict']}"
        )
    return tuple(lines)


def _with_interval(row: dict[str, Any], key: str, sign: str = "") -> str:
    return f"{row[key]:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"
