"""Crystals on their way to a trained model: any source → entries, in its order, nothing lost.

A crystal that cannot be featurized stays in the stream as its reason. Of the source, only a few
blocks are in memory at a time, whatever its length.
"""

import multiprocessing
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice, pairwise
from os import getpid
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError
from featurization.account import read_rejects
from featurization.cells import Symmetry
from featurization.cloud import Cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal, Reject
from featurization.documents import crystal_from_document
from featurization.guard import Guard
from featurization.manifest import read_manifest
from featurization.records import Record, Source, parsed
from featurization.shards import Entry, also_columns, read_ids
from featurization.sources import open_source
from featurization.structures import crystal_from_pymatgen
from featurization.validation import crystal_from_arrays
from featurization.worker import featurize_one
from training.identity import differences
from training.mapped import check, reading

# Id and entry; or id, as far as it is known, and why there is none.
Item = tuple[str, Entry | str]

_BLOCK = 64  # records a task of a process
_Block = list[tuple[str, Record]]  # each with its source


def of_structures(structures: Iterable[Any], config: FeaturizationConfig) -> Iterator[Item]:
    """Crystals at hand: pymatgen `Structure`s, their dicts, `Crystal`s, or paths of sources.

    They are featurized in this process. What has no id gets its number as one. One alone is taken
    for a list of itself.
    """
    # A path, a dict and a `Structure` are iterable, too: letters, keys, sites.
    alone = isinstance(structures, str | Path | Mapping) or hasattr(structures, "lattice")
    for number, given in enumerate([structures] if alone else structures):
        if not isinstance(given, str | Path):
            id = given.id if isinstance(given, Crystal) else f"structure-{number}"
            yield _item(_Given(), Record(number, id, given), config)
            continue
        try:
            source = open_source(str(given), id_prop_label=config.id_prop_label)
            yield from (_item(source, record, config) for record in source.records())
        except (UserError, OSError) as error:
            yield str(given), f"source: {error}".splitlines()[0]


def of_sources(specs: Sequence[str], config: FeaturizationConfig, processes: int) -> Iterator[Item]:
    """Everything that sources hold, one after the other, featurized by processes beside this one.

    Time and memory of a crystal are limited as in `xtal featurize`; one that ends its process is
    an item with a reason, too.

    Raises:
        UserError: no such source, before anything is done.
    """
    for spec in specs:
        open_source(spec, id_prop_label=config.id_prop_label)
    records = (
        (spec, record)
        for spec in specs
        for record in open_source(spec, id_prop_label=config.id_prop_label).records()
    )
    waiting: deque[tuple[_Block, Future[list[Item]] | None]] = deque()
    with tempfile.TemporaryDirectory() as folder:
        pool = _pool(processes, config, folder)
        try:
            while True:
                while len(waiting) <= 2 * processes and (block := list(islice(records, _BLOCK))):
                    waiting.append((block, _submit(pool, block)))
                if not waiting:
                    return
                block, future = waiting.popleft()
                items = _result(future)
                if items is None:
                    # Whose crystal it was, nobody knows: the blocks under way begin again.
                    pool.shutdown()
                    items = list(_one_by_one(block, config, folder))
                    pool = _pool(processes, config, folder)
                    waiting = deque((each, _submit(pool, each)) for each, _ in waiting)
                yield from items
        finally:
            pool.shutdown(cancel_futures=True)


def of_dataset(folder: Path, config: FeaturizationConfig) -> Iterator[Item]:
    """The crystals of a finished dataset in the order of its sources, and its rejects.

    Raises:
        UserError: featurized with other settings than `config`, of which each is named, or a shard
            is missing or damaged.
    """
    manifest = read_manifest(folder)
    theirs = FeaturizationConfig(**manifest["config"])
    if differing := differences(config, theirs):
        raise UserError(
            f"{folder} was featurized otherwise than what the model was trained on: "
            + "; ".join(differing),
            remedy="featurize it again with the model's settings, or give the crystals themselves",
        )
    paths = [folder / row["file"] for row in manifest["shards"]]
    for path, row in zip(paths, manifest["shards"], strict=True):
        with reading(path):  # or says that it is missing
            check(path, row["sha256"])
    rejects = list(read_rejects(folder / "rejects.csv"))
    indices = [read_ids(path)[1] for path in paths]
    indices.append(np.array([int(row[3]) for row in rejects], dtype=np.int64))
    shard = np.repeat(np.arange(len(indices)), [len(part) for part in indices])
    place = np.concatenate([np.arange(len(part)) for part in indices])
    order = np.argsort(np.concatenate(indices), kind="stable")
    shard, place = shard[order], place[order]
    # Runs of crystals that lie one after the other in one shard, too.
    breaks = (np.diff(shard) != 0) | (np.diff(place) != 1)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(order)]
    for first, beyond in pairwise(bounds):
        for begin in range(first, beyond, _BLOCK):
            rows = range(place[begin], place[begin] + min(_BLOCK, beyond - begin))
            if shard[begin] < len(paths):
                yield from ((e.id, e) for e in _read_rows(paths[shard[begin]], rows, theirs))
            else:
                yield from (
                    (id, f"{stage}: {reason}")
                    for id, stage, reason, _ in (rejects[row] for row in rows)
                )


