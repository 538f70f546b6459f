"""The questions: label → class, with thresholds and units."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featurization.crystal import CRYSTAL_SYSTEMS

TaskName = Literal[
    "crystal_system",
    "bulk_modulus",
    "shear_modulus",
    "band_gap",
    "stability",
    "log_bulk_modulus",
    "log_shear_modulus",
]
UNKNOWN = -1  # class of a crystal whose label is not known


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task.

    Binary tasks cut a scalar label at a threshold; tasks with edges ask for the scalar itself, by
    bins of its base-10 logarithm (`training.numbers`).
    """

    name: str
    title: str
    label: str  # column of the dataset: "crystal_system" or a name under /labels
    classes: tuple[str, ...]
    threshold: float | None = None
    unit: str = ""
    positive_above: bool = True  # class 1 is label > threshold; otherwise label ≤ threshold
    edges: tuple[float, ...] = ()  # of the bins, one more than classes; beyond counts in the last

    @property
    def question(self) -> str:
        """The task as a question with its threshold and unit."""
        if self.edges:
            return f"which {self.title}, as log₁₀ of {self.unit}?"
        if self.threshold is None:
            return f"which {self.title}?"
        sign = ">" if self.positive_above else "≤"
        return f"{self.classes[1]} ({self.title} {sign} {self.threshold:g} {self.unit})?"

    def target(self, values_N: NDArray[np.float64] | NDArray[np.str_]) -> NDArray[np.int64]:
        """(N,) labels → (N,) classes; NaN gives UNKNOWN, as with edges do labels ≤ 0."""
        if self.edges:
            bins = np.searchsorted(self.edges[1:-1], values := self.values(values_N), side="right")
            return np.where(np.isfinite(values), bins, UNKNOWN)
        if self.threshold is None:
            index = {name: i for i, name in enumerate(self.classes)}
            return np.array([index[str(value)] for value in values_N], dtype=np.int64)
        values = np.asarray(values_N, dtype=np.float64)
        above = values > self.threshold
        classes = (above if self.positive_above else ~above).astype(np.int64)
        return np.where(np.isfinite(values), classes, UNKNOWN)

    def values(self, labels_N: NDArray[Any]) -> NDArray[np.float64]:
        """(N,) base-10 logarithms; NaN where there is none."""
        labels = np.asarray(labels_N, dtype=np.float64)
        positive = np.isfinite(labels) & (labels > 0)
        return np.log10(labels, where=positive, out=np.full(labels.shape, np.nan))


def _number(name: TaskName, title: str, label: str, unit: str, first: int, last: int) -> Task:
    """A task by bins of a tenth of a decade, from 10^(first/10) to 10^(last/10) of the unit."""
    tenths = range(first, last)
    classes = tuple(f"{10 ** (t / 10):.3g}–{10 ** ((t + 1) / 10):.3g} {unit}" for t in tenths)
    edges = tuple(t / 10 for t in (*tenths, last))
    return Task(name, title, label, classes, unit=unit, edges=edges)


# Thresholds of Wang et al. (arXiv 2101.01773), section "Results".
TASKS: dict[TaskName, Task] = {
    "crystal_system": Task("crystal_system", "crystal system", "crystal_system", CRYSTAL_SYSTEMS),
    "bulk_modulus": Task(
        "bulk_modulus", "bulk modulus", "bulk_modulus", ("soft", "stiff"), 85.0, "GPa"
    ),
    "shear_modulus": Task(
        "shear_modulus", "shear modulus", "shear_modulus", ("soft", "stiff"), 34.0, "GPa"
    ),
    "band_gap": Task("band_gap", "band gap", "band_gap", ("metal", "insulator"), 0.001, "eV"),
    "stability": Task(
        "stability",
        "energy above hull",
        "energy_above_hull",
        ("unstable", "stable"),
        0.02,
        "eV/atom",
        positive_above=False,
    ),
    "log_bulk_modulus": _number("log_bulk_modulus", "bulk modulus", "bulk_modulus", "GPa", 3, 27),
    "log_shear_modulus": _number(
        "log_shear_modulus", "shear modulus", "shear_modulus", "GPa", 0, 27
    ),
}


def answerable(labels: Sequence[str]) -> list[TaskName]:
    """The tasks that a dataset of these labels has answers to; crystal system, always, as last."""
    return [
        *(
            name
            for name, task in TASKS.items()
            if task.label in labels and task.threshold is not None
        ),
        "crystal_system",
    ]


def task_of(name: TaskName, threshold: float | None = None) -> Task:
    """The task, with its default threshold or another one.

    Raises:
        ValueError: a threshold for a task that has none.
    """
    task = TASKS[name]
    if threshold is None:
        return task
    if task.threshold is None:
        raise ValueError(f"threshold = {threshold}: {name} has no threshold")
    return replace(task, threshold=threshold)
