"""The dataset of some results: where it is now, and what it says of its crystals besides clouds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from training.metrics import FloatArray, IntArray

# Of a manifest, what results say of their dataset.
SUMMARY = ("sources", "structures", "rejected", "points", "content_hash", "config")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Columns over the N crystals of a dataset, in order of id."""

    ids: NDArray[np.str_]  # (N,)
    groups: NDArray[np.str_]  # (N,)
    formulas: NDArray[np.str_]  # (N,), reduced
    crystal_systems: NDArray[np.str_]  # (N,)
    bravais: NDArray[np.str_]  # (N,), such as cF
    numbers: IntArray  # (N,), space group
    volumes: FloatArray  # (N,), of the stored cell, Å³
    forward: FloatArray  # (N,), |F(000)|/V as stored; NaN where the origin is not
    radiation: str

    def rows_of(self, ids: list[str]) -> IntArray:
        """Row of each id, −1 where the dataset has none."""
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == np.asarray(ids), place, -1)


def read_catalogue(shards: Sequence[Path], radiation: str) -> Catalogue:
    """Read all crystals of a finished dataset.

    Raises:
        OSError, KeyError: a shard cannot be read.
    """
    texts: dict[str, list[NDArray[np.str_]]] = {}
    numbers: list[IntArray] = []
    volumes: list[FloatArray] = []
    forward: list[FloatArray] = []
    for path in shards:
        with h5py.File(path, "r", locking=False) as file:
            for name in ("id", "group", "formula", "symmetry/crystal_system", "symmetry/bravais"):
                texts.setdefault(name, []).append(file[name].asstr()[:].astype(np.str_))
            numbers.append(file["symmetry/number"][:].astype(np.int64))
            volumes.append(np.abs(np.linalg.det(file["lattice"][:])))
            offsets = file["offsets"][:]
            origin = np.flatnonzero((file["hkl"][:] == 0).all(axis=1))
            at_origin = np.full(len(offsets) - 1, np.nan)
            owner = np.searchsorted(offsets, origin, side="right") - 1
            at_origin[owner] = np.sqrt(file["intensity"][:][origin])
            forward.append(at_origin)
    columns = {name: np.concatenate(parts) for name, parts in texts.items()}
    order = np.argsort(columns["id"], kind="stable")
    return Catalogue(
        ids=columns["id"][order],
        groups=columns["group"][order],
        formulas=columns["formula"][order],
        crystal_systems=columns["symmetry/crystal_system"][order],
        bravais=columns["symmetry/bravais"][order],
        numbers=np.concatenate(numbers)[order],
        volumes=np.concatenate(volumes)[order],
        forward=np.concatenate(forward)[order],
        radiation=radiation,
    )


@dataclass(frozen=True, slots=True)
class DatasetPlace:
    """A dataset, or in words why there is none."""

    root: Path | None
    catalogue: Catalogue | None
    shards: tuple[Path, ...]
    problem: str
    summary: Mapping[str, Any]  # what its manifest says of it


def find_dataset(
    folder: Path, named: str, summary: Mapping[str, Any], dataset: Path | None
) -> DatasetPlace:
    """Find and check the dataset of a folder of results; what is missing or broken is a `problem`.

    Args:
        folder: a relative `named` is tried from here, too.
        named: path of the dataset that the results name.
        summary: what the results say of it; another `content_hash` is another dataset.
        dataset: overrides `named`.
    """
    if dataset is None and not named:
        return _none("The dataset is not named.")
    wanted = [dataset] if dataset else [Path(named), folder / named]
    root = next((path for path in wanted if (path / "manifest.json").is_file()), None)
    if root is None:
        return _none(f"The dataset “{wanted[0].name}” was not found.")
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        shards = tuple(root / str(shard["file"]) for shard in manifest["shards"])
        if not all(path.resolve().is_relative_to(root.resolve()) for path in shards):
            raise ValueError("a shard lies outside the dataset")
        known = summary.get("content_hash")
        if known is not None and manifest.get("content_hash", known) != known:
            return _none(
                f"The dataset “{root.name}” has other content than the one of these results."
            )
        found = {name: manifest[name] for name in SUMMARY if name in manifest}
        catalogue = read_catalogue(shards, str(manifest["config"]["radiation"]))
        return DatasetPlace(root, catalogue, shards, "", found)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".replace(str(root), root.name)
        return _none(f"The dataset “{root.name}” could not be read ({reason}).")


def _none(problem: str) -> DatasetPlace:
    return DatasetPlace(None, None, (), problem, {})
