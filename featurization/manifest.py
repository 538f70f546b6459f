"""`manifest.json`: what a finished dataset is, where it came from, and where each record went.

It has a copy, `.manifest.copy`, from which `featurization.restore` makes it again.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from cluster.errors import UserError
from cluster.files import append_line, replacing, whole_lines, write_text

FORMAT_VERSION = 2
COPY = ".manifest.copy"  # a line with its checksum

_Count = Annotated[int, Field(ge=0)]
# First and beyond the last of records of one source.
_Range = Annotated[list[_Count], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    """What readers rely on, and its types; the rest is for people."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Account(_Part):
    records: list[_Range]  # of which these are the crystals, if they gave any
    present: _Count  # records of these left out because earlier sources have their ids


class _Shard(_Account):
    file: str = Field(pattern=r"^shards/[^/]+\.h5$")
    structures: _Count
    points: _Count
    labels: list[str]
    sha256: str
    content_hash: str = Field(pattern="^[0-9a-f]{64}$")
    part: _Count  # which of the sources


class _Source(_Part):
    spec: InstanceOf[str]  # the name of a file can be what no UTF-8 spells
    kind: str
    records: _Count
    block: Annotated[int, Field(ge=1)]
    damage: str | None
    without_shard: _Account


class _Manifest(_Part):
    format_version: int
    structures: _Count
    rejected: _Count
    points: _Count
    content_hash: str
    config: dict[str, Any]
    sources: list[_Source] = Field(min_length=1)
    shards: list[_Shard]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished dataset.

    Raises:
        UserError: there is none, or it is of another format version.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _Manifest.model_validate(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is no finished dataset: it has no manifest.json", remedy=way_out(folder)
        ) from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(str(part) for part in wrong["loc"])
        raise UserError(
            f"{path} is not a manifest: {place}: {wrong['msg']}", remedy=way_out(folder)
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest: {type(error).__name__}: {error}", remedy=way_out(folder)
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}",
            remedy="featurize again with this version",
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Atomically, in ASCII, because the name of a source can be what no UTF-8 spells."""
    with replacing(folder / COPY) as path:
        path.unlink(missing_ok=True)
        append_line(path, json.dumps(manifest))
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


def read_copy(folder: Path) -> dict[str, Any] | None:
    """The manifest as it was written last; None if its copy is lost, too, or damaged."""
    path = folder / COPY
    line = next(whole_lines(path), None) if path.is_file() else None
    manifest: dict[str, Any] | None = None if line is None else json.loads(line)
    return manifest if manifest and manifest["format_version"] == FORMAT_VERSION else None


def way_out(folder: Path) -> str:
    """The command that helps where a manifest is missing or broken."""
    if read_copy(folder) is not None:
        return f"xtal verify {folder} --repair makes it again from its copy"
    if is_first_run(folder):
        return f"finish its run: the same xtal featurize again, or xtal verify {folder} --repair"
    if any((folder / "shards").glob("shard-*.h5")):
        return f"its copy {folder / COPY} is lost, too: featurize again into a new folder"
    return "run xtal featurize SOURCE OUT and give OUT here"


def is_first_run(folder: Path) -> bool:
    """Whether the journal is of a first run that did not end, which needs no manifest."""
    journal = folder / "journal"
    return (journal / "plan.json").exists() and not (journal / "known.bin").exists()
