"""Mend a damaged dataset: take it back to an unfinished run that lacks only what is damaged."""

import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import disk_explained, sha256_of
from cluster.mpi import Ranks, on_rank_0
from featurization import journal
from featurization.account import read_rejects, rejected_records, unaccounted
from featurization.attribution import known
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize_held, hold
from featurization.finish import assemble, write_rejects
from featurization.index import build_index
from featurization.journal import Commit, Plan, joined, read_plan, write_commit, write_plan
from featurization.manifest import read_manifest, write_manifest
from featurization.origin import GROWN, SAME, described, state_of
from featurization.records import Source
from featurization.resume import absolute, set_aside, write_known_ids
from featurization.shards import read_ids
from featurization.sources import open_source
from featurization.worker import Progress


def repair(
    folder: Path,
    damaged: list[str],
    specs: list[str],
    ranks: Ranks,
    progress: Callable[[Progress], None] = lambda at: None,
    *,
    retry: bool = False,
) -> None:
    """Make the damaged files of a dataset again; every rank of the job calls this.

    Shards are set aside in the folder `damaged`, and their records are featurized again; so are
    rejects, if their table is damaged. That is not begun unless all sources that it takes are
    there. `dataset.h5` is written anew from the shards.

    Args:
        damaged: as `featurization.verify.verify` found them.
        specs: where the source of each part is now, that of an unfinished run included or not.
        retry: featurize again, too, what was rejected for its time or for the death of its process.

    Raises:
        UserError: a source is gone, or is not what it was.
    """
    with ExitStack() as held, disk_explained(folder):
        on_rank_0(ranks, lambda: hold(folder, held))
        plan = on_rank_0(ranks, lambda: read_plan(folder))
        if plan is not None:  # an append, or a repair, that did not end
            specs = specs if len(specs) > plan.part else [*specs, plan.spec]
        config = on_rank_0(ranks, lambda: _strip(folder, damaged, specs, plan, retry))
        if plan is not None:
            on_rank_0(ranks, lambda: _check_unfinished(folder, plan, specs, config))
            featurize_held(specs[plan.part], folder, config, ranks, progress, append=plan.part > 0)
        for part in on_rank_0(ranks, lambda: _gaps(read_manifest(folder), folder)):
            on_rank_0(ranks, partial(_reopen, folder, part, specs[part], config))
            featurize_held(specs[part], folder, config, ranks, progress, append=part > 0)


def _check_newest(folder: Path, parts: int, plan: Plan | None) -> None:
    """That the manifest is not older than the dataset, as one from a backup can be."""
    known = parts if plan is None else max(parts, plan.part + 1)
    shards = sorted(path.name for path in (folder / "shards").glob("shard-*.h5"))
    if later := [name for name in shards if int(name.split("-")[1]) >= known]:
        raise UserError(
            f"{folder} has shards of a source that its manifest does not know, such as {later[0]}: "
            "the manifest is older than they are",
            remedy="put the newer manifest.json back; or remove these shards, and append again",
        )


def _strip(
    folder: Path, damaged: list[str], specs: list[str], plan: Plan | None, retry: bool
) -> FeaturizationConfig:
    """Set damaged files aside; what is left is a dataset with gaps that lists nothing damaged.

    What is tried again stays in `rejects.csv` until it is done.

    Raises:
        UserError: a source is missing that would close the gaps; nothing was changed.
    """
    manifest = read_manifest(folder)
    _check_newest(folder, len(manifest["sources"]), plan)
    config = build_config(FeaturizationConfig, manifest["config"], where="of the dataset")
    lost_table = "rejects.csv" in damaged
    rejects = [] if lost_table else list(read_rejects(folder / "rejects.csv"))
    again = {int(row[3]): row[0] for row in rejects if retry and row[1] == "guard"}
    sound = [row for row in manifest["shards"] if row["file"] not in damaged]
    damaged = [*damaged, *_same_ids(folder, sound, again)]
    shards = [row for row in sound if row["file"] not in damaged]
    manifest["shards"] = shards
    _take_out(manifest, set(again))
    gaps = _gaps(manifest, folder if not lost_table else None)
    for part in gaps:
        if plan is None or part != plan.part:
            _listed_source(folder, part, specs[part], manifest["sources"][part], config)
    if gaps and plan is not None:
        _check_unfinished(folder, plan, specs, config)
    if not damaged and not again:
        return config
    stages = Counter(row[1] for row in rejects)
    if lost_table:
        set_aside(folder, ["rejects.csv"])
        stages = write_rejects(folder, [])
    if shards:
        manifest = assemble(folder, config, manifest["sources"], shards, stages) | {
            "provenance": manifest.get("provenance")  # of those who made the crystals
        }
    else:
        manifest["checksums"] = {"rejects.csv": sha256_of(folder / "rejects.csv")}
    write_manifest(folder, manifest)
    set_aside(folder, [name for name in damaged if name.startswith("shards/")])
    return config


