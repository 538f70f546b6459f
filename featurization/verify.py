"""Is a dataset what its manifest says? Checksums, an account of every record, finiteness, and a
recomputed sample. Shards are shared out over the ranks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import sha256_of
from cluster.mpi import OneProcess, Ranks
from featurization.account import read_rejects, rejected_records, unaccounted
from featurization.config import FeaturizationConfig
from featurization.duplicates import Double, duplicates
from featurization.journal import read_plan
from featurization.manifest import read_manifest
from featurization.origin import GROWN
from featurization.recompute import recompute
from featurization.shards import Entry, content_hash, read_shard
from featurization.sources import open_source


@dataclass
class _Found:
    """What a rank found in its shards."""

    problems: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    structures: int = 0
    points: int = 0
    chosen: list[tuple[float, Entry]] = field(default_factory=list)


def verify(
    folder: Path,
    specs: Sequence[str] = (),
    sample: int = 16,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Check a dataset; every rank of the job calls this.

    Args:
        folder: what `featurize` wrote.
        specs: where each source is now, see `check_specs`; without them, or of one that is not
            there or not what it was, nothing is recomputed, and the answer says so.
        sample: crystals to compute again, chosen at random.
        ranks: those of the job; alone if None.

    Returns:
        `ok`, `structures`, `rejected`, `points`, `content_hash`, `recomputed`, `sources` (of each
        its `spec` and `state`: "as it was", "grown since", "absent", "changed: …", "another: …";
        the last two are problems), `note`, `damaged`, files that a repair would make again, and
        `problems`, a list of sentences that is empty when ok. On every rank the same.

    Raises:
        UserError: there is no manifest, or it is malformed.
    """
    ranks, sample = ranks or OneProcess(), max(0, sample)
    manifest = read_manifest(folder)
    where = f"config in {folder / 'manifest.json'}"
    config = build_config(FeaturizationConfig, manifest["config"], where=where)
    mine = _check_shards(folder, manifest["shards"][ranks.rank :: ranks.size], sample)
    gathered = ranks.gather(mine)
    bad = ranks.broadcast([name for each in gathered for name in each.damaged] if gathered else [])
    good = [row for row in manifest["shards"] if row["file"] not in bad]
    doubles = duplicates(folder, good, ranks)
    answer = None
    if gathered is not None:
        whole = _Found()
        for each in gathered:
            whole.problems += each.problems
            whole.damaged += each.damaged
            whole.digests += each.digests
            whole.structures += each.structures
            whole.points += each.points
            whole.chosen = sorted(whole.chosen + each.chosen, key=lambda pair: pair[0])[:sample]
        answer = _conclude(folder, manifest, config, whole, doubles, specs)
    answer = ranks.broadcast(answer)
    assert answer is not None
    return dict(answer)


def check_specs(folder: Path, given: Sequence[str]) -> list[str]:
    """Where the sources of a dataset are now.

    Args:
        given: one word a source in the order in which they were appended, that of an unfinished
            append included or not; or nothing: where they were when the dataset was made.

    Raises:
        UserError: there is no manifest, or `given` are not as many, or are no sources.
    """
    manifest = read_manifest(folder)
    if not given:
        return [part["spec"] for part in manifest["sources"]]
    count, plan = len(manifest["sources"]), read_plan(folder)
    unfinished = plan is not None and plan.part == count
    if len(given) not in (count, count + unfinished):
        raise UserError(
            f"{len(given)} sources are given, {folder} was made of {count}",
            remedy="give --source once for each, in the order in which they were appended",
        )
    for spec in given:
        open_source(spec)
    return list(given)


