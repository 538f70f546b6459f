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
from functools import cache
from importlib.resources import files

import gemmi
import numpy as np

from featurization.config import RadiationName
from featurization.crystal import FloatArray, IntArray, Reject
from featurization.kernel import COEFFICIENTS, GAUSSIANS, form_factor

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
    rows, table = scattering(species, (radiation,))
    s2 = np.ascontiguousarray(0.25 * q * q, dtype=np.float64)
    f = np.empty((len(rows), len(s2)))
    for i, row in enumerate(rows):
        form_factor(table[0, row], s2, f[i])
    return f


def scattering(
    species: Sequence[str], radiations: tuple[RadiationName, ...], *, points: bool = False
) -> tuple[IntArray, FloatArray]:
    """The fits of form factors to several tables, for `kernel.form_factor`.

    Args:
        points: f(0) at all |q| in place of the fits.

    Returns:
        (A,) row of each species in a (R, S, COEFFICIENTS) array, which callers must not change.

    Raises:
        Reject: a species without a value in one of the tables.
    """
    rows, table = _tables(radiations)
    if points:
        table = _at_rest(radiations)
    try:
        return np.array([rows[name] for name in species]), table
    except KeyError as error:
        name = error.args[0]
    for radiation in radiations:
        _fit(name, radiation)  # says what is missing
    raise Reject("diffraction", f"{name} is no element")


@cache
def _tables(radiations: tuple[RadiationName, ...]) -> tuple[dict[str, int], FloatArray]:
    """Element → row, and (R, S, COEFFICIENTS), of the elements that all radiations know."""
    fits: dict[str, list[list[float]]] = {}
    for name in [gemmi.Element(z).name for z in range(1, 119)] + ["D"]:
        try:
            fits[name] = [_fit(name, radiation) for radiation in radiations]
        except Reject:
            continue
    table = np.array(list(fits.values())).transpose(1, 0, 2)
    return {name: row for row, name in enumerate(fits)}, np.ascontiguousarray(table)


@cache
def _at_rest(radiations: tuple[RadiationName, ...]) -> FloatArray:
    """`_tables` with each fit replaced by its constant value at |q| = 0."""
    _, table = _tables(radiations)
    constant = np.zeros_like(table)
    for radiation, fits in enumerate(table):
        for row, fit in enumerate(fits):
            form_factor(fit, np.zeros(1), constant[radiation, row, :1])
    return constant


def _fit(name: str, radiation: RadiationName) -> list[float]:
    """Constant, whether s² multiplies the Gaussians, their amplitudes and their widths (Å²)."""
    element = gemmi.Element(name)
    if element.atomic_number == 0:  # gemmi's unknown element "X" scatters like oxygen
        raise Reject("diffraction", f"{name} is no element")
    if radiation == "neutron":
        length = element.neutron92.calculate_sf(0.0) if element.neutron92 is not None else 0.0
        if length == 0.0:
            raise Reject("diffraction", f"no neutron scattering length for {name}")
        return _row(float(length), False, [], [])
    if radiation == "xray_pymatgen":
        table = _pymatgen_table()
        pairs = table.get(name)
        if pairs is None:
            raise Reject("diffraction", f"no X-ray form factor for {name} in pymatgen's table")
        amplitudes = [-41.78214 * a for a, _ in pairs]
        return _row(float(element.atomic_number), True, amplitudes, [b for _, b in pairs])
    fit = element.it92 if radiation == "xray" else element.c4322
    if fit is None or fit.calculate_sf(0.0) == 0.0:
        raise Reject("diffraction", f"no {radiation} form factor for {name}")
    constant = fit.c if isinstance(fit, gemmi.IT92Coef) else 0.0
    return _row(constant, False, fit.a, fit.b)


def _row(
    constant: float, slope: bool, amplitudes: Sequence[float], widths: Sequence[float]
) -> list[float]:
    unused = [0.0] * (GAUSSIANS - len(amplitudes))
    row = [constant, float(slope), *amplitudes, *unused, *widths, *unused]
    assert len(row) == COEFFICIENTS
    return row


@cache
def _pymatgen_table() -> dict[str, list[list[float]]]:
    source = files("pymatgen.analysis.diffraction") / "atomic_scattering_params.json"
    table: dict[str, list[list[float]]] = json.loads(source.read_text())
    return table
