"""Shards → tensors, and tensors → batches, without a Python loop over crystals.

Shape legend of this package: N crystals of a set, B crystals of a batch, P points (packed: the
points of all crystals one after the other, no padding), C channels or classes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import memory
from cluster.errors import UserError
from featurization.config import FeaturizationConfig, RadiationName
from featurization.manifest import read_manifest
from featurization.shards import Entry
from training.mapped import MappedColumns, check, reading

POINT_BYTES = 30  # of a stored point in memory
_POINTS = ("hkl_P3", "q_P3", "intensity_P", "multiplicity_P")


@dataclass(frozen=True, slots=True)
class CloudBatch:
    """Whole clouds, both Friedel mates, packed."""

    q_P3: Tensor  # 1/Å
    intensity_P: Tensor  # |F|²/V²
    lengths_B: Tensor  # int64, points of each crystal

    def rotated(self, rotations_B33: Tensor) -> "CloudBatch":
        """Each cloud turned by its own rotation."""
        rotations_P33 = torch.repeat_interleave(rotations_B33, self.lengths_B, dim=0)
        turned_P3 = torch.einsum("pij,pj->pi", rotations_P33, self.q_P3)
        return CloudBatch(turned_P3, self.intensity_P, self.lengths_B)

    def to(self, device: torch.device) -> "CloudBatch":
        """The batch on another device."""
        tensors = (self.q_P3, self.intensity_P, self.lengths_B)
        return CloudBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True, slots=True)
class CloudSet:
    """A set of clouds in memory as stored: one point of each Friedel pair, in order of id."""

    ids: NDArray[np.str_]  # (N,)
    groups: NDArray[np.str_]  # (N,)
    crystal_systems: NDArray[np.str_]  # (N,)
    labels: dict[str, NDArray[np.float64]]  # name → (N,), NaN where unknown
    offsets: Tensor  # (N+1,) int64
    hkl_P3: Tensor  # int16
    q_P3: Tensor  # float32, 1/Å
    intensity_P: Tensor  # float32, |F|²/V²
    multiplicity_P: Tensor  # int64, 2 for a pair ±q
    lattice_N33: Tensor  # float32, Å

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def crystal_P(self) -> Tensor:
        """Index of the crystal that each stored point belongs to."""
        crystals = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(crystals, self.offsets.diff())

    def subset(self, rows: NDArray[Any]) -> "CloudSet":
        """The crystals of an index or boolean array."""
        rows = np.arange(len(self))[rows]
        rows_N = torch.from_numpy(rows).to(self.offsets.device)
        points, lengths = self._points(rows_N)
        return CloudSet(
            ids=self.ids[rows],
            groups=self.groups[rows],
            crystal_systems=self.crystal_systems[rows],
            labels={name: values[rows] for name, values in self.labels.items()},
            offsets=ends_of(lengths),
            hkl_P3=self.hkl_P3[points],
            q_P3=self.q_P3[points],
            intensity_P=self.intensity_P[points],
            multiplicity_P=self.multiplicity_P[points],
            lattice_N33=self.lattice_N33[rows_N],
        )

    def batch(self, rows_B: Tensor) -> CloudBatch:
        """Whole clouds of the crystals `rows_B` (int64), Friedel mates added."""
        points, lengths = self._points(rows_B)
        multiplicity = self.multiplicity_P[points]
        full = torch.repeat_interleave(points, multiplicity)
        # The second copy of a pair is the mate at −q.
        first = torch.repeat_interleave(multiplicity.cumsum(0) - multiplicity, multiplicity)
        sign = torch.where(torch.arange(len(full), device=full.device) == first, 1.0, -1.0)
        ends = ends_of(multiplicity)
        return CloudBatch(
            q_P3=self.q_P3[full] * sign[:, None],
            intensity_P=self.intensity_P[full],
            lengths_B=ends[lengths.cumsum(0)] - ends[lengths.cumsum(0) - lengths],
        )

    def _points(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the stored points of some crystals, and how many each has."""
        starts = self.offsets[rows_B]
        lengths = self.offsets[rows_B + 1] - starts
        within = torch.arange(int(lengths.sum()), device=lengths.device)
        within -= torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        return torch.repeat_interleave(starts, lengths) + within, lengths


