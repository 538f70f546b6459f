"""`dataset.h5`: HDF5 virtual datasets that show all shards as one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurization.config import FeaturizationConfig
from featurization.shards import (
    content_hash,
    in_memory,
    point_columns,
    set_attributes,
    set_unit,
    write_file,
)


def write_virtual(
    folder: Path, shards: Sequence[dict[str, Any]], config: FeaturizationConfig
) -> None:
    """Write `dataset.h5`, given the manifest's rows of the shards, in their order.

    Only `/offsets` is stored in it, since it must count through all shards. A label that a shard
    does not know reads as NaN. HDF5 shows fill values for a shard that is missing: `verify`.
    """
    counts = np.array([[row["structures"], row["points"]] for row in shards], dtype=np.int64)
    ends = np.concatenate([np.zeros((1, 2), np.int64), counts.cumsum(axis=0)])
    points = point_columns(config)
    labels = sorted({label for row in shards for label in row["labels"]})
    with in_memory(folder / "dataset.h5") as file:
        set_attributes(file, config, content_hash(int(s["content_hash"], 16) for s in shards))
        for group in ("labels", "symmetry"):
            file.create_group(group)
        kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        offsets = np.zeros(ends[-1, 0] + 1, dtype=np.int64)
        for i, row in enumerate(shards):
            with h5py.File(folder / row["file"], "r", locking=False) as part:
                own = part["offsets"][1:]
                kinds = kinds or _columns(part)
            offsets[ends[i, 0] + 1 : ends[i + 1, 0] + 1] = own + ends[i, 1]
        set_unit(file.create_dataset("offsets", data=offsets), "offsets", config)
        kinds |= {f"labels/{label}": (np.dtype(np.float64), ()) for label in labels}
        for name, (dtype, tail) in kinds.items():
            axis = 1 if name in points else 0
            label = name.removeprefix("labels/") if name.startswith("labels/") else None
            sources = [
                (int(ends[i, axis]), int(counts[i, axis]), str(row["file"]))
                for i, row in enumerate(shards)
                if label is None or label in row["labels"]
            ]
            whole = (int(ends[-1, axis]), *tail)
            _create(file, name, dtype, whole, sources, np.nan if label else None)
            set_unit(file[name], name, config)
        write_file(file, folder / "dataset.h5")


def _columns(shard: h5py.File) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type, and shape of an element, of each column but offsets and labels."""
    found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name != "offsets" and not name.startswith("labels/"):
            found[name] = item.dtype, item.shape[1:]

    shard.visititems(visit)
    return found


def _create(
    file: h5py.File,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    sources: Sequence[tuple[int, int, str]],
    fill: float | None,
) -> None:
    """A virtual dataset of (start, length, file) along its first axis.

    As `h5py.VirtualLayout` does it, at a tenth of the time where there are many files.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # equal shards, equal bytes
    if fill is not None:
        properties.set_fill_value(np.array(fill, dtype=dtype))
    space = h5py.h5s.create_simple(shape)
    tail = shape[1:]
    for start, length, source in sources:
        space.select_hyperslab((start, *(0 for _ in tail)), (length, *tail))
        part = h5py.h5s.create_simple((length, *tail))
        properties.set_virtual(space, source.encode(), name.encode(), part)
    kind = h5py.h5t.py_create(dtype, logical=True)
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), dcpl=properties)
