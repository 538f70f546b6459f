"""What a run of the driver begins with: nothing, an unfinished folder, or a dataset to add to."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.files import disk_explained, replacing, sha256_of
from cluster.mpi import Ranks, on_rank_0
from featurization import journal, logs
from featurization.attribution import recorded
from featurization.config import FeaturizationConfig, completed
from featurization.index import build_index, index_is_whole
from featurization.journal import Plan, read_plan, write_plan
from featurization.manifest import COPY, read_manifest, way_out
from featurization.origin import described
from featurization.records import Source, Stream
from featurization.shards import read_ids

# Records that a rank takes at a time: some 50 ms of work, and what a kill can cost at most, beside
# the open shard.
BLOCK = 64
DAMAGED = "damaged"  # folder for shards that were set aside
_OUR_FILES = {"shards", "manifest.json", COPY, "rejects.csv", "dataset.h5"}
_OUR_FOLDERS = {journal.FOLDER, logs.FOLDER, DAMAGED}
_OUR_SHARDS = re.compile(r"\.?shard-[\d-]+\.h5(\.\d+-[\da-f]+\.tmp)?$")
_KNOWN = "known.bin"


@dataclass(frozen=True, slots=True)
class Start:
    """What every rank knows before it claims its first block."""

    plan: Plan
    attempt: int
    remaining: NDArray[np.int32]  # blocks that are not done, without the following
    suspect: NDArray[np.int32]  # blocks at which processes died
    done: int  # records in blocks that are
    poisoned: dict[int, str]  # record → why it must not be tried again
    owner: str  # token of this job
    known: "KnownIds"


def begin(
    spec: str, source: Source, out: Path, config: FeaturizationConfig, ranks: Ranks, *, append: bool
) -> Start | dict[str, Any]:
    """Prepare `out`; every rank calls this.

    Returns:
        Where to start, or the manifest of a dataset that is finished and just this one.

    Raises:
        UserError: `out` holds something else, or cannot be written.
    """

    def writing(work: Callable[[], Any]) -> Any:
        try:
            with disk_explained(out):
                return work()
        except OSError as error:
            reason = f"cannot write to {out}: {error.strerror}"
            raise UserError(reason, remedy="give another folder, or make room") from None

    asked = spec, source, out, config, append
    plan = on_rank_0(ranks, lambda: writing(lambda: _decide(*asked)))
    if isinstance(plan, dict):
        return plan
    rows = on_rank_0(ranks, lambda: journal.committed_shards(out))
    found = ranks.gather(damaged(out, rows[ranks.rank :: ranks.size])) or []
    lost = [name for names in found for name in names]
    begun = on_rank_0(ranks, lambda: writing(lambda: _start(out, plan, lost)))
    attempt, remaining, suspect, done, poisoned, owner = begun
    known = KnownIds(out / journal.FOLDER / _KNOWN)
    return Start(plan, attempt, remaining, suspect, done, poisoned, owner, known)


def claim_step(blocks: int, size: int) -> int:
    """Blocks a claim: fewer claims on many ranks, and still about 30 a rank for balance."""
    return max(1, min(16, blocks // (32 * size)))


def damaged(out: Path, rows: Iterable[dict[str, Any]]) -> list[str]:
    """Those of the shards that are not there with the checksum of their row."""
    return [
        row["file"]
        for row in rows
        if not (out / row["file"]).is_file() or sha256_of(out / row["file"]) != row["sha256"]
    ]


def set_aside(out: Path, names: Iterable[str]) -> None:
    """Move shards to OUT/damaged; those that are gone stay gone."""
    for name in names:
        if (out / name).exists():
            (out / DAMAGED).mkdir(exist_ok=True)
            place = out / DAMAGED / Path(name).name
            while place.exists():  # nothing that was set aside before is lost
                place = place.with_name(f"{place.name}.again")
            (out / name).replace(place)


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in a folder that may be worked in; neither of the two where it is a new one."""

    plan: Plan | None = None  # an unfinished run of just this question
    manifest: dict[str, Any] | None = None  # a finished dataset, to be added to
    finished: bool = False  # the dataset is just this one, so that there is nothing to do


