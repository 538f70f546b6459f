"""CIF and POSCAR files: one of them, or a folder with labels in `id_prop.csv` (CGCNN).

The convention is that of Xie and Grossman's CGCNN: a row `id,value` of `id_prop.csv` belongs to
the file `id.cif`. Here the file may also be a POSCAR or compressed, and the id may be a whole file
name.
"""

import csv
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.crystal import Crystal, Reject
from featurization.documents import labels_from
from featurization.records import Damage, Record, listed, parsed, streamed
from featurization.streams import StreamBroken, read_pieces
from featurization.structures import crystal_from_cif, crystal_from_poscar
from featurization.validation import MAX_BYTES

TABLE = "id_prop.csv"
_ENDINGS = (".cif", ".vasp", ".poscar")
_PACKED = (".gz", ".zst", ".zip")
_UNKNOWN_PACKED = (".bz2", ".xz", ".lz4", ".z", ".7z")


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    labels: dict[str, float]


def is_structure_file(name: str) -> bool:
    """Whether a name is that of a CIF or POSCAR file, compressed or not."""
    plain = _unpacked(name)
    return os.path.splitext(plain)[1].lower() in _ENDINGS or plain.startswith("POSCAR")


class StructureFile:
    """One CIF or POSCAR file: one crystal without labels."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "structure", "path": self._path.name, "sha256": sha256_of(self._path)}

    def records(self) -> Iterator[Record]:
        return listed(self)

    def __len__(self) -> int:
        return 1

    def record(self, index: int) -> Record:
        return Record(index, _stem(self._path.name), _File(self._path, {}))

    def parse(self, record: Record) -> Crystal:
        return _parse(record)


class StructureFolder:
    """All CIF and POSCAR files directly in a folder, also compressed: `.gz`, `.zst`, `.zip`.

    With `id_prop.csv`, the records are its rows in their order (a row without a file is a
    reject), then the files that it does not list (rejects). Without, the files by name, without
    labels. A header names the labels; without one the second column is `label`.

    What has such a name and cannot be read (a dangling link, no permission, a folder, another
    compression) is a record, too, and will be a reject. Last comes a record, a reject, for each
    folder below this one that holds such files: they are not read. Other names mean nothing here,
    nor do links to folders, which may lead round in a circle.

    The folder is listed once, by the rank that describes or streams it. A file that comes later
    belongs to another source.
    """

    in_place = False

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self._table = path / TABLE
        self._names: list[str] = []  # columns of the table
        self._has_table, self._has_header = os.path.lexists(self._table), False
        if self._has_table:
            self._names, self._has_header = self._columns(label)
            return
        with os.scandir(path) as entries:
            if not any(is_structure_file(entry.name) for entry in entries):
                raise UserError(
                    f"{path} holds no *.cif, *.vasp, *.poscar or POSCAR* file",
                    remedy="give the folder that holds the files themselves",
                )

    def describe(self) -> dict[str, str | int | float]:
        """Provenance; the hash is over sorted names, sizes and contents, and what is in the way.

        Raises:
            UserError: the folder or its table cannot be read.
        """
        deque(self._rows(), maxlen=0)
        files, below = self._found
        digest = hashlib.sha256()
        for name in sorted([*files, TABLE] if self._has_table else files):
            line = f"{name}\0{_fingerprint(self.path / name)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        for name, reason in below.items():
            digest.update(f"{name}\0{reason}\n".encode("utf-8", "surrogateescape"))
        return {
            "kind": "folder",
            "path": self.path.resolve().name,
            "files": len(files),
            "sha256": digest.hexdigest(),
        }

    def records(self) -> Iterator[Record]:
        return streamed(self)

    def stream(self) -> Iterator[tuple[int, bytes]]:
        """What is known of each record without reading its file, as JSON."""
        try:
            for entry in self._entries():
                yield 0, json.dumps(entry).encode()
        except UserError as error:
            raise StreamBroken(error.problem) from None

    def record(self, index: int, payload: bytes) -> Record:
        entry = json.loads(payload)
        if "reason" in entry:
            return Record(index, entry["id"], Damage(entry["reason"]))
        return Record(index, entry["id"], _File(self.path / entry["file"], entry["labels"]))

    def parse(self, record: Record) -> Crystal:
        return _parse(record)

    def _entries(self) -> Iterator[dict[str, Any]]:
        files, below = self._found
        if not self._has_table:
            yield from ({"id": _stem(name), "file": name, "labels": {}} for name in files)
        else:
            yield from self._entries_of_table(files)
        yield from ({"id": name, "reason": reason} for name, reason in below.items())

    def _entries_of_table(self, files: list[str]) -> Iterator[dict[str, Any]]:
        # A whole file name wins over one without its compression, that over a stem, and of equal
        # stems the first name.
        by_id: dict[str, str] = {}
        for id_of in (_stem, _unpacked, str):
            by_id |= {id_of(name): name for name in reversed(files)}
        used = set()
        for number, row in enumerate(self._rows()):
            if number == 0 and self._has_header:
                continue
            id = row[0].strip()
            name = by_id.get(id)
            if name is None:
                yield {"id": id, "reason": f"listed in {TABLE}, but there is no file of this name"}
                continue
            used.add(name)
            if len(row) != len(self._names):
                reason = f"its row of {TABLE} has not as many fields as the first"
                yield {"id": id, "reason": reason}
                continue
            values = zip(self._names[1:], row[1:], strict=True)
            yield {"id": id, "file": name, "labels": labels_from(values, known_only=False)}
        for name in files:
            if name not in used:
                yield {"id": _stem(name), "reason": f"not listed in {TABLE}"}

    @cached_property
    def _found(self) -> tuple[list[str], dict[str, str]]:
        """Names of structure files; folders below → why what they hold is no record; sorted."""
        files, below, failed = [], {}, list[OSError]()
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if is_structure_file(entry.name):
                        files.append(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        for folder, _, names in os.walk(entry.path, onerror=failed.append):
                            if count := sum(map(is_structure_file, names)):
                                below[folder] = f"{count} structure files in a sub-folder: not read"
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be listed: {error.strerror}", remedy="ask for permission"
            ) from None
        below |= {error.filename: f"cannot be listed: {error.strerror}" for error in failed}
        named = {f"{os.path.relpath(path, self.path)}/": below[path] for path in sorted(below)}
        return sorted(files), named

    def _columns(self, label: str) -> tuple[list[str], bool]:
        """Names of the table's columns, and whether its first row gives them."""
        first = next(self._rows(), [])
        names = [cell.strip() for cell in first]
        if len(names) < 2 or not _is_value(names[1]):
            return names, len(names) > 1
        if len(names) > 2:
            raise UserError(
                f"{self._table} has {len(names)} columns and no header to name them",
                remedy="add a header row such as id,bulk_modulus,shear_modulus",
            )
        return ["", label], False

    def _rows(self) -> Iterator[list[str]]:
        """Rows of the table that are not blank; none without a table."""
        if not self._has_table:
            return
        try:
            if not self._table.is_file():  # to open a pipe would be to wait for ever
                raise OSError("is no file, or a link to nothing")
            with self._table.open(encoding="utf-8-sig", newline="") as stream:
                yield from (row for row in csv.reader(stream) if any(cell.strip() for cell in row))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{self._table} cannot be read: {error}", remedy="save it as UTF-8 CSV"
            ) from None


