"""Symmetry against intensities: the paper's claim as one test a task, declared before the data.

Wang et al. (arXiv 2101.01773, abstract) find that the spatial symmetry of the diffraction pattern
is more important to the classification than its intensities. Here each side is the arms that
destroy the one wholly and leave the other exactly as it is:

| side      | arms                                     | destroyed             | kept exactly |
|-----------|------------------------------------------|-----------------------|--------------|
| symmetry  | `directions_random`                      | all angles            | |q| and I    |
| intensity | `intensity_binary`, `intensity_shuffled` | which point is strong | positions    |

Arms that destroy some of both (`basis_only`, cut-offs, bands, dropout), less than all (scaling,
jitter, strain, noise), or that act before or after the cloud, are on neither side. The test is of
the grid's first model, trained again on perturbed clouds (mode `retrain`), by its primary metric;
each side is the mean of its arms that the grid has. These lists were fixed on 2026-11-25, before
any grid was analysed with them; they are changed only with a new date here.

`difference` = (symmetry destroyed) − (intensities destroyed), paired by seed, with interval and p
as all effects have them and Holm's correction over the tasks of the grid:

| verdict      | when                                                                       |
|--------------|----------------------------------------------------------------------------|
| supported    | corrected p < 5 % and difference < 0: losing the symmetry costs more        |
| contradicted | corrected p < 5 % and difference > 0: losing the intensities costs more     |
| undecided    | otherwise, and always with one seed                                        |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ablation import significance
from ablation.significance import ALPHA, MARGIN, TESTED
from ablation.stats import Sampled, Samples, assess
from ablation.trials import Condition
from training.metrics import METRICS

SYMMETRY_ARMS = ("directions_random",)
INTENSITY_ARMS = ("intensity_binary", "intensity_shuffled")
SIDES = {"symmetry": SYMMETRY_ARMS, "intensity": INTENSITY_ARMS}
_NUMBERS = ("symmetry", "intensity", "difference", "low", "high", "p", "p_holm", "p_equivalence")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("task", "model", "metric", "symmetry_arms", "intensity_arms")]
    + [(name, pa.float64()) for name in _NUMBERS]
    + [("seeds", pa.int64()), ("verdict", pa.string())]
)


def declared(samples: Samples, model: str) -> dict[str, list[Condition]]:
    """The conditions of each side that have a trial."""
    return {
        side: [c for arm in arms if (c := Condition(model, arm)) in samples.trials.probabilities]
        for side, arms in SIDES.items()
    }


def contrast(samples: Samples, model: str, metric: str) -> dict[str, Any] | None:
    """The row of one task, without its name and its family; None when a side has no trial.

    A seed counts when the reference and all arms of both sides have it.
    """
    sides = declared(samples, model)
    base = samples.trials.reference(model)
    if base is None or not all(sides.values()):
        return None
    metric = metric if metric in TESTED else TESTED[0]
    used = [base, *sides["symmetry"], *sides["intensity"]]
    seeds = sorted(set.intersection(*(set(samples.seeds(c)) for c in used)))
    if not seeds:
        return None

    def mean(conditions: Sequence[Condition]) -> Sampled:
        each = [
            samples(c)[metric].of([samples.seeds(c).index(seed) for seed in seeds])
            for c in conditions
        ]
        parts = [part for found in each if (part := found.parts_SG) is not None]
        return Sampled(np.mean([found.values_SR for found in each], axis=0), np.mean(parts, axis=0))

    none, symmetry, intensity = (mean(c) for c in ([base], sides["symmetry"], sides["intensity"]))
    span = METRICS[metric].high - METRICS[metric].low
    found = assess(symmetry - intensity, samples.trials.groups, span, samples.seed)
    return {
        "model": model,
        "metric": metric,
        "symmetry_arms": ", ".join(c.arm for c in sides["symmetry"]),
        "intensity_arms": ", ".join(c.arm for c in sides["intensity"]),
        "symmetry": float((symmetry - none).values_SR[:, 0].mean()),
        "intensity": float((intensity - none).values_SR[:, 0].mean()),
    } | {name: found[name] for name in ("difference", "low", "high", "seeds", "p", "p_equivalence")}


def contrast_table(rows: Mapping[str, dict[str, Any] | None]) -> pa.Table:
    """`SCHEMA`: the rows of `contrast` by task, corrected over the tasks and with their verdict."""
    known = [{"task": task} | row for task, row in rows.items() if row is not None]
    for row, p in zip(known, significance.holm([row["p"] for row in known]), strict=True):
        row["p_holm"] = float(p)
        sure = row["seeds"] > 1 and p < ALPHA
        row["verdict"] = "undecided" if not sure else _side(row["difference"])
    return pa.Table.from_pylist(known, schema=SCHEMA)


def sentence(row: Mapping[str, Any]) -> str:
    """The verdict in words and numbers."""
    title = METRICS[row["metric"]].title
    numbers = (
        f"{title} changes by {signed(row['symmetry'])} without the symmetry and by "
        f"{signed(row['intensity'])} without the intensities; difference "
        f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}], "
        f"p {_p(row['p_holm'])}, {row['seeds']} seeds"
    )
    if row["verdict"] == "undecided" and row["seeds"] < 2:
        return f"undecided: {numbers}. One seed does not tell how much trainings differ."
    if row["verdict"] == "undecided" and row["p_equivalence"] < ALPHA:
        return f"undecided: {numbers}. The two cost the same within {MARGIN:g}."
    return f"{row['verdict']}: {numbers}."


def _side(difference: float) -> str:
    return "supported" if difference < 0 else "contradicted"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def signed(value: float) -> str:
    """A number with its sign, a true minus."""
    return f"{value:+.3f}".replace("-", "−")
