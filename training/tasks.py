"""The questions: label → class, with thresholds and units."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featurization.cells import CRYSTAL_SYSTEMS

TaskName = Literal["crystal_system", "bulk_modulus", "shear_modulus", "band_gap", "stability"]
UNKNOWN = -1  # class of a crystal whose label is not known


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task; binary tasks cut a scalar label at a threshold."""

    name: str
    title: str
    label: str  # column of the dataset: "crystal_system" or a name under /labels
    classes: tuple[str, ...]
    threshold: float | None = None
    unit: str = ""
    positive_above: bool = True  # class 1 is label > threshold; otherwise label ≤ threshold

    @property
    def question(self) -> str:
        """The task as a question with its threshold and unit."""
        if self.threshold is None:
            return f"which {self.title}?"
        sign = ">" if self.positive_above else "≤"
        return f"{self.classes[1]} ({self.title} {sign} {self.threshold:g} {self.unit})?"

    def target(self, values_N: NDArray[np.float64] | NDArray[np.str_]) -> NDArray[np.int64]:
        """(N,) labels → (N,) classes; NaN gives UNKNOWN."""
        if self.threshold is None:
            index = {name: i for i, name in enumerate(self.classes)}
            return np.array([index[str(value)] for value in values_N], dtype=np.int64)
        values = np.asarray(values_N, dtype=np.float64)
        above = values > self.threshold
        classes = (above if self.positive_above else ~above).astype(np.int64)
        return np.where(np.isfinite(values), classes, UNKNOWN)


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
