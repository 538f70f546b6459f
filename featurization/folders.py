"""CIF and POSCAR files: one of them, or a folder with labels in `id_prop.csv` (CGCNN).

The convention is that of Xie and Grossman's CGCNN: a row `id,value` of `id_prop.csv` belongs to
the file `id.cif`. Here the file may also be a POSCAR, and the id may be a whole file name.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.crystal import Crystal, Reject
from featurization.documents import labels_from
from featurization.records import Damage, Record, listed, parsed
from featurization.structures import crystal_from_cif, crystal_from_poscar

_MAX_BYTES = 64 << 20
TABLE = "id_prop.csv"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    labels: dict[str, float]


def is_structure_file(path: Path) -> bool:
    """Whether a name is that of a CIF or POSCAR file."""
    return path.suffix.lower() in (".cif", ".vasp", ".poscar") or path.name.startswith("POSCAR")


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
        return Record(index, _stem(self._path), _File(self._path, {}))

    def parse(self, record: Record) -> Crystal:
        return parsed(record, lambda file: _crystal(file, record.id))


class StructureFolder:
    """All CIF and POSCAR files directly in a folder.

    With `id_prop.csv`, the records are its rows in their order (a row without a file is a
    reject), then the files that it does not list (rejects). Without, the files by name, without
    labels. A header names the labels; without one the second column is `label`.
    """

    def __init__(self, path: Path, label: str) -> None:
        self._path = path
        self._label = label
        self._files = sorted(
            (p for p in path.iterdir() if is_structure_file(p) and p.is_file()),
            key=lambda p: p.name,
        )
        self._table = path / TABLE
        if not self._files and not self._table.exists():
            raise UserError(
                f"{path} holds no *.cif, *.vasp, *.poscar or POSCAR* file",
                remedy="give the folder that holds the files themselves",
            )
        self._rows = self._read_table() if self._table.exists() else None
        self._entries = list(self._list_entries())

    def describe(self) -> dict[str, str | int | float]:
        """Provenance; the hash is over sorted names, sizes and contents."""
        digest = hashlib.sha256()
        tables = [self._table] if self._rows is not None else []
        for path in sorted([*self._files, *tables], key=lambda p: p.name):
            digest.update(f"{path.name}\0{path.stat().st_size}\0{sha256_of(path)}\n".encode())
        return {
            "kind": "folder",
            "path": self._path.resolve().name,
            "files": len(self._files),
            "sha256": digest.hexdigest(),
        }

    def records(self) -> Iterator[Record]:
        return listed(self)

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        return Record(index, *self._entries[index])

    def parse(self, record: Record) -> Crystal:
        return parsed(record, lambda file: _crystal(file, record.id))

    def _list_entries(self) -> Iterator[tuple[str, _File | Damage]]:
        if self._rows is None:
            yield from ((_stem(path), _File(path, {})) for path in self._files)
            return
        # A whole file name wins over a stem, and of equal stems the first name.
        by_id = {_stem(path): path for path in reversed(self._files)}
        by_id.update((path.name, path) for path in self._files)
        used = set()
        for id, labels in self._rows:
            path = by_id.get(id)
            if path is None:
                yield id, Damage(f"listed in {TABLE}, but there is no file of this name")
            elif labels is None:
                used.add(path)
                yield id, Damage(f"its row of {TABLE} has not as many fields as the first")
            else:
                used.add(path)
                yield id, _File(path, labels)
        for unlisted in self._files:
            if unlisted not in used:
                yield _stem(unlisted), Damage(f"not listed in {TABLE}")

    def _read_table(self) -> list[tuple[str, dict[str, float] | None]]:
        """(id, labels) of each row; None in place of labels if the row is malformed."""
        try:
            with self._table.open(encoding="utf-8-sig", newline="") as stream:
                rows = [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{self._table} cannot be read: {error}", remedy="save it as UTF-8 CSV"
            ) from None
        if not rows:
            return []
        names = [cell.strip() for cell in rows[0]]
        if len(names) > 1 and _is_value(names[1]):
            names = ["", self._label]
            if len(rows[0]) > len(names):
                raise UserError(
                    f"{self._table} has {len(rows[0])} columns and no header to name them",
                    remedy="add a header row such as id,bulk_modulus,shear_modulus",
                )
        elif len(names) > 1:
            rows = rows[1:]
        return [
            (
                row[0].strip(),
                labels_from(zip(names[1:], row[1:], strict=True), known_only=False)
                if len(row) == len(names)
                else None,
            )
            for row in rows
        ]


def _is_value(cell: str) -> bool:
    """Whether a cell is a label's value (or a missing one), not a label's name."""
    if cell.lower() in ("", "na", "n/a", "none", "null", "true", "false"):
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in (".cif", ".vasp", ".poscar") else path.name


def _crystal(file: _File, id: str) -> Crystal:
    try:
        with file.path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise Reject("source", f"cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise Reject("source", f"file is larger than {_MAX_BYTES >> 20} MiB")
    # Numbers and symbols are ASCII; names of authors and minerals may be in any encoding.
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    reader = crystal_from_cif if file.path.suffix.lower() == ".cif" else crystal_from_poscar
    return reader(text, id, file.labels)
