"""What decides the content of a dataset: every field lands in the manifest."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import Config

# |q| in 1/Å up to which the tables of form factors are fitted: s = |q|/2 ≤ 2 1/Å.
Q_LIMIT = 4.0

RadiationName = Literal["xray", "xray_pymatgen", "neutron", "electron"]
CellName = Literal["primitive", "conventional", "niggli", "as_given"]
ScattererName = Literal["atoms", "points", "alike", "permuted"]


# What datasets were made with before these fields were there.
_BEFORE = {"scatterers": "atoms"}


class FeaturizationConfig(Config):
    """Settings of crystal → cloud."""

    radiation: RadiationName = "xray"
    """Scatterer: xray (IT92), xray_pymatgen (the paper's), neutron (Sears 1992), electron."""
    also_radiation: tuple[RadiationName, ...] = ()
    """More scatterers such as neutron on the same points, each a column `intensity_NAME`."""
    scatterers: ScattererName = "atoms"
    """What sits on the sites: atoms; points of their f(0); silicon on all, alike; or the crystal's
    elements in each other's places, permuted."""
    cell: CellName = "primitive"
    """Cell that spans the reciprocal lattice; primitive and conventional are standardized."""
    selection: str = "sphere:1.2"
    """miller:m takes |h|,|k|,|l| ≤ m; sphere:q takes |q| ≤ q in 1/Å, whatever the cell."""
    symprec: float = Field(default=0.1, gt=0, le=1)
    """Symmetry tolerance in Å (the Materials Project's 0.1)."""
    b_iso: float = Field(default=0.0, ge=0, le=50)
    """Isotropic Debye–Waller B in Å² for every atom; 0 is the static crystal."""
    absences: Literal["auto", "keep", "drop"] = "auto"
    """Absent reflections: keep (intensity 0), drop, or auto: keep in miller, drop in sphere."""
    absence_tolerance: float = Field(default=1e-6, ge=0, lt=1)
    """A reflection with |F|² ≤ tolerance × (Σ|f|)² is absent."""
    max_points: int = Field(default=100_000, ge=1, le=1_000_000)
    """A crystal with more points (Friedel half) is rejected; 200 bytes of memory a point."""
    max_atoms: int = Field(default=2000, ge=1, le=10_000)
    """A crystal with more scatterers in the cell that the source gives is rejected; the search for
    symmetry takes 0.1 GiB of memory for 2,000 atoms, 0.6 for 5,000, 2 for 10,000."""
    max_seconds: float = Field(default=60.0, gt=0, le=86_400)
    """A crystal that takes more of the processor's time is rejected."""
    occupancy: Literal["average", "reject"] = "average"
    """Partly occupied sites: average their scattering, or reject the crystal."""
    id_prop_label: str = "target"
    """Name of the values in an id_prop.csv without header row."""
    shard_structures: int = Field(default=4096, ge=1)
    """Crystals a shard, at most."""
    shard_mib: int = Field(default=64, ge=1, le=1024)
    """MiB of points after which a shard is closed."""

    @field_validator("selection")
    @classmethod
    def _selection(cls, text: str) -> str:
        kind, _, value = text.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if kind == "miller" and number.is_integer() and number >= 1:
            if number <= 50:
                return f"miller:{int(number)}"
        elif kind == "sphere" and 0 < number <= Q_LIMIT:
            # All digits: `:g` would move the sphere of a radius with more than six.
            return f"sphere:{number!r}".removesuffix(".0")
        raise ValueError("must be miller:m (whole m, 1 to 50) or sphere:q (0 < q ≤ 4 1/Å)")

    @field_validator("id_prop_label")
    @classmethod
    def _label(cls, text: str) -> str:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text):
            raise ValueError("must be letters, digits and _, of which the first is a letter")
        return text

    @model_validator(mode="after")
    def _within_max_points(self) -> Self:
        limit = self.miller_limit or 0
        if (points := ((2 * limit + 1) ** 3 + 1) // 2) > self.max_points and limit:
            raise ValueError(
                f"selection = {self.selection} has {points:,} points of every crystal, more than "
                f"max_points = {self.max_points:,}"
            )
        return self

    @model_validator(mode="after")
    def _each_radiation_once(self) -> Self:
        named = (self.radiation, *self.also_radiation)
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(
                f"also_radiation: {', '.join(twice)} given twice; radiation is {self.radiation}, "
                "also_radiation lists others, each once"
            )
        return self

    @property
    def miller_limit(self) -> int | None:
        """m of `miller:m`, else None."""
        kind, _, value = self.selection.partition(":")
        return int(value) if kind == "miller" else None

    @property
    def q_max(self) -> float | None:
        """q of `sphere:q` in 1/Å, else None."""
        kind, _, value = self.selection.partition(":")
        return float(value) if kind == "sphere" else None

    @property
    def drops_absences(self) -> bool:
        """Whether absent reflections leave the cloud."""
        if self.absences == "auto":
            return self.q_max is not None
        return self.absences == "drop"


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the fields that are younger than it."""
    return _BEFORE | recorded
