"""What decides a training; with the dataset's content hash, all of it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.config import Config
from featurization.config import RadiationName
from training.tasks import Task, TaskName, task_of

ModelName = Literal["pointnet"]


class TrainingConfig(Config):
    """Settings of dataset → trained model."""

    task: TaskName = "bulk_modulus"
    """The question."""
    threshold: float | None = None
    """Cut between the classes in the label's unit; None takes the task's (85 GPa, 34 GPa, …)."""
    radiation: RadiationName | None = None
    """Whose intensities, where the dataset has several; None: its first."""
    model: ModelName = "pointnet"
    """The network."""
    width: int = Field(default=256, ge=16, multiple_of=4)
    """Channels of the last per-point layer."""
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
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Part of the groups that chooses the best epoch."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Part of the groups that is only looked at in the end."""
    checkpoint_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints inside an epoch; each epoch ends with one, too."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each interval."""
    workers: int = Field(default=1, ge=1)
    """Processes that share each batch."""

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.batch_size < self.workers:
            raise ValueError(f"{self.workers} workers cannot share batch_size = {self.batch_size}")
        task_of(self.task, self.threshold)
        return self

    def deciding(self) -> dict[str, Any]:
        """What decides the trained model: all but how the work is shared and how often saved."""
        return self.model_dump(exclude={"workers", "checkpoint_steps"})

    @property
    def question(self) -> Task:
        """The task with this configuration's threshold."""
        return task_of(self.task, self.threshold)
