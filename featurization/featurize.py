"""The driver: a source → verified shards, on one process or on many MPI ranks.

Every rank streams the source and parses only its own blocks of records; rank 0 settles duplicate
ids, writes the rejects table, the virtual file and, last of all, the manifest. A folder without
manifest is unfinished, whatever else it holds.
"""

import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.files import sha256_of, write_text
from cluster.mpi import Ranks, agree
from cluster.provenance import provenance
from featurization.cells import standardize
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import ATTRIBUTION, Crystal, Reject
from featurization.shards import (
    FORMAT_VERSION,
    Entry,
    content_hash,
    read_manifest,
    read_shard,
    write_shard,
    write_virtual,
)
from featurization.sources import Record, Source, open_source

# Records that a rank takes at a time: many enough to balance cheap and costly crystals.
_BLOCK = 32
_OUR_FILES = {"shards", "manifest.json", "rejects.csv", "dataset.h5"}
_OUR_SHARDS = re.compile(r"\.?shard-\d+-\d+\.h5(\.\d+\.tmp)?$")


@dataclass(frozen=True, slots=True)
class RejectRow:
    """A row of `rejects.csv`."""

    source_index: int
    id: str
    stage: str
    reason: str


def featurize_one(source: Source, record: Record, config: FeaturizationConfig) -> Entry:
    """One record → one entry of a shard.

    Raises:
        Reject: with the stage and the reason; nothing else, whatever the record holds.
    """
    try:
        crystal = source.parse(record)
        if not crystal.id or not crystal.id.isprintable():
            raise Reject("source", f"id {crystal.id!r} is empty or has unprintable characters")
        standard, symmetry = standardize(crystal, config.cell, config.symprec)
        formula = standard.reduced_formula
        return Entry(
            id=crystal.id,
            group=crystal.group or _without_isotopes(standard).reduced_formula,
            formula=formula,
            source_index=record.index,
            cloud=diffraction_cloud(standard, config),
            lattice=standard.lattice,
            symmetry=symmetry,
            labels=crystal.labels,
        )
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise Reject("internal", f"{type(error).__name__}: {error}") from error


def _without_isotopes(crystal: Crystal) -> Crystal:
    """A deuteride is grouped with its hydride: the two have one X-ray cloud."""
    return replace(crystal, species=tuple("H" if s == "D" else s for s in crystal.species))


def featurize(
    spec: str,
    out: Path,
    config: FeaturizationConfig,
    ranks: Ranks,
    progress: Callable[[int], None] = lambda seen: None,
) -> dict[str, Any]:
    """Featurize a source into the folder `out`; every rank of the job calls this.

    Args:
        spec: names the source, see `featurization.sources.open_source`.
        progress: called with the number of records that were passed so far.

    Returns:
        The manifest. A finished `out` of the same source and config is left as it is.

    Raises:
        UserError: no such source, `out` holds something else, or no crystal could be featurized.
    """
    source = agree(ranks, lambda: open_source(spec, id_prop_label=config.id_prop_label))
    described = ranks.broadcast(source.describe() if ranks.rank == 0 else None)
    refusal = ranks.broadcast(_prepare(out, described, config) if ranks.rank == 0 else None)
    if isinstance(refusal, UserError):
        raise refusal
    if isinstance(refusal, dict):
        return refusal

    rejects: list[RejectRow] = []
    shards: list[dict[str, Any]] = []
    places: list[tuple[int, str, str]] = []  # source index, id, shard file
    pending: list[Entry] = []

    def close_shard() -> None:
        path = out / "shards" / f"shard-{ranks.rank:05d}-{len(shards):05d}.h5"
        shards.append(write_shard(path, pending, config))
        places.extend((e.source_index, e.id, shards[-1]["file"]) for e in pending)
        pending.clear()

    for record in _own_records(source.records(), ranks, progress):
        try:
            pending.append(featurize_one(source, record, config))
        except Reject as reject:
            id_, reason = _writable(record.id), _writable(reject.reason)
            rejects.append(RejectRow(record.index, id_, reject.stage, reason))
        if len(pending) == config.shard_structures:
            close_shard()
    if pending:
        close_shard()

    gathered = ranks.gather((shards, rejects, places))
    outcome: Any = None
    if gathered is not None:
        all_shards = [shard for part, _, _ in gathered for shard in part]
        all_rejects = [row for _, part, _ in gathered for row in part]
        all_places = [place for _, _, part in gathered for place in part]
        try:
            all_rejects += _drop_duplicates(out, all_shards, all_places, config)
            asked = {"source": described, "source_spec": _absolute(spec)}
            outcome = _finish(out, all_shards, all_rejects, asked, config)
        except UserError as error:
            outcome = error
    outcome = ranks.broadcast(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    manifest: dict[str, Any] = outcome
    return manifest


def _own_records(
    records: Iterator[Record], ranks: Ranks, progress: Callable[[int], None]
) -> Iterator[Record]:
    for record in records:
        progress(record.index + 1)
        if record.index // _BLOCK % ranks.size == ranks.rank:
            yield record


def _absolute(spec: str) -> str:
    """The source's word, independent of the working folder: `verify` opens it again."""
    if spec.partition(":")[0] == "prototypes":  # the word, even beside a folder of that name
        return spec
    return str(Path(spec).resolve()) if Path(spec).exists() else spec


def _writable(text: str) -> str:
    """Broken encodings and line ends made visible."""
    visible = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in visible)


