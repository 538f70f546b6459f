"""Where each record of a source lies, so that every rank reads only its own.

A listing (the prototypes) needs nothing. A stream is walked once, by one rank: the start, the
length and a checksum of each record, 20 bytes, go to a file. What is compressed, or cut out of one
big JSON document, is copied there record by record too, because nothing else can be read from its
middle; of a folder, the name of each record's file.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster.errors import RunFailed
from featurization.folders import StructureFolder
from featurization.records import Listing, Record, Source, Stream, broken_end
from featurization.streams import StreamBroken

_PLACES, _COPY = "places.bin", "records.bin"
_PLACE = struct.Struct("<qqI")  # start, length, CRC-32


@dataclass(frozen=True, slots=True)
class Index:
    """What `build_index` found; the rest lies in its folder."""

    count: int  # records, with that of a broken end
    damage: str | None  # why the stream ends early; the last record stands for it


def build_index(source: Source, folder: Path, limit: int | None = None) -> Index:
    """Walk a source once; one rank calls this.

    Args:
        limit: records to take at most, of a stream that has grown.

    Raises:
        OSError: the folder cannot be written.
    """
    if isinstance(source, Listing):
        return Index(len(source), None)
    assert isinstance(source, Stream)
    damage, count, end = None, 0, 0
    # What a crash leaves of these is begun anew: the plan that makes them count comes after.
    with (folder / _PLACES).open("wb") as places, (folder / _COPY).open("wb") as copy:
        try:
            for start, payload in islice(source.stream(), limit):
                if not source.in_place:
                    start = end
                    copy.write(payload)
                places.write(_PLACE.pack(start, len(payload), zlib.crc32(payload)))
                end = start + len(payload)
                count += 1
        except StreamBroken as error:
            damage = str(error)
        for stream in (places, copy):
            stream.flush()
            os.fsync(stream.fileno())
    return Index(count + (damage is not None), damage)


def index_is_whole(source: Source, folder: Path, index: Index) -> bool:
    """Whether what `build_index` left is still there, as far as sizes tell."""
    if isinstance(source, Listing):
        return True
    places = folder / _PLACES
    expected = _PLACE.size * (index.count - (index.damage is not None))
    return places.is_file() and places.stat().st_size == expected and (folder / _COPY).is_file()


class Records:
    """The records of a source by number."""

    def __init__(self, source: Source, folder: Path, index: Index) -> None:
        self._count = index.count
        self._record: Callable[[int], Record] = self._streamed
        if isinstance(source, Listing):
            self._record = source.record
            return
        assert isinstance(source, Stream)
        self._stream, self._damage = source, index.damage
        self._file = (source.path if source.in_place else folder / _COPY).open("rb")
        self._places = (folder / _PLACES).open("rb")

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """Records start … stop − 1.

        Raises:
            RunFailed: the file that is read in place is not what it was.
        """
        return (self._record(number) for number in range(start, min(stop, self._count)))

    def _streamed(self, number: int) -> Record:
        if self._damage is not None and number == self._count - 1:
            return broken_end(number, self._damage)
        self._places.seek(number * _PLACE.size)
        begin, length, checksum = _PLACE.unpack(self._places.read(_PLACE.size))
        self._file.seek(begin)
        payload = self._file.read(length)
        if zlib.crc32(payload) != checksum:
            raise source_changed(self._stream.path)
        return self._stream.record(number, payload)


def source_changed(path: Path) -> RunFailed:
    """What to say of a file that is not what it was."""
    return RunFailed(
        f"{path} changed while it was read",
        remedy="leave it alone; featurize it as it is now into a new folder",
    )


def check_unchanged(source: Source, described: dict[str, str | int | float]) -> None:
    """That files that records only name are still what was described; the records of one file
    are checked one by one when they are read.

    Raises:
        RunFailed: they are not.
    """
    if isinstance(source, Listing | StructureFolder) and source.describe() != described:
        raise RunFailed(
            "files of the source changed while they were read",
            remedy="leave them alone and give the same command again in a new folder",
        )
