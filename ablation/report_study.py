"""What the report shows: one type for ablation folders and for single training runs.

Shape legend: N test crystals, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from training.metrics import IntArray, Interval

REFERENCE = "none"
"""Arm whose input is untouched."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What one arm changes in one metric: value − reference, paired over crystals and seeds."""

    reference: float
    value: float
    difference: Interval
    seeds: int


@dataclass(frozen=True, slots=True)
class Trial:
    """Predictions of one trained network on the test crystals."""

    arm: str
    seed: int
    ids: tuple[str, ...]  # (N,)
    labels: NDArray[np.int64]  # (N,), class index
    probabilities: NDArray[np.float64]  # (N, C)


@dataclass(frozen=True, slots=True)
class Study:
    """All that the page shows, whatever the kind of folder."""

    kind: Literal["ablation", "run"]
    task: str
    title: str
    question: str
    classes: tuple[str, ...]
    unit: str
    threshold: float | None
    primary: str
    arms: tuple[str, ...]  # with results, in the order of the grid; a run has only "none"
    trials: tuple[Trial, ...]
    metrics: Mapping[str, Mapping[str, Interval]]  # arm → metric → interval
    effects: Mapping[str, Mapping[str, Effect]]  # arm → metric → effect
    confusion: IntArray  # (C, C), rows true, columns predicted; reference, summed over seeds
    class_counts: Mapping[str, Mapping[str, int]]  # split → class → crystals
    arm_descriptions: Mapping[str, str]
    results: tuple[Mapping[str, Any], ...]  # rows of results.parquet
    history: tuple[Mapping[str, float], ...]  # rows of history.csv
    settings: Mapping[str, Any]
    dataset: str
    dataset_summary: Mapping[str, Any]
    provenance: Mapping[str, Any]
    attribution: str

    def of_arm(self, arm: str) -> tuple[Trial, ...]:
        """Trials of one arm in the order of their seeds."""
        return tuple(sorted((t for t in self.trials if t.arm == arm), key=lambda t: t.seed))
