"""Is a dataset what its manifest says? Checksums, counts, finiteness, and a recomputed sample."""

import csv
import random
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.config import FeaturizationConfig
from featurization.crystal import Reject
from featurization.featurize import featurize_one
from featurization.shards import Entry, content_hash, read_manifest, read_shard
from featurization.sources import Source


def verify(folder: Path, source: Source | None, sample: int = 16) -> dict[str, Any]:
    """Check a dataset.

    Args:
        folder: what `featurize` wrote.
        source: where it came from; None skips the recomputation, and the answer says so.
        sample: crystals to compute again, chosen at random.

    Returns:
        `ok`, `structures`, `rejected`, `points`, `content_hash`, `recomputed`, `note`
        and `problems`, a list of sentences that is empty when ok.

    Raises:
        UserError: there is no manifest, or it is malformed.
    """
    manifest = read_manifest(folder)
    where = f"config in {folder / 'manifest.json'}"
    config = build_config(FeaturizationConfig, manifest["config"], where=where)
    problems: list[str] = []
    digests: list[int] = []
    seen: dict[str, str] = {}  # id → shard
    counts = {"structures": 0, "points": 0}
    chosen: list[Entry] = []
    choose = random.SystemRandom()
    for row in manifest["shards"]:
        damage = _check_bytes(folder, row["file"], row["sha256"])
        if damage:
            problems += damage
            continue
        try:
            entries = read_shard(folder / row["file"])
            own = [entry.digest() for entry in entries]
            problems += [p for entry in entries for p in _check_entry(entry, row["file"])]
        except Exception as error:  # an unexpected type or shape fails wherever it is met
            problems.append(f"{row['file']} cannot be read: {type(error).__name__}: {error}")
            continue
        size = len(entries), sum(len(entry.cloud.hkl) for entry in entries)
        if size != (row["structures"], row["points"]):
            problems.append(
                f"{row['file']} has {size[0]} structures, {size[1]} points: not as listed"
            )
        for entry in entries:
            if entry.id in seen:
                problems.append(f"id {entry.id} is in {seen[entry.id]} and in {row['file']}")
            seen[entry.id] = row["file"]
            if len(chosen) < sample:  # reservoir sampling: each crystal is as likely as the next
                chosen.append(entry)
            elif (place := choose.randrange(counts["structures"] + 1)) < sample:
                chosen[place] = entry
            counts["structures"] += 1
            counts["points"] += len(entry.cloud.hkl)
        if content_hash(own) != row["content_hash"]:
            problems.append(f"{row['file']} has other content than the manifest says")
        digests += own
    for key, count in counts.items():
        if count != manifest[key]:
            problems.append(f"{count} {key} found, the manifest says {manifest[key]}")
    total = content_hash(digests)
    if total != manifest["content_hash"]:
        problems.append("the content hash of the dataset is not the manifest's")
    listed = {row["file"] for row in manifest["shards"]}
    for path in sorted((folder / "shards").glob("*.h5")):
        if f"shards/{path.name}" not in listed:
            problems.append(f"shards/{path.name} is not in the manifest")
    checksums = manifest.get("checksums")
    checksums = checksums if isinstance(checksums, dict) else {}
    for name, check in (("rejects.csv", _check_rejects), ("dataset.h5", _check_virtual)):
        damage = _check_bytes(folder, name, checksums.get(name))
        problems += damage or check(folder / name, manifest)
    recomputed = 0
    if source is not None:
        for problem in _recompute(source, chosen, config):
            recomputed += 1
            problems += [problem] if problem else []
    return {
        "ok": not problems,
        "structures": counts["structures"],
        "rejected": manifest["rejected"],
        "points": counts["points"],
        "content_hash": total,
        "recomputed": recomputed,
        "note": "" if source is not None else "nothing was recomputed: the source was not found",
        "problems": problems,
    }


def _check_bytes(folder: Path, name: str, sha256: str | None) -> list[str]:
    """Comes before opening: HDF5 can crash the process on a damaged file."""
    if not (folder / name).is_file():
        return [f"{name} is missing"]
    if sha256_of(folder / name) != sha256:
        return [f"{name} has another checksum than the manifest says; it was not read"]
    return []


def _check_entry(entry: Entry, file: str) -> list[str]:
    cloud = entry.cloud
    problems = []
    if not len(cloud.hkl):
        problems.append(f"{file}: {entry.id} has no points")
    if not (np.isfinite(cloud.q).all() and np.isfinite(cloud.intensity).all()):
        problems.append(f"{file}: {entry.id} has a point that is not finite")
    elif (cloud.intensity < 0).any():
        problems.append(f"{file}: {entry.id} has a negative intensity")
    try:
        q = cloud.hkl @ np.linalg.inv(entry.lattice).T
    except np.linalg.LinAlgError:
        return [*problems, f"{file}: {entry.id} has a lattice without volume"]
    if not np.allclose(q, cloud.q, rtol=1e-5, atol=1e-6):
        problems.append(f"{file}: {entry.id} has points off its reciprocal lattice")
    return problems


def _check_rejects(path: Path, manifest: dict[str, Any]) -> list[str]:
    expected = manifest["rejected"]
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = sum(1 for _ in csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        return [f"rejects.csv cannot be read: {error}"]
    return [] if rows == expected else [f"rejects.csv has {rows} rows, the manifest {expected}"]


def _check_virtual(path: Path, manifest: dict[str, Any]) -> list[str]:
    try:
        with h5py.File(path, "r") as file:
            found = len(file["id"]), len(file["hkl"]), int(file["offsets"][-1])
    except Exception as error:  # as in a shard
        return [f"dataset.h5 cannot be read: {type(error).__name__}: {error}"]
    if found != (manifest["structures"], manifest["points"], manifest["points"]):
        return [f"dataset.h5 shows {found[0]} structures and {found[1]} points"]
    return []


def _recompute(source: Source, chosen: list[Entry], config: FeaturizationConfig) -> list[str]:
    """For each chosen crystal an empty string, or how its new cloud differs."""
    if not chosen:
        return []
    by_index = {entry.source_index: entry for entry in chosen}
    answers = []
    for record in islice(source.records(), max(by_index) + 1):
        entry = by_index.pop(record.index, None)
        if entry is None:
            continue
        try:
            again = featurize_one(source, record, config)
        except (Reject, UserError) as error:
            answers.append(f"{entry.id} cannot be computed again: {error}")
            continue
        same = (
            again.id == entry.id
            and np.array_equal(again.cloud.hkl, entry.cloud.hkl)
            and np.allclose(again.cloud.q, entry.cloud.q, rtol=1e-6, atol=1e-9)
            and np.allclose(again.cloud.intensity, entry.cloud.intensity, rtol=1e-4, atol=1e-12)
            and (again.group, again.formula) == (entry.group, entry.formula)
            and np.allclose(again.lattice, entry.lattice, rtol=1e-6, atol=1e-9)
            and again.symmetry == entry.symmetry
            and dict(again.labels) == dict(entry.labels)
        )
        answers.append("" if same else f"{entry.id} differs from what its source gives")
    answers += [f"{entry.id} is not in the source any more" for entry in by_index.values()]
    return answers
