"""A grid → its trials, and the trainings that they need.

A training serves several trials: `retrain` and `train_only` of its arm, and that of the reference
all `test_only` trials of its task, model and seed.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ablation.grid import ArmChoice, GridConfig, Mode
from ablation.perturbations import ARMS
from ablation.trials import REFERENCE
from cluster.errors import UserError
from training.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Fit:
    """One training."""

    id: str  # hash of all that decides the model
    arm: str
    strength: float | None
    training: TrainingConfig

    @property
    def title(self) -> str:
        """In words."""
        return " ".join((*_words(self), f"seed {self.training.seed}"))


@dataclass(frozen=True, slots=True)
class Trial:
    """One model meeting one test set: a row of the results."""

    id: str  # hash of all that decides its result
    arm: str
    strength: float | None
    mode: Mode
    fit: Fit

    @property
    def training(self) -> TrainingConfig:
        """The configuration of its model."""
        return self.fit.training

    @property
    def identity(self) -> dict[str, Any]:
        """What its row of the results begins with."""
        return {
            "trial": self.id,
            "task": self.training.task,
            "model": self.training.model,
            "arm": self.arm,
            "strength": self.strength,
            "mode": self.mode,
            "seed": self.training.seed,
        }


def plan(grid: GridConfig, dataset_hash: str) -> list[Trial]:
    """All trials: seeds outermost, so that every condition has a result early, the reference first.

    An arm that only changes how clouds are turned in training has the mode retrain alone.

    Args:
        dataset_hash: content hash of the dataset.

    Raises:
        UserError: settings that do not go together, or trials whose reference is excluded.
    """
    found = list(_trials(grid, dataset_hash))
    references = {_place(trial) for trial in found if trial.arm == REFERENCE}
    for trial in found:
        if _place(trial) not in references:
            raise UserError(
                f"the grid has {trial.fit.title} but not its reference",
                remedy="do not exclude the arm none alone; exclude its task, model or seed",
            )
    if not found:
        raise UserError("the grid has no trial", remedy="exclude less, or give other modes")
    return found


def fits_of(trials: Sequence[Trial]) -> dict[str, Fit]:
    """The trainings behind some trials, by id."""
    return {trial.fit.id: trial.fit for trial in trials}


def _trials(grid: GridConfig, dataset_hash: str) -> Iterator[Trial]:
    arms = sorted(grid.choices, key=lambda arm: arm.name != REFERENCE)
    doses = [(arm, dose) for arm in arms for dose in arm.doses]
    for seed, (arm, dose), model, task in product(
        grid.seeds, doses, grid.all_models, grid.all_tasks
    ):
        for mode in _modes(arm, grid):
            trial = {"task": task, "model": model, "arm": arm.name, "strength": dose}
            trial |= {"mode": mode, "seed": seed}
            if any(exclusion.covers(**trial) for exclusion in grid.exclude):
                continue
            training = grid.training_of(task, model, seed)
            if mode == "test_only":
                fit = _fit(REFERENCE, None, training, dataset_hash)
            else:
                pose = ARMS[arm.name].pose
                own = training.model_copy(update={"pose": pose}) if pose else training
                fit = _fit(arm.name, dose, own, dataset_hash)
            decides = [dataset_hash, arm.name, dose, mode, fit.training.deciding()]
            yield Trial(_hash(decides), arm.name, dose, mode, fit)


def _modes(arm: ArmChoice, grid: GridConfig) -> tuple[Mode, ...]:
    if arm.name == REFERENCE:
        return ("retrain",)
    if ARMS[arm.name].pose is not None:
        return ("retrain",) if "retrain" in grid.modes else ()
    return grid.modes


def _fit(arm: str, strength: float | None, training: TrainingConfig, dataset_hash: str) -> Fit:
    return Fit(_hash([dataset_hash, arm, strength, training.deciding()]), arm, strength, training)


def _place(trial: Trial) -> tuple[str, str, int]:
    return trial.training.task, trial.training.model, trial.training.seed


def _words(fit: Fit) -> tuple[str, ...]:
    dose = () if fit.strength is None else (f"{fit.strength:g}",)
    return fit.training.task, fit.training.model, fit.arm, *dose


def _hash(decides: list[Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
