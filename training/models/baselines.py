"""What a classifier knows without a cloud in three dimensions: the rivals that a claim must beat.

`lattice`, `powder` and `composition` turn a set into (N, F) float32 features for gradient boosting;
the first sees the cell alone, the second lengths and intensities of the points, the third the
formula. NaN marks what is not known. The functions `…_columns` give the same features by name.
"""

import re
from functools import cache

import gemmi
import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from training.dataset import CloudSet
from training.models.powder_cnn import profiles
from training.models.steady import steady

FloatArray = NDArray[np.float64]
Columns = dict[str, FloatArray]  # name → (N, any)

# Rows: squared lengths of v1 … v7 from the Gruber vector (a², b², c², 2b·c, 2a·c, 2a·b), where bits
# 1, 2, 4 of the index say which of a, b, c are added: the classes of the lattice modulo 2.
_LENGTHS = np.array(
    [[n & 1, n >> 1 & 1, n >> 2, (n & 6) == 6, (n & 5) == 5, (n & 3) == 3] for n in range(1, 8)],
    dtype=np.float64,
)
# Any two classes and the one of their sum.
_SUMS = np.array([(x, y, x ^ y) for x in range(1, 8) for y in range(x + 1, 8)]) - 1

_Q_MAX, _BINS, _LINES = 1.2, 30, 12  # 1/Å; of the powder pattern
_NO_POINT = 1e-3  # of one; what is less of it near a bin is rounding of |q|
# |q| closer than this, in 1/Å, are one line.
_SAME_LINE = 1e-4

_TERM = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d+)?)?")
# Property → key of pymatgen's table of elements.
_PYMATGEN = {
    "number": "Atomic no",
    "mass": "Atomic mass",
    "Mendeleev number": "Mendeleev no",
    "electronegativity": "X",
    "atomic radius": "Atomic radius",
    "calculated radius": "Atomic radius calculated",
    "van der Waals radius": "Van der waals radius",
    "electron affinity": "Electron affinity",
    "melting point": "Melting point",
    "boiling point": "Boiling point",
    "molar volume": "Molar volume",
    "thermal conductivity": "Thermal conductivity",
}
_CAPACITY = {"s": 2, "p": 6, "d": 10, "f": 14}
_NOBLE = (2, 10, 18, 36, 54, 86)


def lattice(data: CloudSet) -> NDArray[np.float32]:
    """(N, 57) features of `lattice_columns`."""
    return table(lattice_columns(data))


def powder(data: CloudSet) -> NDArray[np.float32]:
    """(N, 200) features of `powder_columns`, each kind rounded by `steady`."""
    return table({name: steady(kind) for name, kind in powder_columns(data).items()})


def composition(data: CloudSet) -> NDArray[np.float32]:
    """(N, 155) features of `composition_columns`."""
    return table(composition_columns(data))


def table(columns: Columns) -> NDArray[np.float32]:
    """(N, F), one column after the other."""
    return np.concatenate(list(columns.values()), axis=1).astype(np.float32)


def lattice_columns(data: CloudSet) -> Columns:
    """Invariants of the lattice that `lattice_N33` spans, in Å, with and without its volume.

    All are continuous in the metric and do not depend on the choice of basis: the vonorms (squared
    lengths of the shortest vectors of the seven classes modulo 2; here their roots), the conorms
    (minus the scalar products within a Selling-reduced basis; Conway & Sloane, Proc. R. Soc. A 436,
    55 (1992)), the successive minima, and the cosines between the shortest vectors. The cell of a
    dataset is primitive unless its `cell` says otherwise; another one would hide the centring.
    """
    cells = data.lattice_N33.double().numpy()
    metrics = cells @ cells.transpose(0, 2, 1)
    reduced = np.array([_selling(metric) for metric in metrics.tolist()]).reshape(-1, 12)
    conorms, vonorms = -reduced[:, :6], reduced[:, 6:] @ _LENGTHS.T
    order = np.argsort(vonorms, axis=1)
    shortest = np.sqrt(np.take_along_axis(vonorms, order, axis=1))
    # The third shortest vector may be the sum or difference of the first two.
    coplanar = ((order[:, 0] + 1) ^ (order[:, 1] + 1)) == order[:, 2] + 1
    third = np.where(coplanar, shortest[:, 3], shortest[:, 2])
    minima = np.stack([shortest[:, 0], shortest[:, 1], third], axis=1)
    first, second, both = vonorms[:, _SUMS].transpose(2, 0, 1)
    cosines = (first + second - both) / (2 * np.sqrt(first * second))
    volume = np.abs(np.linalg.det(cells))[:, None]
    edge = np.cbrt(volume)
    return {
        "volume": volume,
        "minimum": minima,
        "minimum/edge": minima / edge,
        "minimum ratio": minima[:, [0, 0, 1]] / minima[:, [1, 2, 2]],
        "vonorm": shortest,
        "vonorm/edge": shortest / edge,
        "conorm": np.sort(conorms, axis=1),
        "conorm/edge²": np.sort(conorms, axis=1) / edge**2,
        "cosine": np.sort(cosines, axis=1),
    }


