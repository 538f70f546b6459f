"""Shards: ragged clouds as CSR in HDF5, one manifest, and one virtual file over all of them.

Layout of a shard and of `dataset.h5` (N crystals, P stored points of all of them):

| dataset                   | shape, type     | meaning                                           |
|---------------------------|-----------------|---------------------------------------------------|
| /id                       | N, UTF-8        | unique in the dataset                             |
| /group, /formula          | N, UTF-8        | what a split keeps together; reduced formula      |
| /source_index             | N, int64        | position in the source                            |
| /offsets                  | N+1, int64      | points of crystal i are offsets[i] : offsets[i+1] |
| /hkl                      | P×3, int16      | Miller indices of the stored cell                 |
| /q                        | P×3, float32    | 1/Å, crystallographic (no 2π)                     |
| /intensity                | P, float32      | |F|²/V², unit as attribute                        |
| /intensity_NAME           | P, float32      | the same for each of `config.also_radiation`      |
| /multiplicity             | P, uint8        | 2 stands for the pair ±q, 1 for the origin        |
| /lattice                  | N×3×3, float64  | rows a, b, c of the stored cell, Å                |
| /symmetry/number          | N, int16        | space group                                       |
| /symmetry/crystal_system, point_group, bravais | N, UTF-8 |                                     |
| /labels/NAME              | N, float64      | NaN where unknown, unit as attribute              |

File attributes: `format_version`, `config` (JSON), `content_hash`, `attribution`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cluster.files import replacing
from featurization.cells import Symmetry
from featurization.cloud import Cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import LABEL_UNITS, FloatArray
from featurization.manifest import FORMAT_VERSION
from featurization.radiation import UNITS

_TEXT = h5py.string_dtype("utf-8")
_POINT_ARRAYS = ("hkl", "q", "intensity", "multiplicity")  # in the order of Cloud's fields
_ARRAYS = (*_POINT_ARRAYS, "lattice", "source_index", "symmetry/number")
_TEXT_COLUMNS = (
    "id",
    "group",
    "formula",
    "symmetry/crystal_system",
    "symmetry/point_group",
    "symmetry/bravais",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One featurized crystal on its way into a shard."""

    id: str
    group: str
    formula: str
    source_index: int
    cloud: Cloud
    lattice: FloatArray  # (3, 3), Å
    symmetry: Symmetry
    labels: Mapping[str, float]

    @property
    def nbytes(self) -> int:
        """Bytes that the points take in a shard."""
        cloud = self.cloud
        columns = (cloud.hkl, cloud.q, cloud.intensity, cloud.multiplicity, cloud.also)
        return sum(column.nbytes for column in columns)

    def digest(self) -> int:
        """SHA-256 of id, points, cell, symmetry and known labels, as an integer.

        Digests add up modulo 2²⁵⁶ to a hash of a set of crystals that depends neither on their
        order nor on how they are cut into shards.
        """
        known = {k: float(v) for k, v in sorted(self.labels.items()) if np.isfinite(v)}
        head = [self.id, self.group, self.formula, self.symmetry.number, known]
        sha = hashlib.sha256(json.dumps(head, ensure_ascii=False).encode())
        for array, kind in (
            (self.lattice, "<f8"),
            (self.cloud.hkl, "<i2"),
            (self.cloud.q, "<f4"),
            (self.cloud.intensity, "<f4"),
            (self.cloud.multiplicity, "u1"),
            (self.cloud.also, "<f4"),
        ):
            sha.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        return int.from_bytes(sha.digest(), "little")


def content_hash(digests: Iterable[int]) -> str:
    """Hex sum modulo 2²⁵⁶ of digests of crystals, or of content hashes of shards."""
    return f"{sum(digests) % (1 << 256):064x}"


