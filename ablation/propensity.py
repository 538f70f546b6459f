"""Which structure prototypes host a property whatever their chemistry.

For each prototype with enough held-out crystals: how often they have the property, how often models
that see the structure say so, and how often `composition_only` says so, which knows the formula and
nothing else. Where a structure hosts a property by itself, the first two agree and the third does
not (Wang et al., arXiv 2101.01773, argue that such structures exist).

A prototype is what crystals of one structure type share whatever their elements and size: the
anonymous formula (amounts in rising order, ABC3), the Pearson symbol (lattice, atoms of the
conventional cell, of the rhombohedral one for hR) and the space group, much as in the first three
parts of an AFLOW label: ABC3_cP5_221.
Atoms are counted from the intensity at the origin, |F(000)|²/V², and the formula's scattering;
where that gives no whole number of formula units, the count is "?". Types that share all three are
counted as one, such as NiAs and BN (AB_hP4_194): 14 of 248 labels of the embedded AFLOW library.

Shape legend: N held-out crystals.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pymatgen.core.composition import Composition

from ablation.catalogue import Catalogue, find_dataset
from ablation.checked_files import blaming, read_json, read_table, require
from ablation.figures import Drawing, draw
from ablation.figures_propensity import propensity_figure
from ablation.significance import holm
from ablation.tables import write_pair
from cluster.errors import UserError
from cluster.files import replacing
from featurization.crystal import Reject
from featurization.radiation import form_factors
from training.metrics import FloatArray, IntArray
from training.proportion import proportion

_CENTRING = {"P": 1, "R": 1, "A": 2, "B": 2, "C": 2, "S": 2, "I": 2, "F": 4}
_WHOLE = 0.1  # how far from a whole number a count of formula units may be


@dataclass(frozen=True, slots=True)
class Held:
    """The held-out crystals that all runs have predicted, and what they say."""

    task: str
    positive: str  # name of class 1
    ids: list[str]  # (N,)
    groups: list[str]  # (N,)
    labels: IntArray  # (N,), 1 where the crystal has the property
    predicted: Mapping[str, FloatArray]  # model → (N,) probability of it, mean over its runs


def propensity(
    dataset: Path, runs: Sequence[Path], out: Path, *, members: int = 5
) -> tuple[Held, pa.Table]:
    """Write `out/propensity.parquet`, `.csv`, `.svg` and `.png`; returns what they show.

    The table has a row a prototype, ranked by the lower end of `observed`'s interval: `prototype`,
    `example` (its most frequent formula), `crystals` in the dataset, `members` held out, `groups`,
    `observed` with `_low` and `_high`, `excess` over the rate of all held-out crystals, and of each
    model `MODEL` the mean probability with interval, `beyond_MODEL` = observed − that, and
    `p_MODEL` (see `surprise`), corrected after Holm over the prototypes. Intervals are Wilson's
    with whole groups (`training.proportion`), for mean probabilities on the safe side.

    Args:
        runs: folders of finished training runs of one yes-or-no task on the dataset; of several
            runs of one model, the mean counts. Validation and test crystals are held out.
        members: fewest held-out crystals of a prototype in the table.

    Raises:
        UserError: no dataset, a run that does not fit, or no prototype with enough members.
    """
    held = read_held(runs)
    summary = read_json(runs[0] / "config.json").get("identity", {})
    place = find_dataset(dataset, str(dataset), summary, dataset)
    if place.catalogue is None:
        raise UserError(place.problem, remedy="give the dataset that the runs were trained on")
    labels = prototype_labels(place.catalogue, str(place.summary["config"]["cell"]))
    table = propensity_table(held, place.catalogue, labels, members)
    if not table.num_rows:
        raise UserError(
            f"no prototype has {members} of the {len(held.ids)} held-out crystals",
            remedy="ask for fewer with --members, or give more crystals",
        )
    write_pair(out / "propensity.parquet", out / "propensity.csv", table)
    drawing = _drawing(held, table)
    for ending, content in (("svg", drawing.svg), ("png", drawing.png)):
        with replacing(out / f"propensity.{ending}") as temporary:
            temporary.write_bytes(content)
    return held, table


def read_held(runs: Sequence[Path]) -> Held:
    """Held-out crystals that all runs have predicted.

    Raises:
        UserError: a run is not finished, has another task than the first or more than two
            classes, or disagrees with the first on a crystal's label.
    """
    by_model: dict[str, list[dict[str, float]]] = {}
    label_of: dict[str, int] = {}
    group_of: dict[str, str] = {}
    first: tuple[str, tuple[str, ...]] | None = None
    common: set[str] = set()
    for run in runs:
        require(run, ("config.json", "metrics.json", "predictions.parquet"), "run")
        metrics, config = read_json(run / "metrics.json"), read_json(run / "config.json")
        with blaming(run / "metrics.json"):
            asked = str(metrics.get("task")), tuple(map(str, metrics.get("classes", ())))
        if len(asked[1]) != 2:
            raise UserError(
                f"{run} is of task {asked[0]} with {len(asked[1])} classes",
                remedy="give runs of a yes-or-no task, such as bulk_modulus",
            )
        if first is not None and asked != first:
            raise UserError(
                f"{run} is of task {asked[0]}, {runs[0]} of {first[0]}",
                remedy="give runs of one task",
            )
        first = asked
        path = run / "predictions.parquet"
        table = read_table(path, ("id", "group", "label", "p1"))
        ids = [str(name) for name in table["id"].to_pylist()]
        labels = dict(zip(ids, table["label"].to_pylist(), strict=True))
        wrong = [name for name in ids if label_of.get(name, labels[name]) != labels[name]]
        if wrong:
            raise UserError(
                f"{path} gives {wrong[0]!r} another class than the runs before it",
                remedy="give runs on one dataset with one threshold",
            )
        label_of |= labels
        group_of |= dict(zip(ids, map(str, table["group"].to_pylist()), strict=True))
        common = common & set(ids) if by_model else set(ids)
        model = str(config.get("training", config).get("model", "model"))
        predicted = dict(zip(ids, table["p1"].to_pylist(), strict=True))
        by_model.setdefault(model, []).append(predicted)
    if first is None or not common:
        raise UserError(
            "the runs have no held-out crystal in common", remedy="give runs on one dataset"
        )
    kept = sorted(common)
    return Held(
        task=first[0],
        positive=first[1][1],
        ids=kept,
        groups=[group_of[name] for name in kept],
        labels=np.array([label_of[name] for name in kept], dtype=np.int64),
        predicted={
            model: np.array([[each[name] for name in kept] for each in found]).mean(axis=0)
            for model, found in by_model.items()
        },
    )


def prototype_labels(catalogue: Catalogue, cell: str) -> list[str]:
    """The prototype of each crystal of a dataset, as the module describes it.

    Args:
        cell: which cell the dataset stores (`featurization.config`); atoms are not counted for
            `as_given`, which may be any.
    """
    known: dict[str, tuple[str, int, float]] = {}
    labels = []
    for row, formula in enumerate(catalogue.formulas.tolist()):
        if formula not in known:
            known[formula] = _formula(formula, catalogue.radiation)
        anonymous, atoms, scattering = known[formula]
        bravais = str(catalogue.bravais[row])
        centring = _CENTRING.get(bravais[1:2], 0)
        units = catalogue.forward[row] * catalogue.volumes[row] / scattering
        whole = round(units) if math.isfinite(units) else 0
        if cell == "as_given" or not centring or not whole or abs(units - whole) > _WHOLE:
            count = "?"
        else:
            per_cell = 1 if cell == "conventional" else centring
            count = str(whole * atoms * per_cell)
        labels.append(f"{anonymous}_{bravais}{count}_{catalogue.numbers[row]}")
    return labels


def propensity_table(
    held: Held, catalogue: Catalogue, labels: Sequence[str], members: int
) -> pa.Table:
    """The table of `propensity`."""
    place = catalogue.rows_of(held.ids)
    of_crystal = [labels[row] if row >= 0 else "" for row in place.tolist()]
    sizes, formulas = Counter(labels), Counter(zip(labels, catalogue.formulas, strict=True))
    rows: dict[str, list[int]] = {}
    for number, label in enumerate(of_crystal):
        if label:
            rows.setdefault(label, []).append(number)
    base = float(held.labels.mean())
    found = []
    for label, part in rows.items():
        if len(part) < members:
            continue
        groups = [held.groups[number] for number in part]
        seen = held.labels[part]
        observed = proportion(seen, groups)
        own = [(-count, str(name)) for (of, name), count in formulas.items() if of == label]
        row: dict[str, Any] = {
            "prototype": label,
            "example": min(own)[1],
            "crystals": sizes[label],
            "members": len(part),
            "groups": len(set(groups)),
            "observed": observed.value,
            "observed_low": observed.low,
            "observed_high": observed.high,
            "excess": observed.value - base,
        }
        for model, p_N in held.predicted.items():
            said = proportion(p_N[part], groups)
            row |= {model: said.value, f"{model}_low": said.low, f"{model}_high": said.high}
            row[f"beyond_{model}"] = observed.value - said.value
            row[f"p_{model}"] = surprise(int(seen.sum()), p_N[part])
        found.append(row)
    for model in held.predicted if found else ():
        corrected = holm([row[f"p_{model}"] for row in found])
        for row, p in zip(found, corrected.tolist(), strict=True):
            row[f"p_{model}"] = p
    found.sort(key=lambda row: (-row["observed_low"], row["prototype"]))
    return pa.Table.from_pylist(found)


def surprise(hits: int, p_N: FloatArray) -> float:
    """Two-sided p of so many hits, if each crystal had the property with its stated probability.

    The number of hits is then Poisson-binomial; the smaller tail is doubled. Small values say that
    the model's probabilities do not account for the prototype.
    """
    chance = np.ones(1)
    for p in np.clip(p_N, 0.0, 1.0):
        chance = np.convolve(chance, [1 - p, p])
    tails = chance[: hits + 1].sum(), chance[hits:].sum()
    return float(min(1.0, 2 * min(tails)))


def _formula(formula: str, radiation: Any) -> tuple[str, int, float]:
    """Anonymous formula, its atoms, and what it scatters forward (NaN where unknown)."""
    amounts = Composition(formula).get_el_amt_dict()
    counts = sorted(amounts.values())
    letters = [chr(ord("A") + place) for place in range(len(counts))]
    anonymous = "".join(
        letter + ("" if count == 1 else f"{count:g}")
        for letter, count in zip(letters, counts, strict=True)
    )
    try:
        f_S = form_factors(list(amounts), np.zeros(1), radiation)[:, 0]
    except Reject:
        return anonymous, int(sum(counts)), math.nan
    return anonymous, int(sum(counts)), abs(float(f_S @ np.array(list(amounts.values()))))


def _drawing(held: Held, table: pa.Table) -> Drawing:
    rows = table.to_pylist()
    return draw(
        lambda: propensity_figure(rows, list(held.predicted), held.positive, held.labels.mean()),
        f"How often crystals of a prototype are {held.positive}.",
    )