def _prepare(
    out: Path, described: dict[str, Any], config: FeaturizationConfig
) -> dict[str, Any] | UserError | None:
    """Rank 0: the manifest of a finished equal dataset, a refusal, or None after clearing `out`."""
    if out.exists() and not out.is_dir():
        return UserError(f"{out} is a file", remedy="give the path of a new folder")
    if (out / "manifest.json").exists():
        try:
            manifest = read_manifest(out)
        except UserError as error:
            return error
        asked = {"source": described, "config": config.model_dump()}
        differences = [
            f"{part}.{key}: {manifest[part].get(key)!r} there, {value!r} asked for"
            for part in asked
            for key, value in asked[part].items()
            if manifest[part].get(key) != value
        ]
        if not differences:
            return manifest
        return UserError(
            f"{out} holds another dataset ({'; '.join(differences)})",
            remedy="give another folder, or remove this one",
        )
    if out.exists():
        strangers = {p.name for p in out.iterdir() if not p.name.startswith(".")} - _OUR_FILES
        # Others have folders called shards, too.
        strangers |= {
            f"shards/{p.name}" for p in (out / "shards").glob("*") if not _OUR_SHARDS.match(p.name)
        }
        if strangers:
            return UserError(
                f"{out} is not empty and holds no dataset ({', '.join(sorted(strangers)[:3])})",
                remedy="give a new folder",
            )
    try:
        for name in _OUR_FILES - {"shards"}:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "shards", ignore_errors=True)
        (out / "shards").mkdir(parents=True)
    except OSError as error:
        return UserError(f"cannot write to {out}: {error.strerror}", remedy="give another folder")
    return None


def _drop_duplicates(
    out: Path,
    shards: list[dict[str, Any]],
    places: list[tuple[int, str, str]],
    config: FeaturizationConfig,
) -> list[RejectRow]:
    """Keep the first crystal of each id in source order; rewrite the shards of the others."""
    first: dict[str, int] = {}
    doubles: dict[str, dict[int, str]] = {}
    for index, id_, file in sorted(places):
        if first.setdefault(id_, index) != index:
            doubles.setdefault(file, {})[index] = id_
    rows = []
    for file, victims in doubles.items():
        entries = [e for e in read_shard(out / file) if e.source_index not in victims]
        position = next(i for i, shard in enumerate(shards) if shard["file"] == file)
        if entries:
            shards[position] = write_shard(out / file, entries, config)
        else:
            (out / file).unlink()
            del shards[position]
        rows += [
            RejectRow(i, id_, "source", f"duplicate id; the first is record {first[id_]}")
            for i, id_ in victims.items()
        ]
    return rows


def _finish(
    out: Path,
    shards: list[dict[str, Any]],
    rejects: list[RejectRow],
    asked: dict[str, Any],
    config: FeaturizationConfig,
) -> dict[str, Any]:
    rejects = sorted(rejects, key=lambda row: row.source_index)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["id", "stage", "reason", "source_index"])
    writer.writerows([row.id, row.stage, row.reason, row.source_index] for row in rejects)
    write_text(out / "rejects.csv", table.getvalue())
    if not shards:
        raise UserError(
            f"none of the {len(rejects)} records could be featurized"
            + (f" (first: {rejects[0].stage}: {rejects[0].reason})" if rejects else ""),
            remedy=f"see {out / 'rejects.csv'}" if rejects else "give a source with crystals",
        )
    write_virtual(out, shards, config)
    manifest = {
        "format_version": FORMAT_VERSION,
        "structures": sum(shard["structures"] for shard in shards),
        "rejected": len(rejects),
        "reject_stages": dict(Counter(row.stage for row in rejects)),
        "points": sum(shard["points"] for shard in shards),
        "content_hash": content_hash(int(shard["content_hash"], 16) for shard in shards),
        "config": config.model_dump(),
        **asked,
        "shards": shards,
        "checksums": {name: sha256_of(out / name) for name in ("rejects.csv", "dataset.h5")},
        "attribution": ATTRIBUTION,
        "provenance": provenance(),
    }
    # ASCII, because the name of a source can be what no UTF-8 spells.
    write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    return manifest
