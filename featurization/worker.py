"""One rank at work: claimed blocks of records → entries and rejects → commits."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cluster.errors import RunFailed
from cluster.files import disk_explained
from cluster.mpi import Board, Ranks
from featurization.cells import standardize
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, Reject
from featurization.guard import Guard, StopSignals
from featurization.index import Records
from featurization.journal import FOLDER, Commit, check_owner, joined, write_commit
from featurization.logs import RankLog
from featurization.records import Record, Source
from featurization.resume import Start, claim_step
from featurization.shards import Entry, write_shard
from featurization.validation import crystal_from_arrays

# A rank that goes on without a commit for longer would lose too much when it is killed, s.
_COMMIT_AFTER = 300.0
_MAX_ID = 256
# Characters of an id or a reason in rejects.csv; readers of CSV refuse fields of 128 KiB.
_MAX_SHOWN = 300
# Columns of the board.
_SEEN, _REJECTED, _BUSY_MS, _FINISHED = range(4)
WIDTH = 4


@dataclass(frozen=True, slots=True)
class Progress:
    """How far all ranks together are."""

    done: int  # records, with those of earlier runs
    total: int
    rejected: int  # in this run
    imbalance: float  # the busiest rank's time at work over the mean of all


def featurize_one(source: Source, record: Record, config: FeaturizationConfig) -> Entry:
    """One record → one entry of a shard.

    Raises:
        Reject: with the stage and the reason; nothing else, whatever the record holds.
    """
    return entry_of(crystal_of(source, record, config), record.index, config)


def crystal_of(source: Source, record: Record, config: FeaturizationConfig) -> Crystal:
    """The first half of `featurize_one`: a crystal within the limits of `config`."""
    crystal = source.parse(record)
    if not crystal.id or not crystal.id.isprintable():
        raise Reject("source", f"id {crystal.id!r} is empty or has unprintable characters")
    if len(crystal.id) > _MAX_ID:
        raise Reject("source", f"id of {len(crystal.id)} characters; at most {_MAX_ID}")
    if len(crystal.species) > config.max_atoms:
        atoms = f"{len(crystal.species)} atoms exceed max_atoms = {config.max_atoms}"
        raise Reject("structure", atoms)
    if config.occupancy == "reject" and (crystal.occupancy < 1.0).any():
        raise Reject("structure", "partly occupied sites, and occupancy = reject")
    return crystal


def entry_of(crystal: Crystal, index: int, config: FeaturizationConfig) -> Entry:
    """The second half of `featurize_one`, given the record's number."""
    try:
        standard, symmetry = standardize(crystal, config.cell, config.symprec)
        formula = standard.reduced_formula
        hydride = _undeuterated(standard) if "D" in standard.species else formula
        return Entry(
            id=crystal.id,
            group=crystal.group or hydride,
            formula=formula,
            source_index=index,
            cloud=diffraction_cloud(standard, config),
            lattice=standard.lattice,
            symmetry=symmetry,
            labels=crystal.labels,
        )
    except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise Reject("internal", f"{type(error).__name__}: {error}") from error


def _undeuterated(crystal: Crystal) -> str:
    """Formula of the hydride that a deuteride is grouped with: the two have one X-ray cloud."""
    species = tuple("H" if name == "D" else name for name in crystal.species)
    return replace(crystal, species=species).reduced_formula


