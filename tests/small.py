"""Small sets of clouds and settings for the tests of training and ablation."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config import TrainingConfig
from training.dataset import CloudSet

# A training of about a second on the 140 prototypes of the fixture `clouds`.
TINY: dict[str, Any] = {
    "task": "crystal_system",
    "width": 16,
    "batch_size": 16,
    "epochs": 3,
    "validation_fraction": 0.2,
    "test_fraction": 0.2,
    "resamples": 100,
}


def tiny(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**(TINY | changes))


def epochs_of(run: Path) -> list[dict[str, float]]:
    """The history of a training."""
    with (run / "history.csv").open() as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def same_course(run: Path, other: Path) -> bool:
    """Whether two trainings differ by no more than rounding, epoch by epoch.

    Rounding grows: one worker and two are 1e-5 apart in the first epochs and up to 2 % after 40.
    A count of right answers tells of it sooner, where a crystal is between two classes.
    """
    ours, theirs = epochs_of(run), epochs_of(other)
    rates = [[row["learning_rate"] for row in each] for each in (ours, theirs)]
    if rates[0] != rates[1]:
        return False
    losses = [
        [[row[name] for name in row if "loss" in name] for row in each] for each in (ours, theirs)
    ]
    first = [each[:3] for each in losses]
    return np.allclose(*first, rtol=1e-2) and np.allclose(*losses, rtol=6e-2, atol=1e-3)


def random_set(seed: int, lengths: list[int], *, origin: bool = True) -> CloudSet:
    """Crystals of triclinic random cells; `lengths` stored points each, the first at the origin."""
    random = np.random.default_rng(seed)
    lattices = np.eye(3) * random.uniform(4, 8, (len(lengths), 1, 1))
    lattices = lattices + random.normal(0, 0.4, lattices.shape)
    hkl = np.concatenate([_half(n, origin) for n in lengths])
    crystal = np.repeat(np.arange(len(lengths)), lengths)
    q = np.einsum("pi,pij->pj", hkl, np.linalg.inv(lattices).transpose(0, 2, 1)[crystal])
    intensity = random.lognormal(-3, 2, len(hkl))
    intensity[random.random(len(hkl)) < 0.25] = 0.0
    at_origin = (hkl == 0).all(axis=1)
    intensity[at_origin] = random.uniform(1, 9, int(at_origin.sum()))
    return CloudSet(
        ids=np.array([f"id-{i:03d}" for i in range(len(lengths))]),
        groups=np.array([f"group-{i}" for i in range(len(lengths))]),
        crystal_systems=np.array([("cubic", "triclinic")[i % 2] for i in range(len(lengths))]),
        labels={"bulk_modulus": random.uniform(10, 160, len(lengths))},
        offsets=torch.tensor([0, *np.cumsum(lengths)]),
        hkl_P3=torch.from_numpy(hkl.astype(np.int16)),
        q_P3=torch.from_numpy(q.astype(np.float32)),
        intensity_P=torch.from_numpy(intensity.astype(np.float32)),
        multiplicity_P=torch.from_numpy(np.where(at_origin, 1, 2)),
        lattice_N33=torch.from_numpy(lattices.astype(np.float32)),
    )


def _half(number: int, origin: bool) -> np.ndarray:
    """The `number` shortest hkl of the half that shards store."""
    grid = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    h, k, l = grid.T  # noqa: E741
    half = grid[(l > 0) | ((l == 0) & ((k > 0) | ((k == 0) & (h >= (0 if origin else 1)))))]
    return half[np.argsort((half**2).sum(axis=1), kind="stable")][:number]
