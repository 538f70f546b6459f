"""Where crystals come from: one word names a source, whatever its format.

| given                              | read as                                                     |
|------------------------------------|-------------------------------------------------------------|
| `prototypes[:COUNT[:SEED]]`        | decorated AFLOW prototypes, nothing to download             |
| a folder                           | CIF and POSCAR files, labels in `id_prop.csv` (CGCNN)       |
| `*.cif`, `*.vasp`, `POSCAR*`       | one structure                                               |
| `*.csv`                            | a `cif` column (CDVAE, MP-20)                               |
| `*.jsonl`, `*.ndjson`              | Materials Project or JARVIS documents, one a line           |
| `*.json`                           | the same; a list of them (JARVIS-DFT); a Matbench table;    |
|                                    | a pymatgen `Structure.as_dict()`                            |

All of these files may be `.gz`, `.zst` or `.zip`.
"""

import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.archives import DocumentList, Matbench, guess_id
from featurization.crystal import Crystal, Reject
from featurization.documents import crystal_from_document, labels_from, loads
from featurization.folders import StructureFile, StructureFolder, is_structure_file
from featurization.prototypes import Prototypes
from featurization.records import Damage, Record, Source, parsed, streamed
from featurization.streams import StreamBroken, is_compressed, lines, read_pieces, zip_member
from featurization.structures import crystal_from_cif

__all__ = ["Record", "Source", "open_source"]

FORMATS = (
    "prototypes[:COUNT[:SEED]]; a folder of *.cif, *.vasp or POSCAR* files; one such file; "
    "*.jsonl, *.ndjson or *.json (Materials Project, JARVIS, Matbench) or *.csv with a `cif` "
    "column; all files also .gz, .zst or .zip"
)
_HEAD = 1 << 16
# csv's own limit is 128 KiB, less than the CIF of a large cell.
_MAX_FIELD = 16 << 20


def open_source(spec: str, *, id_prop_label: str = "target") -> Source:
    """The source that `spec` names (see the module's table).

    Args:
        spec: a path, or `prototypes`, `prototypes:COUNT`, `prototypes:COUNT:SEED`.
        id_prop_label: label of the second column of an `id_prop.csv` without header.

    Raises:
        UserError: no such file, or of no known format.
    """
    if spec == "prototypes" or spec.startswith("prototypes:"):
        return _prototypes(spec)
    path = Path(spec)
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{spec!r} is no file, folder or known word", remedy=f"give {FORMATS}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{spec!r} cannot be read", remedy="ask for permission to read it")
    if path.is_dir():
        return StructureFolder(path, id_prop_label)
    if is_structure_file(path.name):
        return StructureFile(path)
    kind = _inner_suffix(path)
    if kind == ".csv":
        return CifTable(path)
    if kind in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if kind == ".json":
        return _json_source(path)
    raise UserError(f"{spec!r} is of no known format", remedy=f"give {FORMATS}")


