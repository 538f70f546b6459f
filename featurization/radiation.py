"""What one atom scatters: f(|q|) for X-rays, neutrons and electrons.

s = sin θ / λ = |q| / 2 (1/Å) with the crystallographic |q| = 1/d, no 2π.

| name            | unit | table                                                                   |
|-----------------|------|-------------------------------------------------------------------------|
| xray            | e    | International Tables C (1992) table 6.1.1.4: 4 Gaussians + c, neutral   |
| xray_pymatgen   | e    | Z − 41.78214 s² Σ a exp(−b s²), the parametrization that the paper used |
| neutron         | fm   | bound coherent lengths, Sears, Neutron News 3, 26 (1992); H, D apart |
| electron        | Å    | International Tables C (2011) table 4.3.2.2: 5 Gaussians, neutral       |

The Gaussians are fitted for s ≤ 2 1/Å; clouds that reach further are rejected. That of
xray_pymatgen tends to Z instead of 0 and is already too large for light atoms beyond |q| = 2 1/Å
(hydrogen: 4 times the value of the International Tables); take it for parity with the paper only.

The tables are the ones that gemmi and pymatgen carry. b(Ti) is −3.438 fm in this one, −3.370 in
others. Imaginary parts (absorption) and charges of ions are ignored.
"""

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files

import gemmi
import numpy as np

from featurization.config import RadiationName
from featurization.crystal import FloatArray, Reject

UNITS: dict[RadiationName, str] = {
    "xray": "e",
    "xray_pymatgen": "e",
    "neutron": "fm",
    "electron": "Å",
}


def form_factors(species: Sequence[str], q: FloatArray, radiation: RadiationName) -> FloatArray:
    """Scattering of each species at each |q|.

    Args:
        species: (S,) element symbols, "D" for deuterium.
        q: (P,) |q| in 1/Å.
        radiation: which table.

    Returns:
        (S, P) in the table's unit.

    Raises:
        Reject: a species without a value in the table.
    """
    s2 = 0.25 * q * q
    return np.stack([_one(name, s2, radiation) for name in species])


def _one(name: str, s2: FloatArray, radiation: RadiationName) -> FloatArray:
    constant, slope, amplitudes, widths = _coefficients(name, radiation)
    gaussians = amplitudes @ np.exp(-np.multiply.outer(widths, s2))
    return constant + (s2 * gaussians if slope else gaussians)


@cache
def _coefficients(
    name: str, radiation: RadiationName
) -> tuple[float, bool, FloatArray, FloatArray]:
    """Constant, whether s² multiplies the Gaussians, and their amplitudes and widths (Å²)."""
    element = gemmi.Element(name)
    if element.atomic_number == 0:  # gemmi's unknown element "X" scatters like oxygen
        raise Reject("diffraction", f"{name} is no element")
    none = np.zeros(0)
    if radiation == "neutron":
        length = element.neutron92.calculate_sf(0.0) if element.neutron92 is not None else 0.0
        if length == 0.0:
            raise Reject("diffraction", f"no neutron scattering length for {name}")
        return float(length), False, none, none
    if radiation == "xray_pymatgen":
        table = _pymatgen_table()
        pairs = table.get(name)
        if pairs is None:
            raise Reject("diffraction", f"no X-ray form factor for {name} in pymatgen's table")
        a, b = np.array(pairs, dtype=np.float64).T
        return float(element.atomic_number), True, -41.78214 * a, b
    coefficients = element.it92 if radiation == "xray" else element.c4322
    if coefficients is None or coefficients.calculate_sf(0.0) == 0.0:
        raise Reject("diffraction", f"no {radiation} form factor for {name}")
    constant = coefficients.c if isinstance(coefficients, gemmi.IT92Coef) else 0.0
    return constant, False, np.array(coefficients.a), np.array(coefficients.b)


@lru_cache(maxsize=1)
def _pymatgen_table() -> dict[str, list[list[float]]]:
    source = files("pymatgen.analysis.diffraction") / "atomic_scattering_params.json"
    table: dict[str, list[list[float]]] = json.loads(source.read_text())
    return table