class _Given:
    """A source of what is in memory already."""

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "memory"}

    def records(self) -> Iterator[Record]:
        return iter(())

    def parse(self, record: Record) -> Crystal:
        return parsed(record, lambda given: _validated(given, record.id))


def _validated(given: Any, id: str) -> Crystal:
    if isinstance(given, Mapping):
        return crystal_from_document(dict(given), id)
    if not isinstance(given, Crystal):
        return crystal_from_pymatgen(given, id, {})
    return crystal_from_arrays(
        id, given.lattice, given.positions, given.species, given.occupancy, given.site, {}
    )


def _item(source: Source, record: Record, config: FeaturizationConfig) -> Item:
    try:
        entry = featurize_one(source, record, config)
        return entry.id, entry
    except Reject as reject:
        return record.id, f"{reject.stage}: {reject.reason}"


def _read_rows(path: Path, rows: range, config: FeaturizationConfig) -> list[Entry]:
    """Some crystals of a shard, without formula and labels."""
    part = slice(rows.start, rows.stop)
    with reading(path) as file:
        offsets = file["offsets"][rows.start : rows.stop + 1]
        points = slice(offsets[0], offsets[-1])
        names = ("hkl", "q", "intensity", "multiplicity", *also_columns(config))
        columns = [file[name][points] for name in names]
        ids, groups = (file[name].asstr()[part] for name in ("id", "group"))
        kinds = ("point_group", "bravais", "crystal_system")
        symmetries = zip(
            file["symmetry/number"][part].tolist(),
            *(file[f"symmetry/{kind}"].asstr()[part] for kind in kinds),
            strict=True,
        )
        lattices, indices = file["lattice"][part], file["source_index"][part].tolist()
    answer = []
    for row, symmetry in enumerate(symmetries):
        own = slice(offsets[row] - offsets[0], offsets[row + 1] - offsets[0])
        hkl, q, intensity, multiplicity, *also = (column[own] for column in columns)
        cloud = Cloud(hkl, q, intensity, multiplicity, np.array(also, dtype=np.float32))
        entry = Entry(
            id=ids[row],
            group=groups[row],
            formula="",
            source_index=indices[row],
            cloud=cloud,
            lattice=lattices[row],
            symmetry=Symmetry(*symmetry),
            labels={},
        )
        answer.append(entry)
    return answer


def _one_by_one(block: _Block, config: FeaturizationConfig, folder: str) -> Iterator[Item]:
    """A block of which some crystal may end its process: each is tried alone."""
    pool = _pool(1, config, folder)
    try:
        for spec, record in block:
            items = _result(_submit(pool, [(spec, record)]))
            if items is None:
                pool.shutdown()
                pool = _pool(1, config, folder)
                items = [(record.id, "guard: ended the process that featurized it")]
            yield from items
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(processes: int, config: FeaturizationConfig, folder: str) -> ProcessPoolExecutor:
    # A fork of a process with threads, as PyTorch's are, can hang.
    return ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(config, folder),
    )


def _submit(pool: ProcessPoolExecutor, block: _Block) -> Future[list[Item]] | None:
    try:
        return pool.submit(_featurize, block)
    except BrokenProcessPool:
        return None


def _result(future: Future[list[Item]] | None) -> list[Item] | None:
    """None if a process died."""
    try:
        return None if future is None else future.result()
    except BrokenProcessPool:
        return None


# Of a process of the pool: settings, and folder for the guard's mark.
_at_work: tuple[FeaturizationConfig, Path]


def _begin(config: FeaturizationConfig, folder: str) -> None:
    global _at_work
    _at_work = config, Path(folder)


@lru_cache(maxsize=4)
def _opened(spec: str) -> Source:
    return open_source(spec, id_prop_label=_at_work[0].id_prop_label)


def _featurize(block: _Block) -> list[Item]:
    config, folder = _at_work
    items: list[Item] = []
    with Guard(folder / f"at-{getpid()}", config.max_seconds) as guard:
        for spec, record in block:
            try:
                with guard.watching(record.index):
                    item = _item(_opened(spec), record, config)
            except Reject as reject:  # the clock
                item = record.id, f"{reject.stage}: {reject.reason}"
            items.append(item)
    return items
