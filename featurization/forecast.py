"""What a featurization will do and take, from a timed sample: `xtal featurize --dry-run`."""

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster import memory
from cluster.errors import UserError
from cluster.mpi import Ranks
from featurization import journal
from featurization.config import FeaturizationConfig
from featurization.crystal import Reject
from featurization.featurize import hold
from featurization.guard import Guard
from featurization.index import index_is_whole
from featurization.manifest import read_manifest
from featurization.origin import described
from featurization.records import Record, Source, Stream, broken_end
from featurization.resume import Found, damaged, id_hash, look
from featurization.shards import Entry, read_ids, write_shard
from featurization.sources import open_source
from featurization.streams import StreamBroken
from featurization.worker import crystal_of, entry_of, warm_up

_SAMPLE = 256
_SAMPLE_SECONDS = 20.0  # after which no more crystals of the sample are tried
_LOADING = 8  # first records: they load tables and libraries, and do not count where many follow
_PLACE_BYTES = 20  # of a record in the index


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to show: names → values, and sentences of warning."""

    rows: dict[str, str | int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    alone: float = 0.0  # s, of one rank while the others wait
    shared: float = 0.0  # s of one rank, which all share
    memory: int = 0  # bytes of a rank


def forecast(
    spec: str, out: Path, config: FeaturizationConfig, ranks: Ranks, *, append: bool = False
) -> Forecast:
    """Expectations for the same call of `featurize`; each rank may call it, rank 0 alone works.

    Returns:
        What is left to do in `out`, and what it takes; empty on other ranks. Times are of this
        machine as it is now, ids are those that a source tells before it is parsed. Nothing is
        written into `out`.

    Raises:
        UserError: as `featurize` would, or the source has no records.
    """
    if ranks.rank != 0:
        return Forecast()
    with ExitStack() as held:
        place = _place(out, held)
        source = open_source(spec, id_prop_label=config.id_prop_label)
        begun = time.perf_counter()
        plan = journal.read_plan(out)
        about = described(source, plan.source if plan else {})
        found = look(out, about, config, append=append)
        if found.finished:
            manifest = found.manifest or {}
            there = "finished, of just this source and configuration: nothing to do"
            return Forecast({str(out): there, "structures": manifest["structures"]})
        left = _left(source, out, found)
    reading = time.perf_counter() - begun
    walk = _walk(source, left)
    reading = reading if left.indexed else time.perf_counter() - begun
    if not walk.records:
        raise UserError(f"{spec} has no records", remedy="give a source with crystals")
    rows = _what(out, found, walk)
    warnings = [f"{spec} ends early: {walk.damage}"] if walk.damage else []
    if not walk.sample:
        return Forecast(rows, warnings)
    done = _try(source, walk.sample, left.known, config)
    share = walk.left / done.records
    structures, size = round(share * len(done.entries)), round(share * done.bytes)
    full = config.shard_structures
    if done.bytes:
        full = min(full, max(1, round((config.shard_mib << 20) * len(done.entries) / done.bytes)))
    spool = 0 if left.indexed else walk.spool + _PLACE_BYTES * walk.records
    free = shutil.disk_usage(place).free
    # A shard's crystals are held until it is full, then put together, packed, and laid into a file.
    held_points = 4 * full * sum(e.nbytes for e in done.entries) // max(1, len(done.entries))
    needs = memory.resident() + held_points
    seconds = done.seconds * walk.left + done.parsing * walk.known
    if not done.entries:
        warnings.append("no crystal of the sample could be featurized")
    if size + spool > free:
        warnings.append(
            f"it will not fit: about {_bytes(size + spool)} needed, {_bytes(free)} free at {place}"
        )
    tried = f"{done.records} records, {done.rejected} rejected"
    return Forecast(
        rows
        | {
            "sample": tried if done.reason is None else f"{tried}, first: {done.reason}",
            "structures": f"about {structures:,}",
            "points": f"about {round(share * sum(len(e.cloud.hkl) for e in done.entries)):,}",
            "shards": f"about {max(min(ranks.size, structures), -(-structures // full)):,}",
            "disk needed": f"about {_bytes(size)} of shards, {_bytes(spool)} to read the source",
            "disk free": _bytes(free),
            "reading the source": f"{reading:.1f} s, once, on one rank",
            "featurizing": f"{1e3 * done.seconds:.2f} ms a record and rank",
            "ranks": ranks.size,
            "memory": f"about {_bytes(needs)} a rank",
            "minutes": f"about {(reading + seconds / ranks.size) / 60:,.1f}",
        },
        warnings,
        reading,
        seconds,
        needs,
    )


def _place(out: Path, held: ExitStack) -> Path:
    """The folder that there is of `out` and those above it; what `featurize` refuses is refused."""
    place = out.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if place == out.absolute():
        hold(out, held)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        why = os.strerror(errno.EACCES if place.is_dir() else errno.ENOTDIR)
        raise UserError(f"cannot write to {out}: {why}", remedy="give another folder, or make room")
    return place


@dataclass(frozen=True, slots=True)
class _Left:
    """Which records of a source are not done, by what `out` holds."""

    done: NDArray[np.bool_]  # by block
    block: int
    known: frozenset[int]  # hashes of the ids of earlier parts
    indexed: bool  # whether the source need not be walked any more


def _left(source: Source, out: Path, found: Found) -> _Left:
    plan, manifest = found.plan, found.manifest
    if plan is None:
        done, block, part, indexed = np.zeros(0, dtype=bool), 1, None, False
    else:
        done, block, part = journal.done_blocks(out, plan), plan.block, plan.part
        indexed = index_is_whole(source, out / journal.FOLDER, plan.index)
        rows = journal.committed_shards(out)
        lost = set(damaged(out, rows))
        for start, stop in (s for row in rows if row["file"] in lost for s in row["records"]):
            done[start // block : -(-stop // block)] = False
        if plan.part:
            manifest = read_manifest(out)
    known: set[int] = set()
    for row in manifest["shards"] if manifest else []:
        if part is None or row["part"] < part:
            known.update(id_hash(id) for id in read_ids(out / row["file"])[0])
    return _Left(done, block, frozenset(known), indexed)


@dataclass(slots=True)
class _Walk:
    """What a source has."""

    records: int = 0
    left: int = 0  # of these, not done and not known
    known: int = 0  # of these, not done and known since earlier parts
    spool: int = 0  # bytes, unpacked; 0 if the file is read in place
    damage: str | None = None
    sample: list[Record] = field(default_factory=list)  # of those left, the same each time


def _walk(source: Source, left: _Left) -> _Walk:
    chosen = random.Random(0)
    walk = _Walk()
    for record in _records(source, walk):
        walk.records += 1
        at = record.index // left.block
        if at < len(left.done) and left.done[at]:
            continue
        if left.known and record.id and id_hash(record.id) in left.known:
            walk.known += 1
            continue
        walk.left += 1
        if len(walk.sample) < _SAMPLE:
            walk.sample.append(record)
        elif (place := chosen.randrange(walk.left)) < _SAMPLE:
            walk.sample[place] = record
    chosen.shuffle(walk.sample)  # where time ends the sample, what was tried is one as well
    return walk


def _records(source: Source, walk: _Walk) -> Iterator[Record]:
    """As `featurization.index` reads them, which writes what it unpacks into a file."""
    if not isinstance(source, Stream):
        yield from source.records()
        return
    try:
        for index, (_, payload) in enumerate(source.stream()):
            walk.spool += 0 if source.in_place else len(payload)
            yield source.record(index, payload)
    except StreamBroken as error:
        walk.damage = str(error)
        yield broken_end(walk.records, walk.damage)


@dataclass(slots=True)
class _Try:
    """What became of a sample."""

    records: int = 0  # tried before the time was over
    seconds: float = 0.0  # a record
    parsing: float = 0.0  # of that, until its id is known
    rejected: int = 0
    reason: str | None = None  # of the first reject
    entries: list[Entry] = field(default_factory=list)
    bytes: int = 0  # of a shard of these


def _try(
    source: Source, sample: list[Record], known: frozenset[int], config: FeaturizationConfig
) -> _Try:
    warm_up(config)
    done = _Try()
    times: list[tuple[float, float]] = []  # of each record: until it is parsed, and in all
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock = time.perf_counter
        end = clock() + _SAMPLE_SECONDS
        with Guard(folder / "at", config.max_seconds) as guard:
            for record in sample:
                begun = parsed = clock()
                if times and begun > end:
                    break
                try:
                    with guard.watching(record.index):
                        crystal = crystal_of(source, record, config)
                        parsed = clock()
                        entry = entry_of(crystal, record.index, config)
                    if id_hash(entry.id) not in known:
                        done.entries.append(entry)
                except Reject as reject:
                    done.rejected += 1
                    done.reason = done.reason or str(reject)
                times.append((parsed - begun, clock() - begun))
        begun = clock()
        if done.entries:
            write_shard(path := folder / "shard.h5", done.entries, config)
            done.bytes = path.stat().st_size
        writing = clock() - begun
    done.records = len(times)
    usual = times[_LOADING:] if len(times) > 8 * _LOADING else times
    done.parsing, done.seconds = np.mean(usual, axis=0).tolist()
    done.seconds += writing / done.records
    return done


def _what(out: Path, found: Found, walk: _Walk) -> dict[str, str | int]:
    rows: dict[str, str | int] = {"records": walk.records}
    if found.plan is not None:
        there = "an unfinished run of just this: it goes on"
        rows |= {str(out): there, "records left": walk.left + walk.known}
    elif found.manifest is not None:
        there = f"a dataset of {found.manifest['structures']:,} structures, which is added to"
        rows |= {str(out): there, "new ids": walk.left, "ids there already": walk.known}
    else:
        rows |= {str(out): "a new dataset"}
    return rows


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 1 << 30 else f"{count / 2**30:,.1f} GiB"
