"""How far work is, from files alone: over ssh, without Ray, wherever its job runs."""

import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation.claim import CLAIM
from ablation.parts import folders
from ablation.status import status
from cluster.attempt import jobs_folder
from cluster.config import build_config
from cluster.errors import UserError
from cluster.slurm import RECORD, recorded
from featurization import journal
from featurization.manifest import read_manifest
from training import ensemble
from training.config import TrainingConfig
from training.loop import MODEL

_PARTS = ("dataset", "train", "ablation")  # of a folder of `xtal submit all` or of the demo


@dataclass(frozen=True, slots=True)
class Standing:
    """How far one result is; `changed` is when its files last said something, in s since 1970."""

    kind: str  # dataset, training or grid; awaited if it has no file yet
    folder: Path
    done: int
    total: int
    unit: str  # of what is counted: records, epochs, trials
    said: str  # in words: what else is known
    changed: float

    @property
    def finished(self) -> bool:
        return self.done >= self.total


def look(run: Path) -> list[Standing]:
    """The results in a folder: it is one itself, or has dataset/, train/, ablation/, seed-0/, ….

    Those that jobs were submitted for are among them before they have a file.

    Raises:
        UserError: there is none, and no job was submitted that will make one.
    """
    seeds = _seeds(run)
    places = [run, *(run / name for name in _PARTS), *seeds]
    found = [s for place in places for kind in (_dataset, _training, _grid) if (s := kind(place))]
    found += _awaited(run, places, seeds, found)
    if not found:
        raise UserError(
            f"{run} holds no dataset, training or grid yet",
            remedy="give the folder that featurize, train, ablate or submit got; see xtal jobs",
        )
    return found


def watch(run: Path, every: float, *, once: bool = False) -> Iterator[tuple[Standing, str]]:
    """The results in a folder and a line on each, every so many seconds, until all are finished.

    A result of which the line says nothing new is left out.

    Raises:
        UserError: there is no result.
    """
    before: dict[Path, Standing] = {}
    said: dict[Path, str] = {}
    began = time.monotonic()
    while True:
        now = look(run)
        seconds, began = time.monotonic() - began, time.monotonic()
        for at in now:
            text = line(at, before.get(at.folder), seconds)
            if said.get(at.folder) != text:
                yield at, text
            said[at.folder], before[at.folder] = text, at
        if once or all(at.finished for at in now):
            return
        time.sleep(every)


def _seeds(run: Path) -> dict[Path, bool]:
    """Trainings of an array that have begun or were submitted: folder → whether it was."""
    jobs = jobs_folder(run)
    rows = [row for row in recorded(jobs) if row.get("verb") == "train"]
    elements = [path for row in rows for path in jobs.glob(f"{row['job']}_*")]
    numbers = {path.name.rpartition("_")[2] for path in elements}
    begun = {path.name[5:] for path in run.glob("seed-*") if path.is_dir()}
    both = sorted(filter(str.isdigit, begun | numbers), key=int)
    return {run / f"seed-{number}": number in numbers for number in both}


def _awaited(
    run: Path, places: list[Path], seeds: dict[Path, bool], found: list[Standing]
) -> list[Standing]:
    """Results that jobs were submitted for, or that work has begun on, without a file yet."""
    there = {at.folder for at in found} | ({run} if seeds else set())
    signs = [(place, (jobs_folder(place) / RECORD, place / CLAIM)) for place in places]
    said = f"no file yet; xtal jobs {run} says whether its job runs"
    return [
        Standing("awaited", place, 0, 1, "results", said, _newest([*those]))
        for place, those in signs
        if place not in there and (seeds.get(place) or any(path.exists() for path in those))
    ]


def _dataset(folder: Path) -> Standing | None:
    if (plan := journal.read_plan(folder)) is not None:
        records = plan.index.count
        done = min(records, int(journal.done_blocks(folder, plan).sum()) * plan.block)
        shards = journal.committed_shards(folder)
        structures = sum(int(row["structures"]) for row in shards)
        said = f"{structures:,} structures in {len(shards)} shards"
        changed = _newest([*(folder / journal.FOLDER).glob("done-*"), folder / journal.FOLDER])
        return Standing("dataset", folder, done, max(records, 1), "records", said, changed)
    if not (folder / "manifest.json").is_file():
        return None
    manifest = read_manifest(folder)
    count = int(manifest["structures"])
    said = f"finished; {manifest['rejected']:,} rejected"
    changed = _newest([folder / "manifest.json"])
    return Standing("dataset", folder, count, count, "structures", said, changed)


def _training(folder: Path) -> Standing | None:
    if (recorded := _json(folder / "config.json")) is None or "training" not in recorded:
        return None
    config = build_config(TrainingConfig, recorded["training"], where=f"{folder}/config.json")
    members = ensemble.folders(folder, config)
    histories = [path for each in members if (path := each / "history.csv").exists()]
    rows = [row for path in histories for row in _rows(path)]
    total = config.members * config.passes
    trained = all((each / MODEL).exists() for each in members)
    done = total if trained else min(len(rows), total - 1)
    said = ", ".join(f"{k} {float(v):.4g}" for k, v in (rows[-1] if rows else {}).items() if v)
    if (folder / "metrics.json").exists():
        said = f"finished; {said}"
    changed = _newest([*histories, folder / "config.json"])
    return Standing("training", folder, done, total, "epochs", said, changed)


def _grid(folder: Path) -> Standing | None:
    if not (folder / "grid.json").is_file():
        return None
    found = status(folder)
    said = f"{found['failed']} failed; at work: {', '.join(found['running']) or 'none known'}"
    records = [path for place in (folder, *folders(folder)) for path in place.glob("*.jsonl")]
    changed = _newest([folder / "grid.json", *records])
    return Standing("grid", folder, found["done"], found["trials"], "trials", said, changed)


def line(at: Standing, before: Standing | None, seconds: float) -> str:
    """A line of text; the rate is what was done in the `seconds` since `before`."""
    if at.kind == "awaited":
        return f"waiting for {at.folder}: {at.said}"
    share = f"{at.done:,} of {at.total:,} {at.unit}"
    rate = ""
    if before is not None and before.unit == at.unit and at.done > before.done and seconds > 0:
        speed = (at.done - before.done) / seconds
        rate = f", {speed:,.2g} {at.unit}/s, {(at.total - at.done) / speed / 60:,.1f} min left"
    quiet = time.time() - at.changed
    silent = "" if at.finished or quiet < 120 else f", silent for {quiet / 60:,.0f} min"
    return f"{at.kind} {at.folder}: {share}{rate}{silent}; {at.said}"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _newest(paths: list[Path]) -> float:
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
