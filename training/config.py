"""What decides a training; with the dataset's content hash, all of it."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from cluster.config import Config
from cluster.errors import UserError
from featurization.config import RadiationName
from training.tasks import Task, TaskName, task_of

NetworkName = Literal["pointnet", "harmonic", "attention", "powder_cnn"]
BoostedName = Literal["boosted", "solved", "lattice_only", "powder", "composition_only", "majority"]
PoseName = Literal["random", "axis", "fixed"]
ModelName = NetworkName | BoostedName | Literal["blend"]
# Unlike models, whose errors differ; each of a blend's `members` is one of each.
BLEND: tuple[ModelName, ...] = ("boosted", "harmonic")

# Version of what models see of clouds. Raise it whenever the same cloud is described by other
# numbers: `invariants`, `coefficients`, the baselines' columns, what a network's `prepare` gives.
FEATURES = 3

# Settings that do not decide the trained model: how the work is shared, how often it is saved.
NOT_DECIDING = {
    "workers",
    "restarts",
    "metrics_port",
    "checkpoint_steps",
    "checkpoint_seconds",
}
_RECORDED = ("dataset", "featurization", "training", "identity")  # parts of a run's config.json


class TrainingConfig(Config):
    """Settings of dataset → trained model."""

    task: TaskName = "bulk_modulus"
    """The question; --task all asks each whose labels the dataset has."""
    also: tuple[TaskName, ...] = ()
    """More questions that a network answers at the same time, each where its label is known."""
    threshold: float | None = None
    """Cut between the classes in the label's unit; None takes the task's (85 GPa, 34 GPa, …)."""
    radiation: RadiationName | None = None
    """Whose intensities, where the dataset has several; None: its first."""
    model: ModelName = "pointnet"
    """A network, gradient-boosted trees on a fixed description of the cloud, or a blend of both."""
    members: int = Field(default=1, ge=1, le=100)
    """Models of an ensemble, trained from seed, seed + 1, …; its answer is their mean."""
    init: str | None = None
    """A finished run of the same network, with whose weights this one begins."""
    width: int | None = Field(default=None, ge=16, multiple_of=4)
    """Channels of a network's widest layers; None: 256 for pointnet and harmonic, else 64."""
    trees: int = Field(default=3000, ge=1)
    """Most trees a class of a boosted model; validation stops it earlier."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(default=32, ge=1)
    """Crystals a step, over all workers."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak rate of AdamW, reached after the warm-up and then lowered to 0 by a cosine."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Part of all steps in which the rate rises from 0."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Of AdamW."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Initial weights, order of crystals, rotations. The split does not depend on it."""
    pose: PoseName = "random"
    """Rotations of training clouds, new in each step: all, about the z axis, or none (fixed)."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Part of the groups that chooses the best epoch."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Part of the groups that is only looked at in the end."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the training groups that is used: a point of a learning curve."""
    checkpoint_steps: int = Field(default=500, ge=1)
    """Most steps between checkpoints inside an epoch; each epoch ends with one, too."""
    checkpoint_seconds: float = Field(default=300.0, gt=0)
    """Most seconds between checkpoints inside an epoch."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each interval."""
    workers: int = Field(default=1, ge=1)
    """Processes that share each batch."""
    restarts: int = Field(default=3, ge=0)
    """Times that the workers begin again at their checkpoint after one of them died."""
    metrics_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the loopback network where Prometheus finds metrics of Ray and of its workers."""

    @property
    def in_one_process(self) -> bool:
        """Whether the model is grown, not trained step by step, so that workers cannot share it."""
        return self.model in get_args(BoostedName) or self.model == "blend"

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        grown = self.in_one_process
        if self.workers > 1 and grown:
            raise ValueError(f"workers = {self.workers}: {self.model} trains in one process")
        if self.also and grown:
            raise ValueError(f"also = {list(self.also)}: {self.model} answers one question")
        if len({self.task, *self.also}) <= len(self.also):
            raise ValueError(f"also = {list(self.also)}: each question once, without {self.task}")
        if self.init is not None and grown:
            raise ValueError(f"init = {self.init}: {self.model} has no weights to begin with")
        if self.metrics_port is not None and self.workers == 1:
            raise ValueError(f"metrics_port = {self.metrics_port}: one worker has no Ray")
        if self.batch_size < self.workers:
            raise ValueError(f"{self.workers} workers cannot share batch_size = {self.batch_size}")
        task_of(self.task, self.threshold)
        return self

    def deciding(self) -> dict[str, Any]:
        """What decides the trained model: all but how the work is shared and how often saved."""
        # Older than `pose` are trainings that are still to be resumed; all had random ones.
        young = {"pose"} if self.pose == "random" else set()
        return self.model_dump(mode="json", exclude=NOT_DECIDING | young)

    @property
    def passes(self) -> int:
        """Epochs of a member; trees are grown in one pass."""
        if self.model == "blend":
            return 1 + self.epochs
        return 1 if self.model in get_args(BoostedName) else self.epochs

    @property
    def question(self) -> Task:
        """The task with this configuration's threshold."""
        return task_of(self.task, self.threshold)

    @property
    def questions(self) -> tuple[Task, ...]:
        """All that the model answers; the logits of each follow those of the one before."""
        return (self.question, *(task_of(name) for name in self.also))

    def columns(self, task: str) -> slice:
        """Where the logits of a question are among all of them."""
        ends = list(accumulate(len(each.classes) for each in self.questions))
        place = [each.name for each in self.questions].index(task)
        return slice(ends[place] - len(self.questions[place].classes), ends[place])

    def asking(self, task: TaskName) -> "TrainingConfig":
        """The same about one question alone."""
        threshold = self.threshold if task == self.task else None
        return self.model_copy(update={"task": task, "threshold": threshold, "also": ()})


def recorded(run: Path) -> dict[str, Any]:
    """The content of a run's config.json.

    Raises:
        UserError: no training run, a damaged one, or one of an older version.
    """
    path = run / "config.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{run} is no training run: it has no config.json", remedy="run xtal train first"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}", remedy="put back a copy of it, or train again"
        ) from None
    missing = [n for n in _RECORDED if n not in content] if isinstance(content, dict) else _RECORDED
    if missing:
        raise UserError(
            f"{path} is of an older layout: it has no {', '.join(missing)}",
            remedy="train again, or use the version of xtal that trained it",
        )
    for name in _RECORDED:
        kind, what = (str, "a path") if name == "dataset" else (dict, "an object")
        if not isinstance(content[name], kind):
            raise UserError(
                f"{path} is damaged: {name} = {content[name]!r}, not {what}",
                remedy="put back a copy of it, or train again",
            )
    return content
