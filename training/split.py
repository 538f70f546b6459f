"""Train, validation and test: decided by a hash of the group, never by a seed.

Every model, seed and ablation arm meets the same test crystals, crystals of one group never
stand on two sides, and a crystal keeps its side when the dataset grows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from training.config import TrainingConfig
from training.dataset import Clouds
from training.tasks import UNKNOWN, Task, TaskName, answerable

SPLITS = ("train", "validation", "test")
_SALT = b"crystal-genome split 1:"
_CURVE_SALT = b"crystal-genome learning curve 1:"  # with the split's, a small part would be empty


def split_of(
    groups_N: Sequence[str], validation_fraction: float, test_fraction: float
) -> NDArray[np.str_]:
    """(N,) names of SPLITS. The test side depends on `test_fraction` alone."""
    position = {group: _position(group, _SALT) for group in set(groups_N)}
    u_N = np.array([position[group] for group in groups_N])
    sides = np.where(u_N < test_fraction, "test", "train")
    return np.where(u_N >= 1.0 - validation_fraction, "validation", sides)


def kept_of(groups_N: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """(N,) whether a crystal's group is in the part; whole groups, about `fraction` of them.

    Decided by a hash of the group alone: a smaller part lies within each larger one, every model
    and seed meets the same parts, and a crystal stays in its part when the dataset grows.

    Raises ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: must be above 0 and at most 1")
    kept = {group: _position(group, _CURVE_SALT) < fraction for group in set(groups_N)}
    return np.array([kept[group] for group in groups_N], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Parts:
    """Rows of the crystals of known class, by split, and the class of every crystal."""

    target_N: Tensor  # int64, UNKNOWN where the label is
    rows: dict[str, Tensor]  # split → int64 rows
    others: dict[TaskName, "Parts"] = field(default_factory=dict)  # the same of `config.also`

    @property
    def learned(self) -> Tensor:
        """Training crystals of which any question's class is known, in order."""
        every = [self, *self.others.values()]
        rows: Tensor = torch.cat([parts.rows["train"] for parts in every]).unique()
        return rows

    def digest(self, ids_N: NDArray[Any]) -> str:
        """Hex SHA-256 over (id, side) of all crystals that are used, in order of id."""
        side_N = np.full(len(ids_N), "", dtype="U10")
        for parts in (self, *self.others.values()):
            for side, rows in parts.rows.items():
                side_N[rows.numpy()] = side
        used = np.flatnonzero(side_N != "")
        used = used[np.argsort(ids_N[used], kind="stable")]
        lines = zip(ids_N[used].tolist(), side_N[used].tolist(), strict=True)
        text = "".join(f"{id}\0{side}\n" for id, side in lines)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def of(cls, data: Clouds, config: TrainingConfig) -> "Parts":
        """Split a dataset for the config's task and, in `others`, for those beside it.

        Raises:
            UserError: the label is not in the dataset, or a class is missing in a split.
        """
        task = config.question
        if task.label == "crystal_system":
            values: Any = data.crystal_systems
        elif task.label in data.labels:
            values = data.labels[task.label]
        else:
            raise UserError(
                f"the dataset has no label {task.label}, which task {task.name} needs; it has "
                f"{', '.join(data.labels) or 'no labels'}",
                remedy=_other_ways(task, list(data.labels)),
            )
        target = task.target(values)
        sides = split_of(list(data.groups), config.validation_fraction, config.test_fraction)
        known = target != UNKNOWN
        dropped = (sides == "train") & ~kept_of(list(data.groups), config.train_fraction)
        rows = {s: np.flatnonzero(known & (sides == s) & ~dropped) for s in SPLITS}
        present = set(np.unique(target[known]).tolist())
        for name, part in rows.items():
            have = set(np.unique(target[part]).tolist())
            if len(have) < 2 or (name == "train" and have != present and not task.edges):
                wanted = present if len(have) > 1 else set(range(len(task.classes)))
                missing = [task.classes[c] for c in sorted(wanted - have)]
                raise UserError(
                    f"{name}: {len(part)} crystals, none of class {', '.join(missing)}",
                    remedy="give more crystals, or another threshold or fraction",
                )
        others = {name: cls.of(data, config.asking(name)) for name in config.also}
        tensors = {name: torch.from_numpy(part) for name, part in rows.items()}
        return cls(torch.from_numpy(target), tensors, others)

    def class_counts(self, classes: tuple[str, ...]) -> dict[str, dict[str, int]]:
        """Split → class → number of crystals."""
        return {
            side: {name: int((self.target_N[rows] == c).sum()) for c, name in enumerate(classes)}
            for side, rows in self.rows.items()
        }


def _other_ways(task: Task, labels: list[str]) -> str:
    """What to do where a dataset lacks the label of a task."""
    if not labels:
        return "choose task crystal_system, which needs none; or featurize crystals with labels"
    ways = f"choose another task: {', '.join(answerable(labels))}"
    if FeaturizationConfig.model_fields["id_prop_label"].default in labels:
        ways += (
            "; or, where id_prop.csv has no header row, name its values: xtal featurize SOURCE "
            f"OUT --label {task.label}"
        )
    return ways


def _position(group: str, salt: bytes) -> float:
    """Uniform in [0, 1), the same on every machine."""
    digest = hashlib.sha256(salt + group.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
