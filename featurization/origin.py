"""Is a source still what a manifest or a plan says it was?"""

import hashlib
from collections.abc import Mapping
from typing import Any

from featurization.records import Source, Stream
from featurization.streams import StreamBroken, lines, read_pieces

SAME, GROWN = "as it was", "grown since"


def state_of(source: Source, listed: Mapping[str, Any]) -> str:
    """What became of a source since a row of a manifest, or a plan, described it.

    A file of another name with the same content is the same.

    Returns:
        `SAME`, `GROWN`, or what differs, after "changed" or "another".
    """
    found = {k: v for k, v in source.describe().items() if listed.get(k) != v}
    if set(found) <= {"path"}:
        return SAME
    if "kind" not in found and _has_grown(source, listed):
        return GROWN
    same = not found.keys() & {"kind", "path"}
    told = "; ".join(f"{k} was {listed.get(k)!r}, is {v!r}" for k, v in found.items())
    return f"{'changed' if same else 'another'}: {told}"


def described(source: Source, listed: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What a source says of itself; if it has grown, what it said before."""
    now = source.describe()
    if now.get("sha256") != listed.get("sha256") and _has_grown(source, listed):
        now["sha256"] = listed["sha256"]
    return now


def _has_grown(source: Source, listed: Mapping[str, Any]) -> bool:
    """Whether the first lines of a file have the hash of the whole as it was.

    Only of a file that is read in place: what is added to another does not follow its records.
    """
    if "sha256" not in listed or not isinstance(source, Stream) or not source.in_place:
        return False
    sha = hashlib.sha256()
    try:
        for line in lines(read_pieces(source.path)):
            text = line.removesuffix(b"\n")
            for part in (text, line[len(text) :]):  # the last line may have had no end
                sha.update(part)
                if sha.hexdigest() == listed.get("sha256"):
                    return True
    except StreamBroken:
        pass
    return False
