"""What a structure must fulfil to be a `Crystal`: checked once, in one place.

A violation is a `Reject` of stage "structure" whose reason names the value and the rule.
Left-handed lattices are legal and kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import gemmi
import numpy as np

from featurization.crystal import Crystal, FloatArray, IntArray, Reject, cell_volume
from featurization.geometry import close_pairs, within

MAX_ATOMS = 10_000
# Of one crystal as text: parsed, 8 MiB of the worst JSON or CIF take some 200 MiB of memory.
MAX_BYTES = 8 << 20
MIN_VOLUME, MAX_VOLUME = 0.1, 1e7  # Å³ a cell
MIN_DISTANCE = 0.5  # Å; two sites nearer than this overlap
SAME_SITE = 0.01  # Å; partly occupied sites nearer than this are one site
_OCCUPANCY_SLACK = 1e-3  # published occupancies are rounded

ELEMENTS = frozenset(gemmi.Element(z).name for z in range(1, 119)) | {"D"}


def crystal_from_arrays(
    id: str,
    lattice: FloatArray,
    positions: FloatArray,
    species: Sequence[str],
    occupancy: FloatArray,
    site: IntArray,
    labels: dict[str, float],
) -> Crystal:
    """Validate a crystal given row by row; every source ends here.

    Args:
        lattice: (3, 3) rows in Å.
        positions: (A, 3) fractional, equal for rows of equal `site`.
        species: (A,) element symbols or "D".
        occupancy: (A,) 0 < o ≤ 1; up to 1.001 is taken for rounding and clipped.
        site: (A,) non-decreasing from 0.

    Returns:
        The crystal, positions as given. Partly occupied sites within 0.01 Å of each other whose
        occupancies fit on one site become one; equal species on one site become one row.

    Raises:
        Reject: no or more than 10,000 rows, unknown element, a number that is not finite, volume
            outside 0.1 … 10⁷ Å³, occupancy of a row or a site ≤ 0 or > 1, or sites less than
            0.5 Å apart (periodic images included).
    """
    if not 0 < len(species) <= MAX_ATOMS:
        raise _reject(f"{len(species)} atoms; must be 1 to {MAX_ATOMS}")
    if unknown := set(species) - ELEMENTS:
        raise _reject(f"unknown element {min(unknown)!r}")
    # Rounding destroys coordinates this far out, and with them the distances.
    lattice, positions = np.ascontiguousarray(lattice), np.ascontiguousarray(positions)
    if not within(lattice, 1e6):
        raise _reject(f"lattice component {np.abs(lattice).max():.3g} Å; must be finite, ≤ 1e6")
    if not within(positions, 1e6):
        raise _reject(f"coordinate {np.abs(positions).max():.3g}; must be finite, ≤ 1e6")
    volume = cell_volume(lattice)
    if not MIN_VOLUME <= volume <= MAX_VOLUME:
        raise _reject(f"cell volume {volume:.3g} Å³; must be {MIN_VOLUME} to {MAX_VOLUME:g}")
    # A NaN makes both extremes NaN, which is in no range.
    low, high = float(occupancy.min()), float(occupancy.max())
    if not (low > 0.0 and high <= 1.0 + _OCCUPANCY_SLACK):
        raise _reject(f"occupancies {low:g} to {high:g}; must be above 0 and at most 1")
    site, total = _merged_sites(lattice, positions, occupancy, site)
    if total.max() > 1.0 + _OCCUPANCY_SLACK:
        raise _reject(f"occupancies of one site sum to {total.max():g}; must be at most 1")
    if len(total) < len(species):
        positions, species, occupancy, site = _one_row_a_species(
            positions, species, occupancy, site
        )
    return Crystal(
        id=id,
        lattice=lattice,
        positions=positions,
        species=tuple(species),
        occupancy=np.minimum(occupancy, 1.0),
        site=site,
        labels=labels,
    )


def check_size(text: bytes | str) -> None:
    """Before a text is parsed, which takes up to 30 times its own memory.

    Raises:
        Reject: longer than 8 MiB.
    """
    if len(text) > MAX_BYTES:
        size = f"{len(text) / 2**20:.1f} MiB of text; must be ≤ {MAX_BYTES >> 20} MiB"
        raise Reject("source", f"{size}: leave out what is neither structure nor label")


def numbers(values: Any, shape: tuple[int, ...] | None, name: str) -> FloatArray:
    """`values` as float64 of `shape`; None is (A, 3), and −1 stands for any length.

    Raises:
        Reject: not numbers, or of another shape.
    """
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _reject(f"{name}: {error}") from None
    wanted = (-1, 3) if shape is None else shape
    if array.size == 0 and -1 in wanted:
        return np.zeros([max(n, 0) for n in wanted])
    if len(wanted) != array.ndim or wanted[-1] not in (-1, array.shape[-1]):
        raise _reject(f"{name} has shape {array.shape}; must be {wanted}")
    if wanted[0] not in (-1, array.shape[0]):
        raise _reject(f"{name} has shape {array.shape}; must be {wanted}")
    return array


def lattice_from_parameters(parameters: FloatArray) -> FloatArray:
    """(3, 3) rows in Å from a, b, c in Å and α, β, γ in degrees; c along z, a in the xz plane.

    Raises:
        Reject: lengths or angles that span no cell.
    """
    a, b, c, *angles = parameters.tolist()
    if not (all(map(math.isfinite, (a, b, c, *angles))) and min(a, b, c) > 0.0):
        raise _reject(f"cell lengths {a:g}, {b:g}, {c:g} Å; must be positive")
    cos_alpha, cos_beta, cos_gamma = (math.cos(math.radians(angle)) for angle in angles)
    sin_alpha, sin_beta = (math.sin(math.radians(angle)) for angle in angles[:2])
    in_range = all(0.0 < angle < 180.0 for angle in angles)
    ratio = (cos_alpha * cos_beta - cos_gamma) / (sin_alpha * sin_beta) if in_range else 2.0
    if abs(ratio) >= 1.0:
        raise _reject("cell angles {:g}, {:g}, {:g}° span no cell".format(*angles))
    # `ratio` is the cosine of γ*.
    return np.array(
        [
            [a * sin_beta, 0.0, a * cos_beta],
            [-b * sin_alpha * ratio, b * sin_alpha * math.sqrt(1.0 - ratio**2), b * cos_alpha],
            [0.0, 0.0, c],
        ]
    )


def cartesian_to_fractional(coordinates: FloatArray, lattice: FloatArray) -> FloatArray:
    """(A, 3) in Å → (A, 3) fractional.

    Raises:
        Reject: the lattice vectors are linearly dependent.
    """
    try:
        fractional: FloatArray = coordinates @ np.linalg.inv(lattice)
    except np.linalg.LinAlgError:
        raise _reject("lattice vectors are linearly dependent") from None
    return fractional


def _merged_sites(
    lattice: FloatArray, positions: FloatArray, occupancy: FloatArray, site: IntArray
) -> tuple[IntArray, FloatArray]:
    """Site of each row after coincident, partly occupied sites have become one, and totals."""
    total, place = occupancy, positions
    if site[-1] + 1 < len(site):
        total = np.bincount(site, weights=occupancy).astype(np.float64)
        place = positions[np.searchsorted(site, np.arange(len(total)))]
    assert len(total) == site[-1] + 1, "sites must count up from 0"
    first, second, distance = close_pairs(lattice, place, MIN_DISTANCE)
    if len(first) == 0:
        return site, total
    bad = distance > SAME_SITE
    bad |= (first == second) | (total[first] + total[second] > 1.0 + _OCCUPANCY_SLACK)
    if bad.any():
        pair = int(bad.argmax())
        i, j, apart = first[pair], second[pair], distance[pair]
        who = f"sites {i} and {j} are {apart:.3f} Å apart"
        if i == j:
            who = f"an atom is {apart:.3f} Å from its own image"
        raise _reject(f"{who}; must be ≥ {MIN_DISTANCE}")
    root = np.arange(len(total))
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        if root[i] != root[j]:
            root[root == root[j]] = root[i]
    merged = np.unique(root, return_inverse=True)[1][site]
    return merged, np.bincount(merged, weights=occupancy).astype(np.float64)


def _one_row_a_species(
    positions: FloatArray, species: Sequence[str], occupancy: FloatArray, site: IntArray
) -> tuple[FloatArray, list[str], FloatArray, IntArray]:
    """Rows ordered by site, equal species of a site added up, one position a site."""
    amounts: dict[tuple[int, str], float] = {}
    place: dict[int, int] = {}
    for row, key in enumerate(zip(site.tolist(), species, strict=True)):
        place.setdefault(key[0], row)
        amounts[key] = amounts.get(key, 0.0) + float(occupancy[row])
    rows = sorted(amounts, key=lambda key: key[0])
    new_site = np.array([key[0] for key in rows], dtype=np.int64)
    return (
        positions[[place[key[0]] for key in rows]],
        [key[1] for key in rows],
        np.array([amounts[key] for key in rows]),
        new_site,
    )


def _reject(reason: str) -> Reject:
    return Reject("structure", reason)