def _selling(metric: list[list[float]]) -> tuple[float, ...]:
    """The Selling vector and the Gruber vector of the obtuse basis of a metric tensor."""
    (aa, ab, ac), (_, bb, bc), (_, _, cc) = metric
    vector = gemmi.GruberVector([aa, bb, cc, 2 * bc, 2 * ac, 2 * ab]).selling()
    vector.reduce(1e-6 * (aa + bb + cc), 10_000)  # as exact as float32 cells are
    return (*vector.parameters, *vector.gruber().parameters)


def powder_columns(data: CloudSet) -> Columns:
    """The powder pattern up to 1.2 1/Å, I(000) included, and the first lines.

    Sums over all points (both Friedel mates) near bin · 1.2 / 29, shared linearly between the two
    nearest bins, so that all of them are continuous in |q|: intensity, its part of the
    whole, amplitude √I, number of points, mean intensity (NaN without points). A logarithm would
    tell trees nothing new. Twelve more are |q| and intensity of the shortest distinct |q| > 0.
    """
    q_P = data.q_P3.double().norm(dim=1).numpy()
    intensity_P = data.intensity_P.double().numpy()
    weights = (intensity_P, np.sqrt(intensity_P), np.ones_like(q_P))
    intensity, amplitude, points = (profiles(data, w, _Q_MAX, _BINS) for w in weights)
    total = intensity.sum(axis=1, keepdims=True)
    q_lines, i_lines = _lines(data, q_P, _LINES)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "intensity": intensity,
            "fraction": intensity / total,
            "amplitude": amplitude,
            "points": points,
            "mean": np.where(points > _NO_POINT, intensity / points, np.nan),
            "total": np.concatenate([total, points.sum(axis=1, keepdims=True)], axis=1),
            "line |q|": q_lines,
            "line |q| ratio": q_lines / q_lines[:, :1],
            "line intensity": i_lines,
            "line fraction": i_lines / total,
        }


def _lines(data: CloudSet, q_P: FloatArray, count: int) -> tuple[FloatArray, FloatArray]:
    """(N, count) |q| and summed intensity of the shortest distinct |q| > 0, NaN where none is."""
    crystal_P = data.crystal_P.numpy()
    order = np.lexsort((q_P, crystal_P))
    order = order[q_P[order] > 0]
    crystal, q = crystal_P[order], q_P[order]
    first = np.ones(len(q), dtype=bool)
    first[1:] = (np.diff(crystal) > 0) | (np.diff(q) > _SAME_LINE)
    line = np.cumsum(first) - 1
    weights = (data.multiplicity_P.numpy() * data.intensity_P.numpy())[order]
    intensity = np.bincount(line, weights, minlength=int(first.sum()))
    owner = crystal[first]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    kept = rank < count
    tables = np.full((2, len(data), count), np.nan)
    tables[0, owner[kept], rank[kept]] = q[first][kept]
    tables[1, owner[kept], rank[kept]] = intensity[kept]
    return tables[0], tables[1]


def composition_columns(data: CloudSet) -> Columns:
    """Statistics of element properties over the reduced formula in `groups`: chemistry alone.

    As Ward et al., npj Comput. Mater. 2, 16028 (2016): of each property the mean weighted by
    amount, the mean absolute deviation, smallest and largest value, range, and mode (that of the
    most frequent element, the lowest when several are), with p-norms of the fractions, the parts of
    s, p, d, f among the valence electrons, and the mean ionic character. Properties are pymatgen's;
    where one is unknown of an element, its statistics are NaN. D counts as H.

    Raises:
        UserError: a group is no formula, as when the source names its own groups.
    """
    return formula_columns(data.groups)


