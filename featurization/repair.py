"""Mend a damaged dataset: take it back to an unfinished run that lacks only what is damaged."""

import json
import shutil
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import sha256_of, write_text
from cluster.mpi import Ranks, on_rank_0
from featurization import journal
from featurization.account import read_rejects, unaccounted
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize_held, hold
from featurization.finish import write_rejects
from featurization.index import build_index
from featurization.journal import Commit, Plan, read_plan, write_commit, write_plan
from featurization.manifest import read_manifest
from featurization.resume import absolute, set_aside, write_known_ids
from featurization.sources import open_source
from featurization.worker import Progress, full_disk_explained


def repair(
    folder: Path,
    damaged: list[str],
    specs: list[str],
    ranks: Ranks,
    progress: Callable[[Progress], None] = lambda at: None,
) -> None:
    """Make the damaged files of a dataset again; every rank of the job calls this.

    Shards are set aside in the folder `damaged`, and their records are featurized again.

    Args:
        damaged: as `featurization.verify.verify` found them.
        specs: where the source of each part is now.

    Raises:
        UserError: a source is gone, or is not what it was.
    """

    with ExitStack() as held, full_disk_explained(folder):
        on_rank_0(ranks, lambda: hold(folder, held))
        manifest = on_rank_0(ranks, lambda: _strip(folder, damaged))
        config = build_config(FeaturizationConfig, manifest["config"], where="of the dataset")
        if (
            plan := on_rank_0(ranks, lambda: read_plan(folder))
        ) is not None:  # it died while at this
            featurize_held(plan.spec, folder, config, ranks, progress, append=plan.part > 0)
            specs = [*specs, plan.spec][: max(len(specs), plan.part + 1)]
        gaps = on_rank_0(ranks, lambda: unaccounted(folder, read_manifest(folder)))
        # Without a gap, the last part's end writes the tables again.
        for part in sorted({part for part, _, _ in gaps}) or [len(specs) - 1]:
            on_rank_0(ranks, partial(_reopen, folder, part, specs[part]))
            featurize_held(specs[part], folder, config, ranks, progress, append=part > 0)


def _strip(folder: Path, damaged: list[str]) -> dict[str, Any]:
    """Set damaged files aside; the manifest that is left has gaps, but lists nothing damaged."""
    manifest = read_manifest(folder)
    manifest["shards"] = [row for row in manifest["shards"] if row["file"] not in damaged]
    if "rejects.csv" in damaged:
        set_aside(folder, ["rejects.csv"])
        write_rejects(folder, [])
        manifest["checksums"]["rejects.csv"] = sha256_of(folder / "rejects.csv")
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    set_aside(folder, [name for name in damaged if name.startswith("shards/")])
    return manifest


def _reopen(folder: Path, part: int, spec: str) -> None:
    """The journal of a run that did all of a part but what the manifest has no account of."""
    manifest = read_manifest(folder)
    config = build_config(FeaturizationConfig, manifest["config"], where="config of the dataset")
    listed = manifest["sources"][part]
    source = open_source(spec, id_prop_label=config.id_prop_label)
    described = source.describe()
    if any(listed[key] != value for key, value in described.items() if key != "path"):
        raise UserError(
            f"{spec} is not what source {part} of {folder} was: {described}",
            remedy="give that source with --source, or featurize this one into a new folder",
        )
    first = sum(each["records"] for each in manifest["sources"][:part])
    shutil.rmtree(folder / journal.FOLDER, ignore_errors=True)
    (folder / journal.FOLDER).mkdir()
    index = build_index(source, folder / journal.FOLDER)
    plan = Plan(part, first, absolute(spec), described, manifest["config"], index, listed["block"])
    write_known_ids(folder, plan)
    rows = [row for row in manifest["shards"] if row["part"] == part]
    rows.append(listed["without_shard"])
    rejects = _rejects_of(folder, rows, first)
    for row, own in zip(rows, rejects, strict=True):
        records = sum(stop - start for start, stop in row["records"])
        if row.get("structures", 0) + row["present"] + len(own) == records:
            shard = row if "file" in row else None
            write_commit(folder, 0, 0, Commit(shard, row["records"], own, row["present"]))
        elif "file" in row:
            set_aside(folder, [row["file"]])
    write_plan(folder, plan)


def _rejects_of(
    folder: Path, rows: list[dict[str, Any]], first: int
) -> list[list[tuple[int, str, str, str]]]:
    """The rejects among the records of each row."""
    spans = sorted((*span, owner) for owner, row in enumerate(rows) for span in row["records"])
    answer: list[list[tuple[int, str, str, str]]] = [[] for _ in rows]
    for id_, stage, reason, index in read_rejects(folder / "rejects.csv"):
        record = int(index) - first
        place = bisect_right(spans, record, key=lambda span: span[0]) - 1
        if place >= 0 and record < spans[place][1]:
            answer[spans[place][2]].append((record, id_, stage, reason))
    return answer
