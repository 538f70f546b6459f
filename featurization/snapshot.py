"""A file of fetched crystals, and the record beside it: what it is, from where, since when.

While `OUT` is fetched it grows in the folder `OUT.partial`, which a later command goes on with:

    data      what has come so far; JSON Lines chunk by chunk, each on the disk before it counts
    journal   a line for what is fetched, one for each chunk (where it ends, how to go on), one for
              the finished record; each with its checksum
    ids.json  of the Materials Project: the ids that are fetched

`OUT` and `OUT.snapshot.json` appear when all is there.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import zstandard

from cluster.errors import RunFailed, UserError
from cluster.files import (
    append_line,
    disk_explained,
    exclusive,
    sha256_of,
    sync,
    whole_lines,
    write_text,
)
from featurization.documents import labels_from
from featurization.streams import StreamBroken, lines, read_pieces

SUFFIXES = (".jsonl.gz", ".jsonl.zst", ".jsonl")
_ELSEWHERE = "write into another folder, or move it away"
_RESTART = "give --restart to give up what has come, and begin again"


class Snapshot:
    """A file that is being fetched, begun or as an earlier command left it."""

    def __init__(self, path: Path, folder: Path, request: dict[str, Any]) -> None:
        self.path = path
        self.folder = folder
        self.data = folder / "data"
        self.chunks: list[dict[str, Any]] = []
        """What `append` was told of each chunk."""
        self.record: dict[str, Any] | None = None
        """The finished record, where only the last step is missing."""
        self._request = request
        self._journal = folder / "journal"
        if self._journal.exists():
            self._go_on()
        if not self._journal.exists():
            append_line(self._journal, json.dumps({"request": request}))

    def _go_on(self) -> None:
        text = self._journal.read_bytes()
        os.truncate(self._journal, text.rfind(b"\n") + 1)  # an unfinished line
        entries = [json.loads(line) for line in whole_lines(self._journal)]
        if not entries:
            self._journal.unlink()
            return
        if entries[0].get("request") != self._request:
            raise UserError(
                f"{self.folder} holds a part of something else: {json.dumps(entries[0])}",
                remedy=f"give another name for the file, or {_RESTART}",
            )
        self.record = entries[-1].get("record")
        self.chunks = [entry for entry in entries if "end" in entry]
        if self.record is None and self.chunks:
            numbers = [chunk["number"] for chunk in self.chunks]
            end = self.chunks[-1]["end"]
            if numbers != list(range(len(numbers))) or self.data.stat().st_size < end:
                raise RunFailed(f"{self.folder} is damaged", remedy=_RESTART)

    @property
    def documents(self) -> int:
        """Documents there so far."""
        return self.chunks[-1]["documents"] if self.chunks else 0

    def append(self, documents: Iterable[dict[str, Any]], **state: Any) -> None:
        """Add a chunk of documents; `state` comes back in `chunks` when another command goes on."""
        listed = list(documents)
        text = b"".join(orjson.dumps(each) + b"\n" for each in listed)
        end = self.chunks[-1]["end"] if self.chunks else 0
        with self.data.open("r+b" if end else "wb") as file:
            file.seek(end)
            end += file.write(_packed(self.path, text) if text else b"")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        labels = Counter(
            name for each in listed for name in labels_from(each.items(), known_only=True)
        )
        there = {"end": end, "documents": self.documents + len(listed)}
        chunk = {"number": len(self.chunks), **there, "labels": labels, **state}
        append_line(self._journal, json.dumps(chunk))
        self.chunks.append(chunk)

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Put the file and its record, which says `facts`, in their places; returns the record."""
        if self.record is None:
            if self.chunks:
                self._check_documents()
            there = self.data if self.data.exists() else self.path
            sync(there)
            labels = sum((Counter(chunk["labels"]) for chunk in self.chunks), Counter[str]())
            self.record = {
                "file": self.path.name,
                **facts,
                **({"documents": self.documents, "labels": labels} if self.chunks else {}),
                "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
                "request": self._request,
                "bytes": there.stat().st_size,
                "sha256": sha256_of(there),
                "program": f"crystal-genome {version('crystal-genome')}",
            }
            append_line(self._journal, json.dumps({"record": self.record}))
        if self.data.exists():
            if self.path.exists():
                raise UserError(f"{self.path} is there already", remedy="move it away")
            os.replace(self.data, self.path)
        if sha256_of(self.path) != self.record["sha256"]:
            raise RunFailed(f"{self.path} is not what was fetched", remedy=_RESTART)
        beside = self.folder / "record.json"
        write_text(beside, json.dumps(self.record, indent=1) + "\n")
        os.replace(beside, record_of(self.path))
        sync(self.path.parent)
        clear(self.folder)
        return self.record

    def _check_documents(self) -> None:
        """What lies on the disk is what was written there."""
        try:
            found = sum(1 for _ in lines(read_pieces(self.data)))
        except StreamBroken as error:
            raise RunFailed(f"{self.data} is damaged: {error}", remedy=_RESTART) from None
        if found != self.documents:
            raise RunFailed(
                f"{self.data} has {found} documents of {self.documents}", remedy=_RESTART
            )


def fetched(
    path: Path,
    request: dict[str, Any],
    work: Callable[[Snapshot], dict[str, Any]],
    *,
    restart: bool = False,
    unrecorded: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The record of `path`, which is what `request` asks for; `work` fetches what is not there.

    `work` fills a snapshot, and returns what its record shall say.

    Args:
        unrecorded: `path` is there and right, and only its record is missing.

    Raises:
        UserError: `path`, or what was fetched of it so far, is something else; or another job is
            at work on it.
        RunFailed: `work` cannot do it now.
    """
    folder = path.with_name(path.name + ".partial")
    with disk_explained(folder), exclusive(folder):
        try:
            if restart:
                clear(folder)
            if path.exists() and not unrecorded and not any(folder.iterdir()):
                record = finished(path, request)
                say(f"{path} is there already, whole")
                return record
            snapshot = Snapshot(path, folder, request)
            return snapshot.finish({} if snapshot.record else work(snapshot))
        finally:
            if [each.name for each in folder.iterdir()] in ([], ["journal"]):  # nothing came
                clear(folder)
                folder.rmdir()


def finished(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The record of a file that is there already.

    Raises:
        UserError: it is something else than `request` asks for.
    """
    try:
        record: dict[str, Any] = json.loads(record_of(path).read_bytes())
        same, sha256 = record["request"] == request, record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        same, sha256, record = False, "", {}
    if not same:
        raise UserError(f"{path} is there already, and is not this", remedy=_ELSEWHERE)
    if sha256 != sha256_of(path):
        raise UserError(f"{path} is not what {record_of(path)} says", remedy="move both away")
    return record


def record_of(path: Path) -> Path:
    """Where the record of a fetched file lies."""
    return path.with_name(path.name + ".snapshot.json")


def checked_name(path: Path) -> Path:
    """`path`, if its name says that it holds JSON Lines."""
    if not path.name.endswith(SUFFIXES) or path.name in SUFFIXES:
        raise UserError(
            f"{path} must end in {', '.join(SUFFIXES)}", remedy="for example crystals.jsonl.gz"
        )
    return path


def clear(folder: Path) -> None:
    """Remove the files of a folder, the journal last: without it, the rest means nothing."""
    for each in sorted(folder.iterdir(), key=lambda file: file.name == "journal"):
        each.unlink()


def _packed(path: Path, text: bytes) -> bytes:
    if path.suffix == ".gz":
        return gzip.compress(text, 6, mtime=0)
    return zstandard.compress(text) if path.suffix == ".zst" else text
