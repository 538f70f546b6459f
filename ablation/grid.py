"""The grid: which trainings an ablation is made of."""

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ablation.perturbations import ARMS
from cluster.config import Config, build_config, read_toml
from cluster.errors import UserError
from training.config import TrainingConfig


class GridConfig(Config):
    """A grid as its TOML file states it: one task, arms × seeds, one training setup."""

    dataset: str
    """Folder that `xtal featurize` wrote; relative paths start at the grid's file."""
    arms: tuple[str, ...] = (
        "none",
        "intensity_binary",
        "intensity_shuffled",
        "intensity_scaled",
        "directions_random",
        "basis_only",
    )
    """Perturbations to compare; must include none, the reference."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is trained once a seed; differences are paired by seed."""
    processes: int = Field(default=0, ge=0)
    """Trials that run side by side; 0 takes one a processor core."""
    training: TrainingConfig = TrainingConfig()
    """Everything else of a training; its seed is set by the grid."""

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arm {', '.join(unknown)}; arms are {', '.join(ARMS)}")
        if "none" not in arms:
            raise ValueError("the reference arm none is missing")
        return _distinct(arms)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
            raise ValueError("at least one seed is needed, none below 0, each less than 2⁶³")
        return _distinct(seeds)


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of the grid."""

    id: str  # hash of all that decides its result
    arm: str
    training: TrainingConfig


def read_grid(path: Path, **overrides: Any) -> GridConfig:
    """Parse and validate a grid file; `overrides` that are not None replace its keys.

    Raises:
        UserError: naming each wrong key or value.
    """
    values = read_toml(path)
    training = values.pop("training", {})
    if not isinstance(training, dict):
        raise UserError(f"{path}: training = {training!r}", remedy="write a table: [training]")
    for key, instead in (("seed", "seeds = [0, 1, 2]"), ("workers", "processes = 2")):
        if key in training:
            raise UserError(
                f"{path}: training.{key} = {training[key]!r} has no place in a grid",
                remedy=f"use {instead} at the top of the file",
            )
    values["training"] = build_config(TrainingConfig, training, where=f"{path} [training]")
    given = {key: value for key, value in overrides.items() if value is not None}
    if "dataset" in values and "dataset" not in given:
        values["dataset"] = str((path.parent / str(values["dataset"])).resolve())
    return build_config(GridConfig, values | given, where=str(path))


def trials(grid: GridConfig, dataset_hash: str) -> list[Trial]:
    """All trials, seeds outermost, so that every arm has a result early."""
    planned = []
    for seed, arm in product(grid.seeds, grid.arms):
        training = grid.training.model_copy(update={"seed": seed})
        decides = [dataset_hash, arm, training.deciding()]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        planned.append(Trial(digest[:16], arm, training))
    return planned


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} names something twice")
    return values
