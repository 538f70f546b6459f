"""What every source has in common: raw records, and the rule that nothing is lost silently."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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
    """Crystals of one origin. `records` is cheap, so that each rank can walk all of them."""

    def describe(self) -> dict[str, str | int | float]:
        """Provenance: kind, file name, content hash, settings."""

    def records(self) -> Iterator[Record]:
        """All records in a stable order, streamed; a source that breaks ends with a `Damage`."""

    def parse(self, record: Record) -> Crystal:
        """The crystal of a record of this source.

        Raises:
            Reject: whatever is wrong with it.
        """


def numbered(entries: Iterable[tuple[str, Any]]) -> Iterator[Record]:
    """Records of (id, payload) entries; where the stream breaks, a last one that is a `Damage`."""
    index = 0
    try:
        for id, payload in entries:
            yield Record(index, id, payload)
            index += 1
    except StreamBroken as error:
        yield Record(index, "", Damage(f"stream ends early: {error}"))


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
