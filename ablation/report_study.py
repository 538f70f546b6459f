"""What the report shows: one type for grids and for single training runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ablation.catalogue import DatasetPlace
from ablation.trials import Condition, Trials
from training.metrics import IntArray, Interval

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a condition changes in one metric: value − reference, paired over crystals and seeds."""

    condition: Condition
    reference: float
    value: float
    difference: Interval
    seeds: int
    p_holm: float
    verdict: str  # see `ablation.significance.verdict`; "" for metrics that are not tested
    row: Row  # of effects.parquet


@dataclass(frozen=True, slots=True)
class Study:
    """One task: its question, and what was found. Of the grid's first model if not said otherwise.

    Shape legend: C classes.
    """

    task: str
    title: str
    question: str
    classes: tuple[str, ...]
    unit: str
    threshold: float | None
    primary: str
    model: str
    trials: Trials
    metrics: Mapping[Condition, Mapping[str, Interval]]  # of all models
    effects: tuple[Effect, ...]  # of all models and metrics
    contrast: Row | None  # of contrasts.parquet
    losses: tuple[Row, ...]  # of losses.parquet
    confusion: IntArray  # (C, C), rows true, columns predicted; reference, summed over seeds
    class_counts: Mapping[str, Mapping[str, int]]  # split → class → crystals

    @property
    def reference(self) -> Condition | None:
        """The untouched input."""
        return self.trials.reference(self.model)

    def primary_effects(self, model: str | None = None) -> list[Effect]:
        """Effects on the primary metric of one model, the first by default."""
        model = self.model if model is None else model
        return [
            e
            for e in self.effects
            if e.row["metric"] == self.primary and e.condition.model == model
        ]


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows, whatever the kind of folder."""

    kind: Literal["ablation", "run"]
    studies: tuple[Study, ...]  # one a task, in the order of the grid
    models: tuple[str, ...]
    arms: Mapping[str, Row]  # name → family, strength (name of the parameter), unit, description
    results: tuple[Row, ...]  # rows of results.parquet
    planned: int | None  # trials of the whole grid
    history: tuple[Mapping[str, float], ...]  # rows of history.csv
    settings: Mapping[str, Any]
    place: DatasetPlace
    dataset: str
    dataset_summary: Mapping[str, Any]
    provenance: Mapping[str, Any]
    attribution: str

    @property
    def missing(self) -> int:
        """Planned trials without a result."""
        done = sum(row["status"] == "done" for row in self.results)
        return 0 if self.planned is None else max(0, self.planned - done)
