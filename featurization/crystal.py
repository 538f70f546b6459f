"""The crystal as it travels from a source to a cloud, and the reason when it cannot.

Shape legend of this package: A scatterers, P reciprocal-lattice points, S distinct species,
N crystals.
"""

import math
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CRYSTAL_SYSTEMS = (
    "triclinic",
    "monoclinic",
    "orthorhombic",
    "tetragonal",
    "trigonal",
    "hexagonal",
    "cubic",
)

# Name → unit of every label that sources give; a source may add its own (unit "").
LABEL_UNITS = {
    "bulk_modulus": "GPa",
    "shear_modulus": "GPa",
    "band_gap": "eV",
    "energy_above_hull": "eV/atom",
    "formation_energy_per_atom": "eV/atom",
}


class Reject(Exception):
    """One crystal cannot be featurized: becomes a row of `rejects.csv`, never a crash."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage  # "source", "structure", "cell", "diffraction", "guard" or "internal"
        self.reason = reason


# Stated wherever data of the Materials Project can enter and be passed on.
ATTRIBUTION = (
    "Crystals and labels that come from the Materials Project are licensed CC BY 4.0: "
    "A. Jain et al., APL Materials 1, 011002 (2013)."
)


def cell_volume(lattice: FloatArray) -> float:
    """|a · (b × c)| in Å³ of (3, 3) rows."""
    # Plain floats: for one 3 × 3 matrix ten times faster than numpy.linalg, and no warnings.
    a, (bx, by, bz), (cx, cy, cz) = lattice.tolist()
    volume: float = (
        a[0] * (by * cz - bz * cy) + a[1] * (bz * cx - bx * cz) + a[2] * (bx * cy - by * cx)
    )
    return abs(volume)


@dataclass(frozen=True, slots=True)
class Crystal:
    """A periodic crystal: one row a scatterer, i.e. one species on one site.

    A site shared by several species (partial occupancy) has several rows with equal `site` and
    equal position; vacancies are the part that is missing to 1.
    """

    id: str
    lattice: FloatArray  # (3, 3), rows a, b, c in Å
    positions: FloatArray  # (A, 3), fractional
    species: tuple[str, ...]  # (A,), element symbols; "D" is deuterium
    occupancy: FloatArray  # (A,), 0 < o ≤ 1
    site: IntArray  # (A,), 0 … number of sites − 1
    labels: dict[str, float] = field(default_factory=dict)  # name → value; unknown ones are absent
    group: str = ""  # what a split must keep together; the reduced formula when empty

    @property
    def volume(self) -> float:
        """Cell volume in Å³."""
        return cell_volume(self.lattice)

    @property
    def composition(self) -> dict[str, float]:
        """Species → number of atoms a cell, weighted by occupancy."""
        total: dict[str, float] = {}
        for name, occupancy in zip(self.species, self.occupancy.tolist(), strict=True):
            total[name] = total.get(name, 0.0) + occupancy
        return total

    @property
    def reduced_formula(self) -> str:
        """Elements in alphabetical order with the smallest whole amounts, e.g. `O2Si`.

        Amounts that are not whole (partial occupancy) are divided by the number of atoms and
        written with three decimals: supercells of one crystal always get one formula.
        """
        amounts = dict(sorted(self.composition.items()))
        rounded = {name: round(amount) for name, amount in amounts.items()}
        if all(abs(amounts[n] - rounded[n]) < 1e-3 and rounded[n] > 0 for n in amounts):
            divisor = reduce(math.gcd, rounded.values())
            counts = {name: amount // divisor for name, amount in rounded.items()}
            return "".join(f"{n}{c if c > 1 else ''}" for n, c in counts.items())
        atoms = sum(amounts.values())
        return "".join(f"{n}{a / atoms:.3f}" for n, a in amounts.items())
