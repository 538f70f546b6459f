"""A structure in the words of OPTIMADE → a document like those of the Materials Project.

OPTIMADE (Evans et al., Digital Discovery 3, 1509 (2024)) has no labels of its own: databases add
theirs under names with their prefix, of which those are known here that stand for ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Properties that a structure is made of; the standard obliges servers to give them when asked.
STRUCTURE = (
    "lattice_vectors",
    "cartesian_site_positions",
    "species_at_sites",
    "species",
    "structure_features",
    "dimension_types",
)
# A database's name → ours, same unit; a further word leads into an object. The first that is known
# counts. JARVIS: OptB88vdW gaps, Voigt averages. OQMD: below 0 for what lies on the hull.
LABELS = {
    ("_mp_stability", "gga_gga+u_r2scan", "energy_above_hull"): "energy_above_hull",
    ("_mp_stability", "gga_gga+u", "energy_above_hull"): "energy_above_hull",
    ("_oqmd_band_gap",): "band_gap",
    ("_oqmd_stability",): "energy_above_hull",
    ("_alexandria_band_gap",): "band_gap",
    ("_alexandria_hull_distance",): "energy_above_hull",
    ("_gnome_bandgap",): "band_gap",
    ("_gnome_hull_distance",): "energy_above_hull",
    ("_jarvis_optb88vdw_bandgap",): "band_gap",
    ("_jarvis_ehull",): "energy_above_hull",
    ("_jarvis_bulk_modulus_kv",): "bulk_modulus",
    ("_jarvis_shear_modulus_gv",): "shear_modulus",
}
# In place of what is not known, JARVIS gives −99999.
_NOTHING = -900.0
# Atoms are there that the positions do not name: the pattern would be that of another crystal.
_INCOMPLETE = {"implicit_atoms", "site_attachments", "unknown_positions", "assemblies"}


def document_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a resource object of type `structures`.

    What cannot be a crystal keeps its id and labels, without `structure`, and the reason under
    `no_structure`: it is rejected by name when it is featurized.
    """
    attributes = entry.get("attributes")
    if not isinstance(attributes, dict):
        attributes = {}
    id = entry.get("id")
    document: dict[str, Any] = {"material_id": "" if id is None else str(id)}
    try:
        document["structure"] = _structure(attributes)
    except (KeyError, TypeError, ValueError, AttributeError, np.linalg.LinAlgError) as error:
        document["no_structure"] = f"{type(error).__name__}: {error}"[:200]
    for words, name in LABELS.items():
        value: Any = attributes
        for word in words:
            value = value.get(word) if isinstance(value, dict) else None
        known = isinstance(value, int | float) and not isinstance(value, bool) and value > _NOTHING
        if known and name not in document:
            document[name] = value
    return document


def _structure(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A pymatgen `Structure` dict; lattice in Å, fractional coordinates.

    Raises:
        ValueError: not a crystal, or one with atoms that are nowhere.
        KeyError, TypeError, AttributeError, LinAlgError: malformed.
    """
    features = _INCOMPLETE.intersection(attributes.get("structure_features") or ())
    if features:
        raise ValueError(f"structure_features {', '.join(sorted(features))}")
    if attributes.get("dimension_types") not in (None, [1, 1, 1]):
        raise ValueError(f"dimension_types {attributes['dimension_types']}, not a bulk crystal")
    lattice = np.array(attributes["lattice_vectors"], dtype=np.float64)
    positions = np.array(attributes["cartesian_site_positions"], dtype=np.float64)
    if lattice.shape != (3, 3) or positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"shapes {lattice.shape} of the lattice, {positions.shape} of positions")
    names = attributes["species_at_sites"]
    if len(names) != len(positions):
        raise ValueError(f"{len(names)} species_at_sites, {len(positions)} positions")
    species = {each["name"]: _occupants(each) for each in attributes.get("species") or ()}
    # Databases of ordered crystals sometimes leave `species` out: a name is then its element.
    places = np.linalg.solve(lattice.T, positions.T).T
    sites = [
        {"species": species.get(name) or [{"element": name, "occu": 1}], "abc": place}
        for name, place in zip(names, places.tolist(), strict=True)
        if species.get(name) != []
    ]
    return {"lattice": {"matrix": lattice.tolist()}, "sites": sites}


def _occupants(species: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Elements of a species with their occupancies; vacancies are what is missing to 1."""
    if species.get("attached"):
        raise ValueError(f"species {species['name']} has atoms attached")
    pairs = zip(species["chemical_symbols"], species["concentration"], strict=True)
    return [
        {"element": symbol, "occu": part} for symbol, part in pairs if symbol != "vacancy" and part
    ]