class JsonLines:
    """Materials Project or JARVIS documents, one JSON object a line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.in_place = not is_compressed(path)

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "jsonl", "path": self.path.name, "sha256": sha256_of(self.path)}

    def records(self) -> Iterator[Record]:
        return streamed(self)

    def stream(self) -> Iterator[tuple[int, bytes]]:
        position = 0
        for line in lines(read_pieces(self.path)):
            if not line.isspace():
                yield position, line
            position += len(line)

    def record(self, index: int, payload: bytes) -> Record:
        return Record(index, guess_id(payload), payload)

    def parse(self, record: Record) -> Crystal:
        fallback = f"{self.path.name.split('.')[0]}-{record.index}"
        return parsed(record, lambda line: crystal_from_document(loads(line), fallback))


class CifTable:
    """A CSV file with a header and a column `cif`; of the other columns, known labels are read.

    The id is the column `material_id`, else `id`, else the file's name and the row's number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.in_place = not is_compressed(path)
        try:
            rows = filter(None, _reader(lines(read_pieces(path))))
            self._header: list[str] = next(rows, [])
        except (StreamBroken, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {error}", remedy="save it anew") from None
        if self._header and "cif" not in self._header:
            raise UserError(
                f"{path} has the columns {self._header}, none of them `cif`",
                remedy="name the column that holds the CIF text `cif`",
            )
        ids = [name for name in ("material_id", "id") if name in self._header]
        self._id_column = self._header.index(ids[0]) if ids else None

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "csv", "path": self.path.name, "sha256": sha256_of(self.path)}

    def records(self) -> Iterator[Record]:
        return streamed(self)

    def stream(self) -> Iterator[tuple[int, bytes]]:
        """The lines of each row, also of one that is malformed."""
        taken: list[bytes] = []  # lines that the reader took since the last row
        again: list[bytes] = []  # lines that follow a malformed one, the next one last
        fresh = lines(read_pieces(self.path))

        def taking() -> Iterator[bytes]:
            while (line := again.pop() if again else next(fresh, None)) is not None:
                taken.append(line)
                yield line

        reader = _reader(taking())
        position, header = 0, True
        while True:
            try:
                row = next(reader, None)
            except csv.Error:  # an open quote took all that follows: only its line is to blame
                again += reversed(taken[1:])
                del taken[1:]
                reader, row = _reader(taking()), [""]
            if row is None:
                return
            payload = b"".join(taken)
            taken.clear()
            if row and not header:
                yield position, payload
            position += len(payload)
            header = header and not row

    def record(self, index: int, payload: bytes) -> Record:
        try:
            row = next(filter(None, _reader(lines([payload]))), [])
        except csv.Error as error:
            return Record(index, "", Damage(f"malformed CSV: {error}"))
        column = self._id_column
        return Record(index, row[column] if column is not None and column < len(row) else "", row)

    def parse(self, record: Record) -> Crystal:
        return parsed(record, lambda row: self._crystal(row, record))

    def _crystal(self, row: list[str], record: Record) -> Crystal:
        if len(row) != len(self._header):
            raise Reject("source", f"row of {len(row)} fields under {len(self._header)} columns")
        named = dict(zip(self._header, row, strict=True))
        try:
            named["cif"].encode()
        except UnicodeEncodeError:
            raise Reject("source", "the CIF text is not UTF-8") from None
        labels = labels_from(named.items(), known_only=True)
        id = record.id or f"{self.path.name.split('.')[0]}-{record.index}"
        return crystal_from_cif(named["cif"], id, labels)


def _reader(rows: Iterable[bytes]) -> Iterator[list[str]]:
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is rejected.
    text = (line.decode("utf-8", "surrogateescape") for line in rows)
    return csv.reader((line.removeprefix("\ufeff") for line in text), strict=True)


def _prototypes(spec: str) -> Prototypes:
    match = re.fullmatch(r"prototypes(?::(\d{1,8}))?(?::(\d{1,9}))?", spec)
    if match is None or int(match[1] or 1) < 1:
        raise UserError(
            f"{spec!r} is not prototypes:COUNT:SEED with whole numbers, COUNT ≥ 1",
            remedy="give for example prototypes, prototypes:500 or prototypes:500:1",
        )
    return Prototypes(int(match[1] or 2000), int(match[2] or 0))


def _inner_suffix(path: Path) -> str:
    """The suffix that tells the format, below that of the compression."""
    if path.suffix.lower() == ".zip":
        return Path(zip_member(path)).suffix.lower()
    name = Path(path.stem) if path.suffix.lower() in (".gz", ".zst") else path
    return name.suffix.lower()


def _json_source(path: Path) -> Source:
    """Tell a list, a Matbench table and JSON lines in a `.json` file apart by how it begins."""
    head = b""
    try:
        for piece in read_pieces(path):
            head += piece
            if len(head) > _HEAD:
                break
    except StreamBroken as error:
        if not head:
            raise UserError(f"{path} cannot be read: {error}", remedy="fetch it again") from None
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        return DocumentList(path)
    if re.match(rb'\{\s*"(?:index|columns|data)"\s*:\s*\[', head):
        return Matbench(path)
    if re.match(rb"\{\s*\n", head):
        raise UserError(
            f"{path} is one JSON object over several lines",
            remedy="give JSON Lines (one document a line) or a JSON list of documents",
        )
    return JsonLines(path)