def _gaps(manifest: dict[str, Any], folder: Path | None) -> list[int]:
    """The parts with records that are not accounted for; without a folder, there are no rejects."""
    rejected = np.zeros(0, np.int64) if folder is None else rejected_records(folder)
    return sorted({part for part, _, _ in unaccounted(manifest, rejected)})


def _same_ids(folder: Path, shards: list[dict[str, Any]], again: dict[int, str]) -> list[str]:
    """Shards with a crystal that would be left out if an earlier record, tried again, gives one."""
    first = {id_: record for record, id_ in sorted(again.items(), reverse=True)}
    found = []
    for row in shards if again else []:
        ids, records = read_ids(folder / row["file"])
        if any(first.get(id_, at) < at for id_, at in zip(ids, records.tolist(), strict=True)):
            found.append(str(row["file"]))
    return found


def _take_out(manifest: dict[str, Any], records: set[int]) -> None:
    """Make gaps of single records in the account, so that just these are done again."""
    first = 0
    for part, source in enumerate(manifest["sources"]):
        own = {record - first for record in records} & set(range(source["records"]))
        shards = [row for row in manifest["shards"] if row["part"] == part]
        for row in [*shards, source["without_shard"]] if own else []:
            kept = (i for span in row["records"] for i in range(*span) if i not in own)
            row["records"] = [list(span) for span in joined((i, i + 1) for i in kept)]
            source["block"] = 1
        first += source["records"]


def _check_unfinished(
    folder: Path, plan: Plan, specs: list[str], config: FeaturizationConfig
) -> None:
    """That the source of an unfinished run is there."""
    spec = specs[plan.part]
    try:
        _as_it_was(spec, plan.source, config)
    except UserError as error:
        now = [*specs[: plan.part], "NEW", *specs[plan.part + 1 :]]
        words = " ".join(f"--source {word}" for word in now)
        raise UserError(
            f"an unfinished run in {folder} reads {spec}, which is not there as it was "
            f"({error.problem})",
            remedy=f"where it is now NEW: xtal verify {folder} --repair {words}; to give that run "
            f"up: remove {folder / journal.FOLDER} and the files "
            f"{folder / 'shards' / f'shard-{plan.part:03d}-*.h5'}",
        ) from None


def _listed_source(
    folder: Path, part: int, spec: str, listed: dict[str, Any], config: FeaturizationConfig
) -> Source:
    """The source of a part, which is what it was or has only grown."""
    try:
        return _as_it_was(spec, listed, config)
    except UserError as error:
        raise UserError(
            f"{spec} is not what source {part} of {folder} was: {error.problem}",
            remedy="give all sources as they were, in their order, with --source",
        ) from None


def _as_it_was(spec: str, listed: dict[str, Any], config: FeaturizationConfig) -> Source:
    """The source, if it is what it was or has only grown.

    Raises:
        UserError: it is not, or cannot be read; `problem` says what has become of it.
    """
    source = open_source(spec, id_prop_label=config.id_prop_label)
    if (state := state_of(source, listed)) not in (SAME, GROWN):
        raise UserError(state, remedy="give the source as it was")
    return source


def _reopen(folder: Path, part: int, spec: str, config: FeaturizationConfig) -> None:
    """The journal of a run that did all of a part but what the manifest has no account of."""
    manifest = read_manifest(folder)
    listed = manifest["sources"][part]
    source = _listed_source(folder, part, spec, listed, config)
    about = described(source, listed)
    first = sum(each["records"] for each in manifest["sources"][:part])
    shutil.rmtree(folder / journal.FOLDER, ignore_errors=True)
    (folder / journal.FOLDER).mkdir()
    index = build_index(source, folder / journal.FOLDER, listed["records"])
    asked, block = manifest["config"], listed["block"]
    plan = Plan(part, first, absolute(spec), about, asked, index, block, known(listed))
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