def _is_value(cell: str) -> bool:
    """Whether a cell is a label's value (or a missing one), not a label's name."""
    if cell.lower() in ("", "na", "n/a", "none", "null", "true", "false"):
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _unpacked(name: str) -> str:
    """A file's name without the ending of a compression."""
    root, ending = os.path.splitext(name)
    return root if ending.lower() in _PACKED + _UNKNOWN_PACKED else name


def _stem(name: str) -> str:
    plain = _unpacked(name)
    root, ending = os.path.splitext(plain)
    return root if ending.lower() in _ENDINGS else plain


def _fingerprint(path: Path) -> str:
    """Size and hash of a file, or why there are none."""
    try:
        status = path.stat()
        return f"{status.st_size}\0{sha256_of(path)}" if S_ISREG(status.st_mode) else "no file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _parse(record: Record) -> Crystal:
    return parsed(record, lambda file: _crystal(file, record.id))


def _crystal(file: _File, id: str) -> Crystal:
    data = bytearray()
    try:
        for piece in _pieces(file.path):
            data += piece
            if len(data) > MAX_BYTES:
                raise Reject("source", f"file is larger than {MAX_BYTES >> 20} MiB")
    except OSError as error:
        raise Reject("source", f"cannot be read: {error.strerror}") from None
    except StreamBroken as error:
        raise Reject("source", f"cannot be unpacked: {error}") from None
    # Numbers and symbols are ASCII; names of authors and minerals may be in any encoding.
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    is_cif = _unpacked(file.path.name).lower().endswith(".cif")
    return (crystal_from_cif if is_cif else crystal_from_poscar)(text, id, file.labels)


def _pieces(path: Path) -> Iterator[bytes]:
    """Contents, unpacked if the name says that they are packed."""
    ending = path.suffix.lower()
    if not path.is_file():  # to open a pipe would be to wait for ever
        raise Reject("source", "is no file, or a link to nothing")
    if ending in _UNKNOWN_PACKED:
        raise Reject("source", f"{ending} is not read; {', '.join(_PACKED)} are")
    if ending in _PACKED:
        yield from read_pieces(path)
    else:
        with path.open("rb") as stream:
            yield stream.read(MAX_BYTES + 1)
