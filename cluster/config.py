"""Configuration: frozen, typed, validated; from TOML and command-line flags."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import UserError


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # `build_config` shows them
    )


AnyConfig = TypeVar("AnyConfig", bound=Config)


def names(kind: Any) -> tuple[str, ...]:
    """The words of a Literal, or of a union of them, in their order."""
    return tuple(
        word
        for part in get_args(kind)
        for word in ((part,) if isinstance(part, str) else names(part))
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed file is a `UserError`."""
    remedy = "give the path of a TOML file"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", remedy=remedy) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", remedy=remedy) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", remedy="mend the file") from None


def build_config(
    kind: type[AnyConfig],
    values: dict[str, Any],
    *,
    where: str,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> AnyConfig:
    """Validate `values` as a `kind`; the `UserError` names each wrong value, its rule and `where`.

    Values that are None (flags that were not given) leave the default in place.

    Args:
        where: what the values are from, such as a file.
        flags: key → flag, such as `--b-iso`, of the values that are from the command line instead.
    """
    given = {key: value for key, value in values.items() if value is not None}
    problems, meanings = [], []
    for key, value in given.items():
        known = kind.model_fields.get(key)
        if isinstance(value, bool) and known is not None and known.annotation in (int, float):
            problems.append(f"{where}: {key} = {value!r}: must be a number")  # not 1 or 0
            meanings.append(key)
    try:
        config = kind(**given)
    except ValidationError as error:
        for item in error.errors():
            problems.append(_problem(item, where, flags))
            meanings += [str(part) for part in item["loc"][:1]]
    if not problems:
        return config
    fields = kind.model_fields
    lines = [
        f"{flags.get(key, key)}: {' '.join((fields[key].description or '').split()).rstrip('.')}"
        for key in dict.fromkeys(meanings)
        if key in fields
    ]
    if len(lines) < len(set(meanings)):
        lines.append(f"valid keys are {', '.join(fields)}")
    raise UserError("; ".join(problems), remedy="; ".join(lines) or "change one of the two")


def _problem(item: ErrorDetails, where: str, flags: Mapping[str, str]) -> str:
    rule = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    rule = rule.partition(", unable to parse")[0].replace("a valid tuple", "a list")
    rule = rule.replace("greater than or equal to", "≥").replace("less than or equal to", "≤")
    rule = rule.replace("greater than", ">").replace("less than", "<")
    if not item["loc"]:  # of several values together
        return rule if flags else f"{where}: {rule}"
    key, name = str(item["loc"][0]), ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: {name}: unknown key"
    if item["type"] == "missing":
        return f"{where}: {name}: not given"
    if key in flags:
        return f"{flags[key]} {item['input']}: {rule}"
    return f"{where}: {name} = {item['input']!r}: {rule}"
