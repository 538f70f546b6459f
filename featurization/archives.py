"""Databases as one large JSON document: Matbench tables, and lists such as JARVIS-DFT.

Documents are cut into elements without being parsed or held in memory (`json_elements`); each
rank parses only its own elements.

Matbench (Dunn et al., npj Comput. Mater. 6, 138 (2020)) is a pandas table in "split"
orientation: `{"index": […], "columns": ["structure", target], "data": [[{…}, value], …]}`.
JARVIS-DFT (Choudhary et al., npj Comput. Mater. 6, 173 (2020)) is a list of objects with `jid`,
`atoms` and properties, where "na" is missing; a list of Materials Project documents works too.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.crystal import Crystal, Reject
from featurization.documents import crystal_from_document, labels_from, loads
from featurization.records import Record, parsed, streamed
from featurization.streams import StreamBroken, json_elements, read_pieces
from featurization.structures import crystal_from_structure_dict

_ID = re.compile(rb'"(?:jid|material_id)"\s*:\s*"([^"\\]*)"')


def guess_id(text: bytes) -> str:
    """The id in the text of a JSON document, without parsing it; "" if there is none."""
    match = _ID.search(text)
    return match[1].decode("utf-8", "replace") if match else ""


class DocumentList:
    """A JSON array of Materials Project or JARVIS documents."""

    in_place = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "json-list", "path": self.path.name, "sha256": sha256_of(self.path)}

    def records(self) -> Iterator[Record]:
        return streamed(self)

    def stream(self) -> Iterator[tuple[int, bytes]]:
        return ((0, text) for _, text in json_elements(read_pieces(self.path)))

    def record(self, index: int, payload: bytes) -> Record:
        return Record(index, guess_id(payload), payload)

    def parse(self, record: Record) -> Crystal:
        fallback = f"{self.path.name.split('.')[0]}-{record.index}"
        return parsed(record, lambda text: crystal_from_document(loads(text), fallback))


class Matbench:
    """A Matbench task: a structure and one or more targets a row.

    `e_form` of matbench_perovskites is in eV a cell of five atoms, not eV/atom, so that there it
    stays `e_form`.
    """

    in_place = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index, columns = self._header()
        if "structure" not in columns:
            raise UserError(
                f"{path} has the columns {columns}, none of them `structure`",
                remedy="give a Matbench task with structures, not one with compositions only",
            )
        self._columns = columns
        self._structure = columns.index("structure")

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "matbench", "path": self.path.name, "sha256": sha256_of(self.path)}

    def records(self) -> Iterator[Record]:
        return streamed(self)

    def stream(self) -> Iterator[tuple[int, bytes]]:
        elements = json_elements(read_pieces(self.path))
        return ((0, text) for key, text in elements if key == "data")

    def record(self, index: int, payload: bytes) -> Record:
        value = self._index[index] if index < len(self._index) else index
        return Record(index, value if isinstance(value, str) else f"mb-{value}", payload)

    def parse(self, record: Record) -> Crystal:
        return parsed(record, lambda text: self._crystal(text, record.id))

    def _crystal(self, text: bytes, id: str) -> Crystal:
        values = loads(text)
        if not isinstance(values, list) or len(values) != len(self._columns):
            raise Reject("source", f"a row must be a list of {len(self._columns)} values")
        structure = values[self._structure]
        if not isinstance(structure, dict):
            raise Reject("source", f"`structure` is {type(structure).__name__}, not an object")
        entries = [(name, v) for name, v in zip(self._columns, values, strict=True)]
        del entries[self._structure]
        labels = labels_from(entries, known_only=False)
        if "perovskites" in self.path.name and "formation_energy_per_atom" in labels:
            labels["e_form"] = labels.pop("formation_energy_per_atom")
        return crystal_from_structure_dict(structure, id, labels)

    def _header(self) -> tuple[list[Any], list[str]]:
        """`index` and `columns`, wherever they stand; read no further than needed."""
        found: dict[str, list[Any]] = {"index": [], "columns": []}
        try:
            for key, text in json_elements(read_pieces(self.path)):
                if key == "data" and found["index"] and found["columns"]:
                    break
                if key in found:
                    found[key].append(loads(text))
        except (StreamBroken, Reject) as error:
            if not found["columns"]:
                raise UserError(
                    f"{self.path} breaks before its columns are named: {error}",
                    remedy="fetch the file again",
                ) from None
        return found["index"], [str(name) for name in found["columns"]]
