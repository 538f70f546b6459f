"""What TensorBoard shows of a run."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from training.dataset import Clouds
from training.figures import cloud_figure, confusion_figure, curves_figure
from training.progress import Progress
from training.split import Parts
from training.tasks import Task

_FOLDER = "tensorboard"


@contextmanager
def log_epochs(run: Path, writes: bool = True) -> Iterator[Callable[[Progress], None]]:
    """A progress callback that logs each finished epoch: losses, metrics, learning rate, speed."""
    if not writes:
        yield lambda at: None
        return
    writer = SummaryWriter(str(run / _FOLDER))

    def log(at: Progress) -> None:
        speed = {} if at.speed is None else asdict(at.speed)
        for name, value in speed.items():
            writer.add_scalar(f"speed/{name}", value, at.epoch)
        for name, value in (at.record or {}).items():
            if name != "epoch":
                tag = re.sub(r"^(train|validation)_", r"\1/", name)
                writer.add_scalar(tag, value, at.epoch)
        if at.record:
            writer.flush()

    try:
        yield log
    finally:
        writer.close()


def log_evaluation(
    run: Path,
    data: Clouds,
    parts: Parts,
    probability_NC: NDArray[np.float64],
    task: Task,
    answer: dict[str, Any],
) -> None:
    """Figures of the test split: confusion matrix, ROC and PR curves, one cloud; its metrics.

    They have a folder of their own, made anew: an evaluation replaces the one before.
    """
    rows = parts.rows["test"]
    step = int(answer["best_epoch"])
    shutil.rmtree(run / _FOLDER / "test", ignore_errors=True)
    with SummaryWriter(str(run / _FOLDER / "test")) as writer:
        matrix = np.array(answer["confusion_matrix"])
        writer.add_figure("test/confusion_matrix", confusion_figure(matrix, task.classes), step)
        target = parts.target_N[rows].numpy()
        writer.add_figure("test/curves", curves_figure(target, probability_NC, task.classes), step)
        writer.add_figure("test/cloud", cloud_figure(data, int(rows[0])), step)
        for name, interval in answer["metrics"].items():
            if interval["value"] is not None:
                writer.add_scalar(f"test/{name}", interval["value"], step)