def formula_columns(formula_N: NDArray[np.str_]) -> Columns:
    """`composition_columns` of formulas from elsewhere."""
    formulas, row_N = np.unique(formula_N, return_inverse=True)
    amounts = [_amounts(str(formula)) for formula in formulas]
    most = max(map(len, amounts), default=1)
    # Shape legend: U formulas, E elements of the longest, K properties.
    symbol_UE = np.zeros((len(amounts), most), dtype=np.int64)
    fraction_UE1 = np.zeros((len(amounts), most, 1))
    names, values = properties()
    for u, formula in enumerate(amounts):
        symbol_UE[u, : len(formula)] = [gemmi.Element(name).atomic_number - 1 for name in formula]
        fraction_UE1[u, : len(formula), 0] = list(formula.values())
    fraction_UE1 /= fraction_UE1.sum(axis=1, keepdims=True)
    there = fraction_UE1 > 0
    value_UEK = np.where(there, values[symbol_UE], 0.0)
    mean_UK = (fraction_UE1 * value_UEK).sum(axis=1)
    deviation = (fraction_UE1 * np.abs(value_UEK - mean_UK[:, None])).sum(axis=1)
    frequent = fraction_UE1 > fraction_UE1.max(axis=1, keepdims=True) - 1e-6
    low, high, mode = (
        np.min(np.where(chosen, sign * value_UEK, np.inf), axis=1) * sign
        for chosen, sign in ((there, 1.0), (there, -1.0), (frequent, 1.0))
    )
    columns = {
        "mean": mean_UK,
        "deviation": deviation,
        "low": low,
        "high": high,
        "range": high - low,
        "mode": mode,
    }
    table = {
        f"{statistic} {name}": column[:, k : k + 1]
        for statistic, column in columns.items()
        for k, name in enumerate(names)
    }
    fraction_UE = fraction_UE1[..., 0]
    table["elements"] = there.sum(axis=1)
    for p in (2, 3, 5, 7, 10):
        table[f"norm {p}"] = (fraction_UE**p).sum(axis=1, keepdims=True) ** (1 / p)
    shells = mean_UK[:, [names.index(f"valence {shell}") for shell in "spdf"]]
    table["valence part"] = shells / shells.sum(axis=1, keepdims=True)
    x_UE = value_UEK[..., names.index("electronegativity")]
    ionic_UEE = 1 - np.exp(-0.25 * (x_UE[:, :, None] - x_UE[:, None]) ** 2)
    table["ionic"] = np.einsum("ue,uf,uef->u", fraction_UE, fraction_UE, ionic_UEE)[:, None]
    return {name: column[row_N] for name, column in table.items()}


def _amounts(formula: str) -> dict[str, float]:
    """Element → amount of a formula without brackets."""
    amounts: dict[str, float] = {}
    pairs = _TERM.findall(formula)
    whole = "".join(name + amount for name, amount in pairs) == formula != ""
    if not whole or not all(gemmi.Element(name).atomic_number for name, _ in pairs):
        raise UserError(
            f"group {formula!r} is no chemical formula, of which the model sees nothing else",
            remedy="train it on a dataset whose source leaves the groups to the reduced formula",
        )
    for name, amount in pairs:
        amounts[name] = amounts.get(name, 0.0) + float(amount or 1)
    return amounts


@cache
def properties() -> tuple[list[str], FloatArray]:
    """Names and (elements, K) values, NaN where unknown; by atomic number − 1."""
    # Takes a second, and only this baseline needs it.
    from pymatgen.core.periodic_table import Element

    rows = []
    for number in range(1, 119):
        element = Element.from_Z(number)
        row = {name: element.data.get(key) for name, key in _PYMATGEN.items()}
        row |= {"row": element.row, "group": element.group}
        row["ionization energy"] = (element.data.get("Ionization energies") or [None])[0]
        core = [noble for noble in _NOBLE if noble < number][-1:]
        known = element.data.get("Electronic structure") is not None
        shells = set(element.full_electronic_structure) if known else set()
        for noble in core:
            shells -= set(Element.from_Z(noble).full_electronic_structure)
        for kind, capacity in _CAPACITY.items():
            held = [electrons for _, shell, electrons in shells if shell == kind]
            row[f"valence {kind}"] = sum(held) if known else None
            row[f"unfilled {kind}"] = capacity * len(held) - sum(held) if known else None
        row["valence"] = sum(electrons for *_, electrons in shells) if known else None
        rows.append(row)
    return list(rows[0]), np.array([list(row.values()) for row in rows], dtype=np.float64)