def look(
    out: Path, described: dict[str, Any], config: FeaturizationConfig, *, append: bool
) -> Found:
    """Judge what lies in `out`, given what the source says of itself; nothing is written.

    Raises:
        UserError: `out` holds something else.
    """
    asked = {"source": described, "config": config.model_dump(mode="json")}
    plan = read_plan(out)
    if plan is not None:
        if differences := _differences({"source": plan.source, "config": plan.config}, asked):
            raise UserError(
                f"{out} holds an unfinished run of another question ({differences})",
                remedy="finish that one first, give another folder, or remove this one",
            )
        own = f"shard-{plan.part:03d}-"
        shards = (out / "shards").glob("shard-*")
        if plan.part or any(not path.name.startswith(own) for path in shards):
            read_manifest(out)  # without it, the end of this run would forget the other parts
        return Found(plan=plan)
    if (out / "manifest.json").exists():
        manifest = read_manifest(out)
        made = completed(manifest["config"])
        theirs = [{"source": source, "config": made} for source in manifest["sources"]]
        if any(not _differences(each, asked) for each in theirs):
            return Found(manifest=manifest, finished=True)
        if not append:
            raise UserError(
                f"{out} holds another dataset ({_differences(theirs[0], asked)})",
                remedy="give another folder, remove this one, or add to it with --append",
            )
        if changed := _differences({"config": made}, {"config": asked["config"]}):
            raise UserError(
                f"{out} was made with another configuration ({changed})",
                remedy="append with the same configuration",
            )
        return Found(manifest=manifest)
    if append:
        raise UserError(f"{out} holds no dataset", remedy="leave --append away")
    _check_room(out)
    return Found()


def _decide(
    spec: str, source: Source, out: Path, config: FeaturizationConfig, append: bool
) -> Plan | dict[str, Any]:
    before = _stat(source)
    begun = read_plan(out)
    about = described(source, begun.source if begun else {})
    found = look(out, about, config, append=append)
    if found.plan is not None:
        if not index_is_whole(source, out / journal.FOLDER, found.plan.index):
            build_index(source, out / journal.FOLDER, found.plan.index.count)
        return replace(found.plan, spec=absolute(spec))  # the same source can have moved
    part, first_record = 0, 0
    if found.manifest is None:
        _clear(out)
    elif found.finished:
        journal.remove_journal(out)  # should the end of that run have been cut short
        return found.manifest
    else:
        part = len(found.manifest["sources"])
        first_record = sum(each["records"] for each in found.manifest["sources"])
    folder = out / journal.FOLDER
    journal.remove_journal(out)
    folder.mkdir(parents=True)
    (out / "shards").mkdir(exist_ok=True)
    index, said = build_index(source, folder), recorded(source, about)
    if _stat(source) != before:
        raise UserError(f"{spec} is being written to", remedy="wait until it is complete")
    block = min(BLOCK, config.shard_structures)
    asked = config.model_dump(mode="json")
    plan = Plan(part, first_record, absolute(spec), about, asked, index, block, said)
    if part:
        write_known_ids(out, plan)
    write_plan(out, plan)
    return plan


def _stat(source: Source) -> tuple[int, int] | None:
    if not isinstance(source, Stream):
        return None
    stat = source.path.stat()
    return stat.st_size, stat.st_mtime_ns


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return "; ".join(
        f"{part}.{key}: {there[part].get(key)!r} there, {value!r} asked for"
        for part in asked
        for key, value in asked[part].items()
        if there[part].get(key) != value and not (key == "path" and "sha256" in asked[part])
    )


