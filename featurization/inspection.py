"""What a dataset holds, and what one of its crystals diffracts: reflections and powder pattern.

A summary reads a few numbers a crystal; one crystal is found by reading nothing but the column of
ids, in blocks.
"""

import difflib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import moyopy
import numpy as np
from numpy.typing import NDArray

from cluster.config import build_config
from cluster.errors import UserError
from featurization.attribution import attribution
from featurization.cells import symmetry_of
from featurization.config import FeaturizationConfig
from featurization.crystal import CRYSTAL_SYSTEMS
from featurization.manifest import read_manifest
from featurization.reflections import Diffraction, powder, reflections

# Ids that are in memory at a time.
_BLOCK = 1 << 16


def inspect_dataset(folder: Path) -> dict[str, Any]:
    """What is inside a finished dataset, as JSON can write it.

    Raises:
        UserError: no dataset, or a damaged one.
    """
    manifest = read_manifest(folder)
    with _opened(folder, manifest) as file:
        points = np.diff(file["offsets"][:])
        groups = Counter(file["symmetry/number"][:].tolist())
        labels = {
            name: _range(data[:]) | {"unit": str(data.attrs.get("units", ""))}
            for name, data in sorted(file["labels"].items())
        }
    systems = Counter[str]()
    for number, count in groups.items():
        systems[symmetry_of(number).crystal_system] += count
    return {
        "dataset": str(folder),
        "structures": manifest["structures"],
        "points": manifest["points"],
        "points_a_crystal": _range(points),
        "config": manifest["config"],
        "sources": manifest["sources"],
        "crystal_systems": {name: systems[name] for name in CRYSTAL_SYSTEMS},
        "space_groups": [
            {"number": number, "symbol": space_group(number), "structures": count}
            for number, count in groups.most_common()
        ],
        "labels": labels,
        "rejected": manifest["rejected"],
        "reject_stages": manifest.get("reject_stages", {}),
        "shards": len(manifest["shards"]),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "content_hash": manifest["content_hash"],
        "provenance": manifest.get("provenance", {}),
        "attribution": attribution(manifest["sources"]),
    }


def read_diffraction(folder: str | Path, id: str) -> Diffraction:
    """One crystal of a finished dataset.

    Raises:
        UserError: no dataset, a damaged one, or no crystal of this id; names the nearest ids.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    where = f"config in {folder / 'manifest.json'}"
    config = build_config(FeaturizationConfig, manifest["config"], where=where)
    with _opened(folder, manifest) as file:
        row = _row(file["id"], id, folder)
        start, end = file["offsets"][row : row + 2]
        part = slice(int(start), int(end))
        hkl = file["hkl"][part].astype(np.int64)
        intensity = file["intensity"][part].astype(np.float64)
        at_origin = (hkl == 0).all(axis=1)
        values = {name: float(data[row]) for name, data in sorted(file["labels"].items())}
        return Diffraction(
            id=id,
            formula=file["formula"].asstr()[row],
            config=config,
            lattice=file["lattice"][row],
            symmetry=symmetry_of(int(file["symmetry/number"][row])),
            labels={name: value for name, value in values.items() if np.isfinite(value)},
            label_units={n: str(file["labels"][n].attrs.get("units", "")) for n in values},
            unit=str(file["intensity"].attrs["units"]),
            hkl=hkl[~at_origin],
            intensity=intensity[~at_origin],
            others={
                name.removeprefix("intensity_"): file[name][part].astype(np.float64)[~at_origin]
                for name in file
                if name.startswith("intensity_")
            },
            origin=float(intensity[at_origin][0]) if at_origin.any() else None,
        )


def inspect_crystal(one: Diffraction) -> dict[str, Any]:
    """All of one crystal as JSON can write it; the reflections of `reflections`."""
    lengths = np.linalg.norm(one.lattice, axis=1)
    unit = one.lattice / lengths[:, None]
    cosines = [unit[1] @ unit[2], unit[2] @ unit[0], unit[0] @ unit[1]]
    angles = np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
    names = ("a", "b", "c", "alpha", "beta", "gamma")
    cell = dict(zip(names, [*lengths.tolist(), *angles.tolist()], strict=True))
    return {
        "id": one.id,
        "formula": one.formula,
        "space_group": {
            "number": one.symmetry.number,
            "symbol": space_group(one.symmetry.number),
            "point_group": one.symmetry.point_group,
            "crystal_system": one.symmetry.crystal_system,
        },
        "cell": cell | {"volume": abs(float(np.linalg.det(one.lattice)))},
        "lattice": one.lattice.tolist(),
        "labels": {
            name: {"value": value, "unit": one.label_units[name]}
            for name, value in one.labels.items()
        },
        "config": one.config.model_dump(mode="json"),
        "intensity_unit": one.unit,
        "origin": one.origin,
        "points": len(one.hkl) + (one.origin is not None),
        "complete_to": one.complete_to,
        "reflections": reflections(one),
        "powder": [
            {"q": float(q), "d": float(1.0 / q), "intensity": float(total)}
            for q, total in zip(*powder(one), strict=True)
        ],
    }


def space_group(number: int) -> str:
    """Short Hermann–Mauguin symbol of a space-group number, e.g. `Fm-3m`."""
    return str(moyopy.SpaceGroupType(number).hm_short).replace(" ", "")


def _range(values: NDArray[Any]) -> dict[str, Any]:
    """How many values are known, and the least, middle and greatest of them."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {"known": 0, "min": None, "median": None, "max": None}
    ends = known.min().item(), float(np.median(known)), known.max().item()
    return {"known": len(known)} | dict(zip(("min", "median", "max"), ends, strict=True))


def _row(ids: h5py.Dataset, id: str, folder: Path) -> int:
    """Index of an id; on the way the ids like it are noted."""
    wanted = id.encode("utf-8", "surrogateescape")
    # A slip of one character leaves one half as it was; the full comparison of each id is slow.
    half = (len(wanted) + 1) // 2
    likely: list[str] = []
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        places = np.flatnonzero(block == wanted)
        if len(places):
            return start + int(places[0])
        alike = [e for e in block if e.startswith(wanted[:half]) or e.endswith(wanted[half:])]
        likely += difflib.get_close_matches(id, [e.decode() for e in alike], 3)
    nearest = difflib.get_close_matches(id, likely, 3)
    first = ids.asstr()[0]
    raise UserError(
        f"{folder} has no crystal {id!r}",
        remedy=f"the nearest ids are {', '.join(nearest)}" if nearest else f"an id is {first}",
    )


@contextmanager
def _opened(folder: Path, manifest: dict[str, Any]) -> Iterator[h5py.File]:
    """`dataset.h5`, with every shard in its place: HDF5 shows fill values for one that is not."""
    remedy = f"xtal verify {folder} --repair makes it again, if its source is where it was"
    for name in ["dataset.h5", *(row["file"] for row in manifest["shards"])]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing", remedy=remedy)
    try:
        with h5py.File(folder / "dataset.h5", "r", locking=False) as file:
            yield file
    except (OSError, KeyError) as error:
        raise UserError(f"{folder / 'dataset.h5'} cannot be read: {error}", remedy=remedy) from None
