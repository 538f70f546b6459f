"""JSON and Parquet from a folder, checked: what is broken is a `UserError` that names the file."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from cluster.errors import UserError

_Model = TypeVar("_Model", bound=BaseModel)


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn what broken content raises into a `UserError` that names the file."""
    try:
        yield
    except UserError as error:
        if str(path) in error.problem:
            raise
        raise UserError(f"{path}: {error.problem}", remedy=error.remedy) from error
    except (TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path}: {error}", remedy="write the folder again") from error


def require(folder: Path, names: Sequence[str], kind: str) -> None:
    """Raise UserError for the first of the files that a folder of a kind lacks."""
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing; a folder of kind {kind!r} has it",
                remedy="let the command that writes the folder finish, then ask for the report",
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    with blaming(path):
        document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise UserError(f"{path} does not hold a JSON object", remedy="write the folder again")
    return document


def validated(model: type[_Model], path: Path, document: dict[str, Any]) -> _Model:
    """A JSON object as a typed one; the error names the first wrong field."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: field {where!r}: {first['msg']}", remedy="write the folder again"
        ) from error


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """A Parquet table that has these columns."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not Parquet: {error}", remedy="write it again") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}",
            remedy=f"write it again with {', '.join(columns)}",
        )
    return table