def _check_room(out: Path) -> None:
    """That a new dataset can be made here: what is not ours is never touched."""
    if out.exists():
        if any((out / "shards").glob("shard-*.h5")):
            raise UserError(
                f"{out} holds shards, but neither a manifest.json nor a journal that list them",
                remedy=f"{way_out(out)}; or remove the folder",
            )
        strangers = {p.name for p in out.iterdir() if not p.name.startswith(".")}
        # Others have folders and files of these names, too: ours come with our logs.
        if (out / logs.FOLDER / "rank-00000.log").exists():
            strangers -= _OUR_FILES
        strangers -= _OUR_FOLDERS | {"shards"}
        for folder, ours in (("shards", _OUR_SHARDS), (journal.FOLDER, journal.OURS)):
            there = (out / folder).glob("*")
            strangers |= {f"{folder}/{p.name}" for p in there if not ours.match(p.name)}
        if strangers:
            raise UserError(
                f"{out} is not empty and holds no dataset ({', '.join(sorted(strangers)[:3])})",
                remedy="give a new folder",
            )


def _clear(out: Path) -> None:
    """Make room for a new dataset."""
    for name in _OUR_FILES - {"shards"}:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "shards", ignore_errors=True)


def _start(
    out: Path, plan: Plan, lost: list[str]
) -> tuple[int, NDArray[np.int32], NDArray[np.int32], int, dict[int, str], str]:
    """Rank 0: what is between `plan` and `known` in `Start`."""
    owner = journal.take_over(out)
    set_aside(out, lost)
    attempt = journal.next_attempt(out, plan.part)
    listed = {row["file"] for row in journal.committed_shards(out)}
    own = f"shard-{plan.part:03d}-"
    for path in (out / "shards").iterdir():  # renamed or begun, but never committed
        if path.name.lstrip(".").startswith(own) and f"shards/{path.name}" not in listed:
            path.unlink()
    for name in _OUR_FILES:  # begun by a process that died
        for path in out.glob(f".{name}.*.tmp"):
            path.unlink()
    done = journal.done_blocks(out, plan)
    remaining = np.flatnonzero(~done).astype(np.int32)
    count, block = plan.index.count, plan.block
    records = count - sum(min(block, count - int(number) * block) for number in remaining)
    poisoned, suspects = journal.deaths(out)
    suspect = np.isin(remaining, [record // plan.block for record in suspects])
    return attempt, remaining[~suspect], remaining[suspect], records, poisoned, owner


def absolute(spec: str) -> str:
    """The source's word, independent of the working folder: `verify` opens it again."""
    if spec.partition(":")[0] == "prototypes":  # the word, even beside a folder of that name
        return spec
    return str(Path(spec).resolve()) if Path(spec).exists() else spec


def id_hash(id: str) -> int:
    """64 bits of an id; two ids of a million share one with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def write_known_ids(out: Path, plan: Plan) -> None:
    """Hashes of the ids of all earlier parts, sorted, 8 bytes each."""
    rows = [row for row in read_manifest(out)["shards"] if row["part"] < plan.part]
    hashes = [np.array([id_hash(i) for i in read_ids(out / r["file"])[0]], "<u8") for r in rows]
    with replacing(out / journal.FOLDER / _KNOWN) as temporary:
        np.sort(np.concatenate([np.zeros(0, "<u8"), *hashes])).tofile(temporary)


class KnownIds:
    """Ids of earlier parts; read from disk as needed, not held."""

    def __init__(self, path: Path) -> None:
        there = path.exists() and path.stat().st_size
        self._sorted = np.memmap(path, "<u8", "r") if there else np.zeros(0, "<u8")

    def __contains__(self, id: str) -> bool:
        if not len(self._sorted):
            return False
        wanted = np.uint64(id_hash(id))
        place = int(np.searchsorted(self._sorted, wanted))
        return place < len(self._sorted) and bool(self._sorted[place] == wanted)
