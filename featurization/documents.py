"""One JSON document of a database → a crystal with labels; names and units of labels."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from featurization.crystal import Crystal, Reject
from featurization.structures import crystal_from_structure_dict
from featurization.validation import (
    cartesian_to_fractional,
    check_size,
    crystal_from_arrays,
    numbers,
)

# What databases call a property (lower case, `_` for the rest) → our label, same unit.
_SYNONYMS = {
    "band_gap": "band_gap",
    "gap_pbe": "band_gap",
    "optb88vdw_bandgap": "band_gap",
    "energy_above_hull": "energy_above_hull",
    "e_above_hull": "energy_above_hull",
    "ehull": "energy_above_hull",
    "formation_energy_per_atom": "formation_energy_per_atom",
    "formation_energy_peratom": "formation_energy_per_atom",
    "e_form": "formation_energy_per_atom",
    "bulk_modulus": "bulk_modulus",
    "bulk_modulus_vrh": "bulk_modulus",
    "bulk_modulus_kv": "bulk_modulus",
    "k_vrh": "bulk_modulus",
    "log10_k_vrh": "bulk_modulus",
    "shear_modulus": "shear_modulus",
    "shear_modulus_vrh": "shear_modulus",
    "shear_modulus_gv": "shear_modulus",
    "g_vrh": "shear_modulus",
    "log10_g_vrh": "shear_modulus",
    "is_metal": "is_metal",
}
_ID_KEYS = ("material_id", "jid", "id")
_WRAPPED_ID = re.compile(r"(?:MPID|AlphaID)\(['\"]?(.*?)['\"]?\)")


def labels_from(entries: Iterable[tuple[str, Any]], *, known_only: bool) -> dict[str, float]:
    """Labels of (published name, value) pairs.

    Known names become ours (`e_above_hull` → `energy_above_hull`; log10 of a modulus in GPa →
    the modulus); others keep theirs in lower-case letters, digits and `_`, or are left out if
    `known_only`. Values that are not finite numbers ("na", null, NaN) are absent, booleans are
    0 or 1, and of {"vrh": …, "voigt": …, …} the Voigt–Reuss–Hill mean is taken.
    """
    labels = {}
    for published, value in entries:
        plain = _plain_name(published)
        name = _SYNONYMS.get(plain, "" if known_only else plain)
        number = _number(value) if name else None
        if number is None:
            continue
        if plain.startswith("log10_") and name != plain:
            if number > 300.0:  # 10^x must stay finite
                continue
            number = 10.0**number
        labels[name] = number
    return labels


def crystal_from_document(document: Any, fallback_id: str) -> Crystal:
    """A crystal from a document of the Materials Project (`structure`) or JARVIS (`atoms`).

    A pymatgen `Structure.as_dict()` may also be the document itself.

    Raises:
        Reject: not such a document, or its structure is not valid.
    """
    if not isinstance(document, dict):
        raise Reject("source", f"a document is a JSON object, not {type(document).__name__}")
    id = document_id(document) or fallback_id
    labels = labels_from(document.items(), known_only=True)
    if isinstance(structure := document.get("structure"), dict):
        return crystal_from_structure_dict(structure, id, labels)
    if isinstance(atoms := document.get("atoms"), dict):
        return crystal_from_jarvis_atoms(atoms, id, labels)
    if isinstance(document.get("lattice"), dict) and isinstance(document.get("sites"), list):
        return crystal_from_structure_dict(document, id, labels)
    raise Reject("source", "neither a `structure` nor an `atoms` object, nor a structure itself")


def crystal_from_jarvis_atoms(
    atoms: Mapping[str, Any], id: str, labels: dict[str, float]
) -> Crystal:
    """A crystal from JARVIS-tools' `Atoms.to_dict()`: `lattice_mat`, `elements`, `coords`.

    `coords` are fractional unless `cartesian` is true, then in Å.

    Raises:
        Reject: malformed, or not valid.
    """
    for key in ("lattice_mat", "elements", "coords"):
        if not isinstance(atoms.get(key), list):
            raise Reject("structure", f"`atoms` has no list `{key}`")
    lattice = numbers(atoms["lattice_mat"], (3, 3), "lattice_mat")
    positions = numbers(atoms["coords"], None, "coords")
    species = [str(name).strip() for name in atoms["elements"]]
    if len(species) != len(positions):
        raise Reject("structure", f"{len(species)} elements but {len(positions)} coordinates")
    if atoms.get("cartesian"):
        positions = cartesian_to_fractional(positions, lattice)
    count = len(species)
    return crystal_from_arrays(
        id, lattice, positions, species, np.ones(count), np.arange(count, dtype=np.int64), labels
    )


def loads(text: bytes) -> Any:
    """Parse JSON; NaN and Infinity, which Python's writer lets through, are accepted.

    Raises:
        Reject: not JSON, or too long.
    """
    check_size(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        reason = str(error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Reject("source", f"not JSON: {reason}") from None


def document_id(document: Mapping[str, Any]) -> str:
    """The id of a document, "" if none; sees through `MPID(mp-149)` and serialized id objects."""
    for key in _ID_KEYS:
        value = document.get(key)
        if isinstance(value, dict):
            inner = (v for k, v in value.items() if isinstance(v, str) and not k.startswith("@"))
            value = next(inner, None)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            text = str(value).strip()
            wrapped = _WRAPPED_ID.fullmatch(text)
            return wrapped[1] if wrapped else text
    return ""


@lru_cache(maxsize=4096)
def _plain_name(published: str) -> str:
    return re.sub(r"[^0-9a-z]+", "_", published.lower()).strip("_")


def _number(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("vrh")
    if isinstance(value, str):
        truth = {"true": 1.0, "false": 0.0}.get(value.strip().lower())
        value = value if truth is None else truth
    if not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