def write_shard(
    path: Path, entries: Sequence[Entry], config: FeaturizationConfig
) -> dict[str, Any]:
    """Write one shard atomically; return its row of the manifest."""
    counts = [len(entry.cloud.hkl) for entry in entries]
    columns: dict[str, NDArray[Any]] = {
        "source_index": np.array([e.source_index for e in entries], dtype=np.int64),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "hkl": np.concatenate([e.cloud.hkl for e in entries]),
        "q": np.concatenate([e.cloud.q for e in entries]),
        "intensity": np.concatenate([e.cloud.intensity for e in entries]),
        "multiplicity": np.concatenate([e.cloud.multiplicity for e in entries]),
        "lattice": np.stack([e.lattice for e in entries]).astype(np.float64),
        "symmetry/number": np.array([e.symmetry.number for e in entries], dtype=np.int16),
    }
    for row, name in enumerate(also_columns(config)):
        columns[name] = np.concatenate([e.cloud.also[row] for e in entries])
    for name in sorted({name for e in entries for name in e.labels}):
        values = [float(e.labels.get(name, np.nan)) for e in entries]
        columns[f"labels/{name}"] = np.array(values, dtype=np.float64)
    texts = {
        "id": [e.id for e in entries],
        "group": [e.group for e in entries],
        "formula": [e.formula for e in entries],
        "symmetry/crystal_system": [e.symmetry.crystal_system for e in entries],
        "symmetry/point_group": [e.symmetry.point_group for e in entries],
        "symmetry/bravais": [e.symmetry.bravais for e in entries],
    }
    hash_of_all = content_hash(entry.digest() for entry in entries)
    with in_memory(path) as file:
        set_attributes(file, config, hash_of_all)
        for name, array in columns.items():
            set_unit(file.create_dataset(name, data=array), name, config)
        for name, text in texts.items():
            file.create_dataset(name, data=text, dtype=_TEXT)
        file.require_group("labels")
        image = write_file(file, path)
    return {
        "file": f"shards/{path.name}",
        "structures": len(entries),
        "points": int(sum(counts)),
        "labels": [name.removeprefix("labels/") for name in columns if name.startswith("labels/")],
        "sha256": hashlib.sha256(image).hexdigest(),
        "content_hash": hash_of_all,
    }


def read_shard(path: Path) -> list[Entry]:
    """All crystals of a shard, as they were written."""
    with h5py.File(path, "r", locking=False) as file:
        texts = {name: file[name].asstr()[:] for name in _TEXT_COLUMNS}
        labels = {name: file["labels"][name][:] for name in file["labels"]}
        arrays = {name: file[name][:] for name in _ARRAYS}
        offsets = file["offsets"][:]
        config = FeaturizationConfig.model_validate_json(file.attrs["config"])
        also = np.array([file[name] for name in also_columns(config)], dtype=np.float32)
    entries = []
    for i in range(len(texts["id"])):
        part = slice(offsets[i], offsets[i + 1])
        points = [*(arrays[name][part] for name in _POINT_ARRAYS), also[..., part]]
        symmetry = Symmetry(
            number=int(arrays["symmetry/number"][i]),
            point_group=texts["symmetry/point_group"][i],
            bravais=texts["symmetry/bravais"][i],
            crystal_system=texts["symmetry/crystal_system"][i],
        )
        entries.append(
            Entry(
                id=texts["id"][i],
                group=texts["group"][i],
                formula=texts["formula"][i],
                source_index=int(arrays["source_index"][i]),
                cloud=Cloud(*points),
                lattice=arrays["lattice"][i],
                symmetry=symmetry,
                labels={n: float(v[i]) for n, v in labels.items() if np.isfinite(v[i])},
            )
        )
    return entries


def read_ids(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Ids and source indices of a shard."""
    with h5py.File(path, "r", locking=False) as file:
        return list(file["id"].asstr()[:]), file["source_index"][:]


def in_memory(path: Path) -> h5py.File:
    """A new file that `write_file` will write to this path.

    HDF5 itself neither locks nor writes on a parallel file system, nor meets a full disk.
    """
    return h5py.File(str(path), "w", driver="core", backing_store=False)


def write_file(file: h5py.File, path: Path) -> bytes:
    """Write a file that was made in memory atomically; return its bytes."""
    file.flush()
    image: bytes = file.id.get_file_image()
    with replacing(path) as temporary:
        temporary.write_bytes(image)
    return image


def set_attributes(file: h5py.File, config: FeaturizationConfig, hash_of_all: str) -> None:
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["config"] = config.model_dump_json()
    file.attrs["content_hash"] = hash_of_all
    file.attrs["attribution"] = "see attribution and sources in manifest.json"


def point_columns(config: FeaturizationConfig) -> tuple[str, ...]:
    """Names of the columns with a row a point."""
    return (*_POINT_ARRAYS, *also_columns(config))


def also_columns(config: FeaturizationConfig) -> list[str]:
    """Datasets of the intensities that `Cloud.also` holds, in the order of its rows."""
    return [f"intensity_{name}" for name in config.also_radiation]


def set_unit(data: h5py.Dataset, name: str, config: FeaturizationConfig) -> None:
    units = {"q": "1/Å", "lattice": "Å", "intensity": f"({UNITS[config.radiation]}/Å³)²"}
    units |= {f"intensity_{kind}": f"({UNITS[kind]}/Å³)²" for kind in config.also_radiation}
    units |= {f"labels/{label}": label_unit for label, label_unit in LABEL_UNITS.items()}
    if name in units:
        data.attrs["units"] = units[name]
