"""The end of a run, on rank 0: one table of rejects, one virtual file, and last of all a manifest.

All that can be interrupted and done again: a folder without `journal` and with a manifest is
finished.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from cluster.files import replacing, sha256_of
from cluster.provenance import provenance
from featurization import journal
from featurization.account import read_rejects, rejected_records, unaccounted
from featurization.attribution import attribution
from featurization.config import FeaturizationConfig
from featurization.duplicates import Double
from featurization.index import check_unchanged
from featurization.journal import Commit, Plan, commits, remove_journal, write_commit
from featurization.manifest import FORMAT_VERSION, read_manifest, write_manifest
from featurization.records import Source
from featurization.resume import Start
from featurization.shards import content_hash, read_shard, write_shard
from featurization.virtual import write_virtual

# Rejects that are held in memory at a time.
_AT_ONCE = 1 << 20
REJECT_COLUMNS = ["id", "stage", "reason", "source_index"]


def finish(
    source: Source,
    out: Path,
    config: FeaturizationConfig,
    start: Start,
    doubles: Sequence[Double],
) -> dict[str, Any]:
    """Write `rejects.csv`, `dataset.h5` and `manifest.json`, and remove the journal.

    Returns:
        The manifest.

    Raises:
        UserError: there is no crystal at all.
        RunFailed: the source changed while it was read.
    """
    plan = start.plan
    try:
        check_unchanged(source, plan.source)
    except RunFailed:
        for row in journal.committed_shards(out):  # who knows of which files they are
            (out / row["file"]).unlink()
        remove_journal(out)
        raise
    before = read_manifest(out) if (out / "manifest.json").exists() else None
    others = [row for row in before["shards"] if row["part"] != plan.part] if before else []
    _drop_duplicates(out, config, start, doubles)
    own, without_shard = journal.committed(out)
    stages = write_rejects(out, _all_rejects(out, plan, before))
    shards = sorted(others + own, key=lambda row: str(row["file"]))
    rejected = sum(stages.values())
    part = {"spec": plan.spec, **plan.source, **plan.recorded}
    part |= {"records": plan.index.count, "block": plan.block}
    part["damage"] = plan.index.damage  # why the source ended before its end
    part["without_shard"] = without_shard
    sources = list(before["sources"]) if before else []
    sources[plan.part : plan.part + 1] = [part]
    if not shards:
        remove_journal(out)  # nothing that would be worth going on with
        raise UserError(
            f"none of the {rejected} records could be featurized{_first_reason(out)}"
            if rejected
            else f"{plan.spec} has no records",
            remedy=f"see {out / 'rejects.csv'}" if rejected else "give a source with crystals",
        )
    manifest = assemble(out, config, sources, shards, stages)
    gaps = [
        gap for part, _, gap in unaccounted(manifest, rejected_records(out)) if part == plan.part
    ]
    if gaps:  # other parts can lack something, too, while a dataset is repaired
        raise RunFailed(
            f"the journal in {out} does not account for all records: {gaps[0]}",
            remedy="featurize into a new folder; was more than one job at work in this one?",
        )
    write_manifest(out, manifest)
    remove_journal(out)
    return manifest


def assemble(
    out: Path,
    config: FeaturizationConfig,
    sources: list[dict[str, Any]],
    shards: list[dict[str, Any]],
    stages: Counter[str],
) -> dict[str, Any]:
    """Write `dataset.h5`; return the manifest, not written yet.

    Args:
        sources, shards: rows of the manifest; at least one shard.
        stages: what `write_rejects` returned.
    """
    write_virtual(out, shards, config)
    return {
        "format_version": FORMAT_VERSION,
        "structures": sum(row["structures"] for row in shards),
        "rejected": sum(stages.values()),
        "reject_stages": dict(stages),
        "points": sum(row["points"] for row in shards),
        "content_hash": content_hash(int(row["content_hash"], 16) for row in shards),
        "config": config.model_dump(mode="json"),
        "sources": sources,
        "shards": shards,
        "checksums": {name: sha256_of(out / name) for name in ("rejects.csv", "dataset.h5")},
        "attribution": attribution(sources),
        "provenance": provenance(),
    }


def _drop_duplicates(
    out: Path, config: FeaturizationConfig, start: Start, found: Sequence[Double]
) -> None:
    """Keep the first crystal of each id in source order; rewrite the shards of the others."""
    if not found:
        return
    rows = {row["file"]: row for row in journal.committed_shards(out)}
    first = start.plan.first_record
    doubles: dict[str, dict[int, tuple[str, int]]] = {}
    for double in found:
        doubles.setdefault(double.file, {})[double.index] = double.id, double.first
    for file, victims in doubles.items():
        rejects = [
            (index - first, id_, "source", f"duplicate id; the first is record {earlier}")
            for index, (id_, earlier) in sorted(victims.items())
        ]
        entries = [e for e in read_shard(out / file) if e.source_index not in victims]
        if entries:
            place = {key: rows[file][key] for key in ("part", "records", "present")}
            commit = Commit(write_shard(out / file, entries, config) | place, [], rejects, 0)
        else:  # what was committed with this shard goes on without one
            whole = [c for c in commits(out) if c.shard is not None and c.shard["file"] == file]
            (out / file).unlink()
            ranges = [each for c in whole for each in c.ranges]
            rejects += [each for c in whole for each in c.rejects]
            commit = Commit(None, ranges, rejects, sum(c.present for c in whole))
        write_commit(out, start.attempt, None, commit)


def _all_rejects(out: Path, plan: Plan, before: dict[str, Any] | None) -> Iterator[list[Any]]:
    """Those of other parts and those of the journal, in the order of the sources."""
    first, beyond = plan.first_record, plan.first_record + plan.index.count
    old = out / "rejects.csv" if before is not None else None
    yield from (row for row in read_rejects(old) if int(row[3]) < first)
    for low in range(0, plan.index.count, _AT_ONCE):
        rows = (each for commit in commits(out) for each in commit.rejects)
        for row in sorted(each for each in rows if low <= each[0] < low + _AT_ONCE):
            yield [*row[1:], first + row[0]]
    yield from (row for row in read_rejects(old) if int(row[3]) >= beyond)


def write_rejects(out: Path, rows: Iterable[list[Any]]) -> Counter[str]:
    """Write `rejects.csv` atomically; return how many rows each stage has."""
    stages = Counter[str]()
    with replacing(out / "rejects.csv") as path, path.open("w", newline="", encoding="utf-8") as s:
        writer = csv.writer(s)
        writer.writerow(REJECT_COLUMNS)
        for row in rows:
            writer.writerow(row)
            stages[row[1]] += 1
    return stages


def _first_reason(out: Path) -> str:
    row = next(read_rejects(out / "rejects.csv"), None)
    return f" (first: {row[1]}: {row[2]})" if row else ""