def ends_of(lengths: Tensor) -> Tensor:
    """0 and where each of consecutive parts of these lengths ends; int64, one longer."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


@dataclass(frozen=True, slots=True)
class MappedSet:
    """A set of clouds of which only what is not points is in memory (some 300 bytes a crystal)."""

    ids: NDArray[np.str_]  # as in `CloudSet`
    groups: NDArray[np.str_]
    crystal_systems: NDArray[np.str_]
    labels: dict[str, NDArray[np.float64]]
    offsets: Tensor
    lattice_N33: Tensor
    columns: MappedColumns
    shard_N: NDArray[np.int64]  # where the points of each crystal lie
    first_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, rows: NDArray[Any]) -> CloudSet:
        """The crystals of an index or boolean array, in memory."""
        rows = np.arange(len(self))[rows]
        lengths_B = self.offsets.diff()[rows]
        points = self.columns.gather(self.shard_N[rows], self.first_N[rows], lengths_B.numpy())
        return CloudSet(
            ids=self.ids[rows],
            groups=self.groups[rows],
            crystal_systems=self.crystal_systems[rows],
            labels={name: values[rows] for name, values in self.labels.items()},
            offsets=ends_of(lengths_B),
            lattice_N33=self.lattice_N33[torch.from_numpy(rows)],
            **dict(zip(_POINTS, map(torch.from_numpy, points.values()), strict=True)),
        )

    def batch(self, rows_B: Tensor) -> CloudBatch:
        """As that of `CloudSet`."""
        return self.subset(rows_B.numpy()).batch(torch.arange(len(rows_B)))


Clouds = CloudSet | MappedSet


def open_clouds(folder: Path, radiation: RadiationName | None = None, sharers: int = 1) -> Clouds:
    """All clouds of a finished dataset: in memory if they take at most half of what is free there.

    What is read into memory is compared with its checksum; mapped shards are not (`xtal verify`).

    Args:
        radiation: as in `load`.
        sharers: processes of this machine that each open them.

    Raises:
        UserError: as `load`.
    """
    mapped = map_clouds(folder, radiation)
    size = POINT_BYTES * int(mapped.offsets[-1])
    return mapped if sharers * size > memory.available() // 2 else _read(folder, mapped)


def load(folder: str | Path, radiation: RadiationName | None = None) -> CloudSet:
    """All clouds of a finished dataset in memory, in order of id.

    Args:
        radiation: whose intensities, of those that the dataset has; None: its first.

    Raises:
        UserError: no manifest, a damaged shard, or no such radiation in the dataset.
    """
    folder = Path(folder)
    return _read(folder, map_clouds(folder, radiation))


def _read(folder: Path, mapped: MappedSet) -> CloudSet:
    for row in read_manifest(folder)["shards"]:
        check(folder / row["file"], row["sha256"])
    return in_memory(mapped)


def in_memory(data: Clouds) -> CloudSet:
    """The set itself, its points read."""
    return data if isinstance(data, CloudSet) else data.subset(np.arange(len(data)))


def map_clouds(folder: Path, radiation: RadiationName | None = None) -> MappedSet:
    """All clouds of a finished dataset, their points in the shards, in order of id.

    The order makes training independent of how the dataset was cut into shards.

    Args and errors are those of `load`.
    """
    manifest = read_manifest(folder)
    config = manifest["config"]
    place = _place((config["radiation"], *config["also_radiation"]), radiation, str(folder))
    intensity = f"intensity_{radiation}" if place else "intensity"
    parts: dict[str, list[NDArray[Any]]] = {}
    labels: list[dict[str, NDArray[np.float64]]] = []
    for number, row in enumerate(manifest["shards"]):
        with reading(folder / row["file"]) as file:
            for name in ("id", "group", "symmetry/crystal_system"):
                parts.setdefault(name, []).append(file[name].asstr()[:].astype(np.str_))
            offsets = file["offsets"][:]
            labels.append({name: file["labels"][name][:] for name in file["labels"]})
            parts.setdefault("lattice", []).append(file["lattice"][:].astype(np.float32))
        parts.setdefault("first", []).append(offsets[:-1])
        parts.setdefault("length", []).append(np.diff(offsets))
        parts.setdefault("shard", []).append(np.full(len(offsets) - 1, number))
    order = np.argsort(np.concatenate(parts["id"]), kind="stable")
    columns = {name: np.concatenate(part)[order] for name, part in parts.items()}
    joined = _join_labels(labels, [len(part) for part in parts["id"]])
    types: dict[str, Any] = {
        "hkl": np.int16,
        "q": np.float32,
        intensity: np.float32,
        "multiplicity": np.int64,
    }
    return MappedSet(
        ids=columns["id"],
        groups=columns["group"],
        crystal_systems=columns["symmetry/crystal_system"],
        labels={name: values[order] for name, values in joined.items()},
        offsets=ends_of(torch.from_numpy(columns["length"])),
        lattice_N33=torch.from_numpy(columns["lattice"]),
        columns=MappedColumns([folder / row["file"] for row in manifest["shards"]], types),
        shard_N=columns["shard"],
        first_N=columns["first"],
    )


def cloud_set(
    entries: Sequence[Entry], config: FeaturizationConfig, radiation: RadiationName | None = None
) -> CloudSet:
    """Clouds that were featurized a moment ago, in the order given and without labels.

    Args:
        entries: at least one.
        config: what they were featurized with.
        radiation: as in `load`.

    Raises:
        UserError: no such radiation in `config`.
    """
    place = _place((config.radiation, *config.also_radiation), radiation, "the featurization")
    clouds = [entry.cloud for entry in entries]
    lengths = torch.tensor([len(cloud.hkl) for cloud in clouds])
    points: dict[str, list[NDArray[Any]]] = {
        "hkl_P3": [cloud.hkl for cloud in clouds],
        "q_P3": [cloud.q for cloud in clouds],
        "intensity_P": [c.also[place - 1] if place else c.intensity for c in clouds],
        "multiplicity_P": [cloud.multiplicity.astype(np.int64) for cloud in clouds],
    }
    return CloudSet(
        ids=np.array([entry.id for entry in entries], dtype=np.str_),
        groups=np.array([entry.group for entry in entries], dtype=np.str_),
        crystal_systems=np.array([e.symmetry.crystal_system for e in entries], dtype=np.str_),
        labels={},
        offsets=ends_of(lengths),
        lattice_N33=torch.from_numpy(np.stack([entry.lattice for entry in entries])).float(),
        **{name: torch.from_numpy(np.concatenate(part)) for name, part in points.items()},
    )


def _place(radiations: Sequence[RadiationName], radiation: RadiationName | None, where: str) -> int:
    """Where a radiation stands among those of a dataset; None is the first."""
    if radiation is None:
        return 0
    if radiation not in radiations:
        raise UserError(
            f"{where} has no intensities of radiation {radiation}",
            remedy=f"it has {', '.join(radiations)}; featurize with --radiation {radiation}",
        )
    return radiations.index(radiation)


def _join_labels(
    parts: Sequence[dict[str, NDArray[np.float64]]], sizes: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    names = sorted({name for part in parts for name in part})
    return {
        name: np.concatenate(
            [part.get(name, np.full(n, np.nan)) for part, n in zip(parts, sizes, strict=True)]
        )
        for name in names
    }
