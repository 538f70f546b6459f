"""Configuration: frozen, typed, validated; from TOML and command-line flags."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import UserError


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


AnyConfig = TypeVar("AnyConfig", bound=Config)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed file is a `UserError`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", remedy="give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path} is not TOML: {error}", remedy="mend the file") from None


def build_config(kind: type[AnyConfig], values: dict[str, Any], *, where: str) -> AnyConfig:
    """Validate `values` as a `kind`; the `UserError` names each wrong value, its rule and `where`.

    Values that are None (flags that were not given) leave the default in place.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"]) or "(whole)"
            if item["type"] == "extra_forbidden":
                lines.append(f"{name}: unknown key")
            elif item["type"] == "missing":
                lines.append(f"{name}: not given")
            else:
                lines.append(f"{name} = {item['input']!r}: {item['msg']}")
        raise UserError(
            f"{where}: " + "; ".join(lines),
            remedy=f"valid keys are {', '.join(kind.model_fields)}",
        ) from None
