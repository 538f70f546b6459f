"""Where crystals are from, under which licence, and whom to cite, as far as that is known.

The record that `xtal fetch` writes beside a file tells it of just this file; it goes into the
manifest, and from there into all that is made of a dataset.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from featurization.addresses import plain
from featurization.records import Source, Stream
from featurization.snapshot import record_of

KEYS = ("source", "provider", "database_version", "fetched", "licence", "cite")
_PROTOTYPES = "AFLOW prototypes: M. J. Mehl et al., Comput. Mater. Sci. 136, S1 (2017)."


def recorded(source: Source, described: Mapping[str, Any]) -> dict[str, str]:
    """What the record beside a source says of it; nothing if it is of another file.

    Args:
        described: what the source says of itself.
    """
    if not isinstance(source, Stream):
        return {}
    try:
        record = json.loads(record_of(source.path).read_bytes())
        if record["sha256"] != described["sha256"]:
            return {}
        return known(record)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def known(record: Mapping[str, Any]) -> dict[str, str]:
    """Those of `KEYS` that a record, or a source in a manifest, has."""
    return {key: plain(record[key]) for key in KEYS if isinstance(record.get(key), str)}


def attribution(sources: Iterable[Mapping[str, Any]]) -> str:
    """A sentence or two of each source of a manifest."""
    return " ".join(dict.fromkeys(map(_of_one, sources)))


def _of_one(listed: Mapping[str, Any]) -> str:
    if listed.get("kind") == "prototypes":
        return _PROTOTYPES
    name, about = plain(listed.get("path") or listed.get("spec", "?"), 100), known(listed)
    if "licence" not in about:
        checksum = plain(listed.get("sha256", "not known"), 64)
        return (
            f"{name} (SHA-256 {checksum}) has no record of xtal fetch: its licence is that of its "
            "source."
        )
    origin = [about[key] for key in ("source", "provider") if key in about]
    origin += [f"version {about['database_version']}"] if "database_version" in about else []
    origin += [f"fetched {about['fetched'][:10]}"] if "fetched" in about else []
    cite = f" {about['cite']}" if "cite" in about else ""
    return f"{name} ({', '.join(origin)}): licence {about['licence']}.{cite}"