@dataclass
class Worker:
    """One rank at work, between two commits."""

    source: Source
    out: Path
    config: FeaturizationConfig
    ranks: Ranks
    board: Board
    start: Start
    signals: StopSignals
    log: RankLog
    entries: list[Entry] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    rejects: list[tuple[int, str, str, str]] = field(default_factory=list)
    present: int = 0
    bytes: int = 0
    shards: int = 0
    committed_at: float = field(default_factory=time.monotonic)
    row: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    def work(self, progress: Callable[[Progress], None]) -> None:
        records = Records(self.source, self.out / FOLDER, self.start.plan.index)
        marker = self.out / FOLDER / f"at-{self.start.attempt:04d}-{self.ranks.rank:05d}"
        warm_up(self.config)
        if self.ranks.rank == 0:
            progress(self.so_far())
        with disk_explained(self.out), Guard(marker, self.config.max_seconds) as guard:
            if len(self.start.suspect):
                try:
                    if self.ranks.rank == 0:
                        self._blocks(self.start.suspect.tolist(), records, guard, progress)
                finally:
                    self.ranks.broadcast(None)  # nobody else is at a crystal before
            self._blocks(self._claimed(), records, guard, progress)

    def _blocks(
        self,
        blocks: Iterable[int],
        records: Records,
        guard: Guard,
        progress: Callable[[Progress], None],
    ) -> None:
        """Featurize and commit blocks, until there are no more or a signal came."""
        plan = self.start.plan
        shown = time.monotonic()
        for block in blocks:
            span = block * plan.block, min((block + 1) * plan.block, plan.index.count)
            if not self._block(records.read(*span), guard):
                break
            self.ranges.append(span)
            guard.rest()
            if self._due():
                self._commit()
            if self.ranks.rank == 0 and time.monotonic() > shown + 0.2:
                shown = time.monotonic()
                progress(self.so_far())
        guard.rest()
        self._commit()

    def _claimed(self) -> Iterator[int]:
        """Numbers of blocks that nobody else has, until there are none or a signal came."""
        remaining = self.start.remaining
        step = claim_step(len(remaining), self.ranks.size)
        while (first := self.board.claim(step)) < len(remaining):
            yield from (int(block) for block in remaining[first : first + step])

    def _block(self, records: Iterable[Record], guard: Guard) -> bool:
        """Featurize a block whole; False, and nothing of it kept, if a signal comes before."""
        begun = time.process_time()
        entries, rejects, present = [], [], 0
        for record in records:  # one at a time: they can be large
            if self.signals.received:
                self.board.stop()
                return False
            self.board.attend()
            try:
                with guard.watching(record.index):
                    entry = self._one(record)
                if entry is None:
                    present += 1
                else:
                    entries.append(entry)
            except Reject as reject:
                id_, reason = _writable(record.id), _writable(reject.reason)
                rejects.append((record.index, id_, reject.stage, reason))
                self.log.say(f"record {record.index} ({id_}): {reject.stage}: {reason}")
            except Exception as error:
                error.add_note(f"while at record {record.index} (id {_writable(record.id)!r})")
                self.log.say_traceback()
                raise
        if self.entries and len(self.entries) + len(entries) > self.config.shard_structures:
            self._commit()
        self.entries += entries
        self.bytes += sum(entry.nbytes for entry in entries)
        self.rejects += rejects
        self.present += present
        self.row[_SEEN] += len(entries) + len(rejects) + present
        self.row[_REJECTED] += len(rejects)
        self.row[_BUSY_MS] += round(1e3 * (time.process_time() - begun))
        self.board.post(self.row)
        return True

    def _one(self, record: Record) -> Entry | None:
        """None if the dataset has this id since an earlier part."""
        if record.index in self.start.poisoned:
            raise Reject("guard", self.start.poisoned[record.index])
        crystal = crystal_of(self.source, record, self.config)
        if crystal.id in self.start.known:
            return None
        return entry_of(crystal, self.start.plan.first_record + record.index, self.config)

    def _due(self) -> bool:
        return (
            len(self.entries) >= self.config.shard_structures
            or self.bytes >= self.config.shard_mib << 20
            or time.monotonic() > self.committed_at + _COMMIT_AFTER
        )

    def _commit(self) -> None:
        if not self.ranges:
            return
        shard = None
        if self.entries:
            plan = self.start.plan
            place = f"{plan.part:03d}-{self.start.attempt:04d}-{self.ranks.rank:05d}"
            path = self.out / "shards" / f"shard-{place}-{self.shards:05d}.h5"
            shard = write_shard(path, self.entries, self.config)
            shard |= {"part": plan.part, "records": joined(self.ranges), "present": self.present}
            self.shards += 1
        try:
            check_owner(self.out, self.start.owner)
        except RunFailed:
            if shard:
                # The run that took over may have looked for leftovers before this one was there.
                (self.out / shard["file"]).unlink(missing_ok=True)
            raise
        commit = Commit(shard, joined(self.ranges), self.rejects, self.present)
        write_commit(self.out, self.start.attempt, self.ranks.rank, commit)
        self.log.say(f"committed {len(self.entries)} crystals, {len(self.rejects)} rejects")
        self.entries, self.ranges, self.rejects, self.present, self.bytes = [], [], [], 0, 0
        self.committed_at = time.monotonic()

    def so_far(self) -> Progress:
        """Rank 0's view of all ranks."""
        rows = self.board.rows()
        busy = rows[:, _BUSY_MS]
        return Progress(
            done=self.start.done + int(rows[:, _SEEN].sum()),
            total=self.start.plan.index.count,
            rejected=int(rows[:, _REJECTED].sum()),
            imbalance=float(busy.max() / busy.mean()) if busy.any() else 1.0,
        )

    def wait_for_all(self, progress: Callable[[Progress], None]) -> None:
        """Rank 0 shows what the others still do; they go on."""
        self.row[_FINISHED] = 1
        self.board.post(self.row)
        while self.ranks.rank == 0 and not self.board.rows()[:, _FINISHED].all():
            progress(self.so_far())
            time.sleep(0.02)
        if self.ranks.rank == 0:
            progress(self.so_far())


def warm_up(config: FeaturizationConfig) -> None:
    """Load tables and compiled kernels before a crystal's time is measured and limited."""
    with suppress(Reject):
        one = np.zeros(1, dtype=np.int64)
        copper = crystal_from_arrays(
            "", 4.0 * np.eye(3), np.zeros((1, 3)), ["Cu"], np.ones(1), one, {}
        )
        entry_of(copper, 0, config)


def _writable(text: str) -> str:
    """Broken encodings and line ends made visible; what is long is shortened."""
    short = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text)} characters)"
    visible = short.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in visible)
