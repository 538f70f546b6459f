"""Crystals from files that were downloaded by hand → the same file and record as when fetched."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.crystal import Reject
from featurization.documents import document_id, loads
from featurization.records import Stream
from featurization.snapshot import Snapshot, checked_name, fetched
from featurization.sources import open_source
from featurization.streams import StreamBroken, json_elements, read_pieces

# Documents a chunk, which is what is held in memory.
CHUNK = 1000
# How an answer of the Materials Project's API begins; a table of Matbench has lists in `data`.
_ANSWER = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:data"\s*:\s*\[\s*[{\]]|meta"|errors")')
_JSON = "give .jsonl or .json files, packed or not, of the documents that the API answers with"


def convert(
    files: list[Path],
    path: Path,
    about: dict[str, Any],
    documents: Callable[[Path], Iterator[dict[str, Any]]],
    *,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the documents of all files to `path`; returns its record, which names the files.

    Raises:
        UserError: a file is not there, breaks off, holds no document, or one id comes twice.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"--from {file}: no such file", remedy="give the path of the download")
    sums = [{"file": file.name, "sha256": sha256_of(file)} for file in files]

    def work(snapshot: Snapshot) -> dict[str, Any]:
        everything = _unique(files, documents)
        for _ in islice(everything, snapshot.documents):
            pass
        while chunk := list(islice(everything, CHUNK)):
            snapshot.append(chunk)
        if not snapshot.chunks:
            raise UserError(f"{files[0]} holds no such documents", remedy="see xtal fetch --help")
        return about | {"from": sums}

    request = {"source": about["source"], "from": sums}
    return fetched(checked_name(path), request, work, restart=restart, say=say)


def _unique(
    files: Iterable[Path], documents: Callable[[Path], Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for file in files:
        try:
            for document in documents(file):
                id = document_id(document)
                if not id or id in seen:
                    raise UserError(
                        f"{file}: " + (f"{id} is there twice" if id else "a document without id"),
                        remedy="give each file once, and no files that overlap",
                    )
                seen.add(id)
                yield document
        except (StreamBroken, Reject) as error:
            raise UserError(f"{file}: {error}", remedy="download it again") from None


def summaries(file: Path) -> Iterator[dict[str, Any]]:
    """Documents of the Materials Project: one a line, a list of them, or an answer of its API.

    Raises:
        StreamBroken, Reject: the file breaks off, or is no JSON.
    """
    if ".jsonl" not in file.name and _ANSWER.match(b"".join(islice(read_pieces(file), 1))):
        return _data(file)
    try:
        source = open_source(str(file))
    except UserError as error:  # its remedy names more than --from takes
        raise UserError(error.problem, remedy=_JSON) from None
    if not isinstance(source, Stream):
        raise UserError(f"{file} holds no JSON documents", remedy=_JSON)
    return _objects(text for _, text in source.stream())


def structures(file: Path) -> Iterator[dict[str, Any]]:
    """Entries of OPTIMADE: answers of a server as they came, or the standard's JSON Lines.

    Raises:
        StreamBroken, Reject: as above.
    """
    entries = summaries(file) if ".jsonl" in file.name else _data(file)
    return (entry for entry in entries if entry.get("type") == "structures")


def _data(file: Path) -> Iterator[dict[str, Any]]:
    """The documents in an answer of a server, `{"data": […], …}`."""
    elements = json_elements(read_pieces(file))
    return _objects(text for key, text in elements if key == "data")


def _objects(texts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    return (each for each in map(loads, texts) if isinstance(each, dict))