def _check_shards(folder: Path, rows: list[dict[str, Any]], sample: int) -> _Found:
    found = _Found()
    choose = random.SystemRandom()
    for row in rows:
        problems = _check_bytes(folder, row["file"], row["sha256"])
        entries: list[Entry] = []
        if not problems:
            try:
                entries = read_shard(folder / row["file"])
                digests = [entry.digest() for entry in entries]
                problems += [p for entry in entries for p in _check_entry(entry, row["file"])]
            except Exception as error:  # an unexpected type or shape fails wherever it is met
                problems.append(f"{row['file']} cannot be read: {type(error).__name__}: {error}")
            else:
                size = len(entries), sum(len(entry.cloud.hkl) for entry in entries)
                if size != (row["structures"], row["points"]):
                    problems.append(
                        f"{row['file']} has {size[0]} structures, {size[1]} points: not as listed"
                    )
                if sorted({label for entry in entries for label in entry.labels}) != row["labels"]:
                    problems.append(f"{row['file']} has other labels than the manifest says")
                if content_hash(digests) != row["content_hash"]:
                    problems.append(f"{row['file']} has other content than the manifest says")
                found.digests.append(sum(digests))
                found.structures += size[0]
                found.points += size[1]
        # Those with the smallest of random keys: each crystal is as likely as the next, on
        # whichever rank it is met.
        keyed = [(choose.random(), entry) for entry in entries]
        found.chosen = sorted(found.chosen + keyed, key=lambda pair: pair[0])[:sample]
        found.problems += problems
        found.damaged += [row["file"]] if problems else []
    return found


def _conclude(
    folder: Path,
    manifest: dict[str, Any],
    config: FeaturizationConfig,
    found: _Found,
    doubles: Sequence[Double],
    specs: Sequence[str],
) -> dict[str, Any]:
    problems, damaged = found.problems, found.damaged
    for key, count in (("structures", found.structures), ("points", found.points)):
        if count != manifest[key]:
            problems.append(f"{count} {key} found, the manifest says {manifest[key]}")
    total = content_hash(found.digests)
    if total != manifest["content_hash"]:
        problems.append("the content hash of the dataset is not the manifest's")
    for double in doubles:
        problems.append(f"id {double.id} is in {double.file} and in an earlier shard or row")
        damaged.append(double.file)
    listed = {row["file"] for row in manifest["shards"]}
    plan = read_plan(folder)
    if plan is not None:
        what = f"an append of {plan.spec}" if plan.part == len(manifest["sources"]) else "a repair"
        problems.append(f"{what} is unfinished here; to finish it: xtal verify {folder} --repair")
    for path in sorted((folder / "shards").glob("*.h5")):
        own = plan is not None and path.name.startswith(f"shard-{plan.part:03d}-")
        if f"shards/{path.name}" not in listed and not own:
            problems.append(f"shards/{path.name} is not in the manifest")
            damaged.append(f"shards/{path.name}")
    checksums = manifest.get("checksums")
    checksums = checksums if isinstance(checksums, dict) else {}
    for name, check in (("rejects.csv", _check_rejects), ("dataset.h5", _check_virtual)):
        wrong = _check_bytes(folder, name, checksums.get(name)) or check(folder / name, manifest)
        problems += wrong
        damaged += [name] if wrong else []
    if "rejects.csv" not in damaged:
        missing = unaccounted(manifest, rejected_records(folder))
        problems += [sentence for _, _, sentence in missing]
        damaged += [file for _, file, _ in missing if file]
    again = recompute(specs, manifest, [entry for _, entry in found.chosen], config)
    problems += again.problems
    notes = ["nothing was recomputed: see sources"] * bool(found.chosen and not again.count)
    # Of a source that was appended since, the last row says whether it has grown again.
    newest = {source["spec"]: source["state"] for source in again.sources}
    if GROWN in newest.values():
        notes.append(
            f"what is new in a source that has grown: xtal featurize SOURCE {folder} --append"
        )
    return {
        "ok": not problems,
        "structures": found.structures,
        "rejected": manifest["rejected"],
        "points": found.points,
        "content_hash": total,
        "recomputed": again.count,
        "sources": again.sources,
        "note": "; ".join(notes),
        "damaged": sorted(set(damaged)),
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
    intensities = np.vstack([cloud.intensity, cloud.also])
    if not (np.isfinite(cloud.q).all() and np.isfinite(intensities).all()):
        problems.append(f"{file}: {entry.id} has a point that is not finite")
    elif (intensities < 0).any():
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
        rows = sum(1 for _ in read_rejects(path))
    except UserError as error:
        return [error.problem]
    return [] if rows == expected else [f"rejects.csv has {rows} rows, the manifest {expected}"]


def _check_virtual(path: Path, manifest: dict[str, Any]) -> list[str]:
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = len(file["id"]), len(file["hkl"]), int(file["offsets"][-1])
    except Exception as error:  # as in a shard
        return [f"dataset.h5 cannot be read: {type(error).__name__}: {error}"]
    if found != (manifest["structures"], manifest["points"], manifest["points"]):
        return [f"dataset.h5 shows {found[0]} structures and {found[1]} points"]
    return []
