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

from cluster.errors import UserError
from cluster.files import replacing, sha256_of
from featurization.cells import Symmetry
from featurization.cloud import Cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import ATTRIBUTION, LABEL_UNITS, FloatArray
from featurization.radiation import UNITS

FORMAT_VERSION = 1
# What readers rely on, and its types.
_MANIFEST = {
    "structures": int,
    "rejected": int,
    "points": int,
    "content_hash": str,
    "config": dict,
    "source": dict,
    "source_spec": str,
    "shards": list,
}
_MANIFEST_ROW = {"file": str, "structures": int, "points": int, "sha256": str, "content_hash": str}
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
    with replacing(path) as temporary:
        with h5py.File(temporary, "w") as file:
            _set_attributes(file, config, hash_of_all)
            for name, array in columns.items():
                _set_unit(file.create_dataset(name, data=array), name, config)
            for name, text in texts.items():
                file.create_dataset(name, data=text, dtype=_TEXT)
            file.require_group("labels")
        checksum = sha256_of(temporary)
    return {
        "file": f"shards/{path.name}",
        "structures": len(entries),
        "points": int(sum(counts)),
        "sha256": checksum,
        "content_hash": hash_of_all,
    }


def read_shard(path: Path) -> list[Entry]:
    """All crystals of a shard, as they were written."""
    with h5py.File(path, "r") as file:
        texts = {name: file[name].asstr()[:] for name in _TEXT_COLUMNS}
        labels = {name: file["labels"][name][:] for name in file["labels"]}
        arrays = {name: file[name][:] for name in _ARRAYS}
        offsets = file["offsets"][:]
    entries = []
    for i in range(len(texts["id"])):
        part = slice(offsets[i], offsets[i + 1])
        cloud = Cloud(*(arrays[name][part] for name in _POINT_ARRAYS))
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
                cloud=cloud,
                lattice=arrays["lattice"][i],
                symmetry=symmetry,
                labels={n: float(v[i]) for n, v in labels.items() if np.isfinite(v[i])},
            )
        )
    return entries


def write_virtual(
    folder: Path, shards: Sequence[dict[str, Any]], config: FeaturizationConfig
) -> None:
    """Write `dataset.h5`: HDF5 virtual datasets that show all shards as one file.

    Only `/offsets` is stored in it, since it must count through all shards. A label that a shard
    does not know reads as NaN. HDF5 shows fill values for a shard that is missing: `verify`.
    """
    lengths = {"N": [s["structures"] for s in shards], "P": [s["points"] for s in shards]}
    starts = {axis: np.concatenate([[0], np.cumsum(n)]).astype(int) for axis, n in lengths.items()}
    offsets = [np.zeros(1, dtype=np.int64)]
    shapes: dict[str, tuple[Any, tuple[int, ...], list[int]]] = {}
    for i, shard in enumerate(shards):
        with h5py.File(folder / shard["file"], "r") as file:
            offsets.append(file["offsets"][1:] + starts["P"][i])
            for name in (*_ARRAYS, *_TEXT_COLUMNS, *(f"labels/{n}" for n in file["labels"])):
                data = file[name]
                shapes.setdefault(name, (data.dtype, data.shape[1:], []))[2].append(i)
    with replacing(folder / "dataset.h5") as temporary, h5py.File(temporary, "w") as file:
        _set_attributes(file, config, content_hash(int(s["content_hash"], 16) for s in shards))
        file.require_group("labels")
        _set_unit(file.create_dataset("offsets", data=np.concatenate(offsets)), "offsets", config)
        for name, (dtype, tail, holders) in sorted(shapes.items()):
            axis = "P" if name in _POINT_ARRAYS else "N"
            layout = h5py.VirtualLayout((starts[axis][-1], *tail), dtype=dtype)
            for i in holders:
                source = h5py.VirtualSource(
                    shards[i]["file"], name, shape=(lengths[axis][i], *tail), dtype=dtype
                )
                layout[starts[axis][i] : starts[axis][i + 1]] = source
            fill = np.nan if name.startswith("labels/") else None
            _set_unit(file.create_virtual_dataset(name, layout, fillvalue=fill), name, config)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished dataset.

    Raises:
        UserError: there is none, or it is of another format version.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_kinds(manifest, _MANIFEST)
            for row in manifest["shards"]:
                _check_kinds(row, _MANIFEST_ROW)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is no finished dataset: it has no manifest.json",
            remedy="run xtal featurize SOURCE OUT and give OUT here",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest: {error!r}", remedy="featurize into a new folder"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}",
            remedy="featurize again with this version",
        )
    return manifest


def _check_kinds(values: dict[str, Any], kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise TypeError(f"{name} is {values[name]!r}, must be {kind.__name__}")


def _set_attributes(file: h5py.File, config: FeaturizationConfig, hash_of_all: str) -> None:
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["config"] = config.model_dump_json()
    file.attrs["content_hash"] = hash_of_all
    file.attrs["attribution"] = ATTRIBUTION


def _set_unit(data: h5py.Dataset, name: str, config: FeaturizationConfig) -> None:
    unit = UNITS[config.radiation]
    units = {"q": "1/Å", "lattice": "Å", "intensity": f"({unit}/Å³)²"}
    units |= {f"labels/{label}": label_unit for label, label_unit in LABEL_UNITS.items()}
    if name in units:
        data.attrs["units"] = units[name]
