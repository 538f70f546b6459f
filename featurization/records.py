"""What every source has in common: raw records, and the rule that nothing is lost silently."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from featurization.crystal import Crystal, Reject
from featurization.streams import StreamBroken


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a source, not parsed yet."""

    index: int  # position in the source from 0, the same on each rank
    id: str  # best guess before parsing, "" if unknown
    payload: Any  # raw; a `Damage` where the source itself is broken


@dataclass(frozen=True, slots=True)
class Damage:
    """In place of a payload: the source cannot give this record, or none from here on."""

    reason: str


class Source(Protocol):
    """Crystals of one origin: a `Listing` or a `Stream`."""

    def describe(self) -> dict[str, str | int | float]:
        """Provenance: kind, file name, content hash, settings."""

    def records(self) -> Iterator[Record]:
        """All records in a stable order, streamed; a source that breaks ends with a `Damage`."""

    def parse(self, record: Record) -> Crystal:
        """The crystal of a record of this source.

        Raises:
            Reject: whatever is wrong with it.
        """


@runtime_checkable
class Listing(Source, Protocol):
    """A source that knows its records by number, such as the prototypes."""

    def __len__(self) -> int:
        """How many records there are."""

    def record(self, index: int) -> Record:
        """The record of a number."""


@runtime_checkable
class Stream(Source, Protocol):
    """A source of records after each other: one file, or a folder, whose records name files."""

    path: Path
    in_place: bool
    """Whether records are bytes of the file as it lies there, neither compressed nor cut out."""

    def stream(self) -> Iterator[tuple[int, bytes]]:
        """Where each record begins (a position in the file if `in_place`), and its bytes.

        Raises:
            StreamBroken: the file cannot be read on.
        """

    def record(self, index: int, payload: bytes) -> Record:
        """The record of a number, given its bytes."""


def listed(source: Listing) -> Iterator[Record]:
    """All records of a listing."""
    return (source.record(index) for index in range(len(source)))


def streamed(source: Stream) -> Iterator[Record]:
    """All records of a stream; where it breaks, a last one that is a `Damage`."""
    index = 0
    try:
        for _, payload in source.stream():
            yield source.record(index, payload)
            index += 1
    except StreamBroken as error:
        yield broken_end(index, str(error))


def broken_end(index: int, reason: str) -> Record:
    """In place of all records that a broken stream cannot give."""
    return Record(index, "", Damage(f"stream ends early: {reason}"))


def parsed(record: Record, parse: Callable[[Any], Crystal]) -> Crystal:
    """`parse(record.payload)`, where whatever goes wrong is a `Reject`."""
    if isinstance(record.payload, Damage):
        raise Reject("source", record.payload.reason)
    try:
        return parse(record.payload)
    except Reject:
        raise
    except Exception as error:  # a parser met garbage that nobody thought of
        raise Reject("source", f"unreadable: {type(error).__name__}: {error}") from error
