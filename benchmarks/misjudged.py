"""Why a model misses the crystal system of a crystal: one row a mistake, with the evidence.

    python -m benchmarks.misjudged DATASET RUN…

Of all validation and test crystals that a run gets wrong, as Markdown: the system that symmetry
search finds at four tolerances (in the sources that the dataset names), the Laue group that the
cloud itself shows (`benchmarks.laue`), and the asymmetry: the strongest spherical harmonic that the
answer's system forbids, relative to degree 0. The reason is

- `pattern`: the Laue group that the cloud shows is of the system that the model answered;
- `tolerance`: at another tolerance the search finds the system that the model answered;
- `near-symmetry`: the asymmetry is among the lowest 2 % of all held-out crystals of this system;
- `model`: none of these; the pattern tells the system and the model has overlooked it.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.laue import GROUPS, groups_of
from featurization.cells import standardize
from featurization.config import FeaturizationConfig
from featurization.crystal import CRYSTAL_SYSTEMS, Crystal, Reject
from featurization.manifest import read_manifest
from featurization.sources import open_source
from featurization.worker import crystal_of
from training.dataset import CloudSet, load
from training.models.descriptors import invariants

TOLERANCES = (0.001, 0.01, 0.1, 0.3)  # Å
_LOWEST = 0.02
_BLOCKS = (slice(0, 5), slice(5, 14), slice(14, 27))  # components of degrees 2, 4, 6


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    asked = parser.parse_args()
    answers: dict[str, dict[int, str]] = {}
    for number, run in enumerate(asked.runs):
        table = pq.read_table(run / "predictions.parquet").to_pydict()
        said_N = np.argmax([table[f"p{c}"] for c in range(len(CRYSTAL_SYSTEMS))], axis=0)
        wrong_N = said_N != np.array(table["label"])
        test_N = np.array(table["split"]) == "test"
        print(
            f"{run.name}: {wrong_N[test_N].sum()} of {test_N.sum()} test crystals wrong, "
            f"{wrong_N[~test_N].sum()} of {(~test_N).sum()} validation crystals"
        )
        for row in np.flatnonzero(wrong_N):
            answers.setdefault(table["id"][row], {})[number] = CRYSTAL_SYSTEMS[said_N[row]]
    held_out = set(table["id"])
    data = load(asked.dataset)
    data = data.subset(np.array([row for row, one in enumerate(data.ids) if one in held_out]))
    columns = ("formula", "system", "answer", "runs", "Laue", "asymmetry", "lowest %", "reason")
    titles = (*columns[:4], *(f"{t:g} Å" for t in TOLERANCES), *columns[4:])
    print("\n| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for line in explain(data, answers, searches(asked.dataset, set(answers))):
        print("| " + " | ".join(line) + " |")


def explain(
    data: CloudSet, answers: dict[str, dict[int, str]], found: dict[str, list[str]]
) -> list[list[str]]:
    """A line a crystal: what was answered, what the searches found, the reason."""
    values_NS, laue = invariants(data)[:, -27:], groups_of(data)
    lines = []
    for row in np.flatnonzero(np.isin(data.ids, list(answers))):
        one, true = str(data.ids[row]), str(data.crystal_systems[row])
        said = sorted(answers[one].values(), key=list(answers[one].values()).count)[-1]
        asymmetry_N = asymmetry(values_NS[data.crystal_systems == true], said)
        own = asymmetry(values_NS[row : row + 1], said)[0]
        below = float((asymmetry_N < own).mean())
        if GROUPS[laue[row]][0] == said:
            reason = "pattern"
        elif said in found[one]:
            reason = "tolerance"
        else:
            reason = "near-symmetry" if below <= _LOWEST else "model"
        lines.append([data.groups[row], true, said, str(len(answers[one])), *found[one]])
        lines[-1] += [laue[row], f"{own:.1e}", f"{100 * below:.1f}", reason]
    return lines


def asymmetry(values_NS: NDArray[np.float32], system: str) -> NDArray[np.float64]:
    """(N,) the largest singular value beyond those that a Laue group of `system` allows."""
    groups = [allowed for name, *allowed in GROUPS.values() if name == system]
    each = []
    for allowed in groups:
        forbidden = [
            values_NS[:, block][:, : block.stop - block.start - count]  # ascending
            for block, count in zip(_BLOCKS, allowed, strict=True)
        ]
        each.append(10.0 ** np.concatenate(forbidden, axis=1).max(axis=1, initial=-np.inf))
    smallest: NDArray[np.float64] = np.min(each, axis=0)
    return smallest


def searches(dataset: Path, wanted: set[str]) -> dict[str, list[str]]:
    """Id → the crystal system at each tolerance, from the dataset's sources."""
    manifest = read_manifest(dataset)
    config = FeaturizationConfig(**manifest["config"])
    found: dict[str, list[str]] = {}
    for part in manifest["sources"]:
        source = open_source(part["spec"])
        for record in source.records():
            try:
                crystal = crystal_of(source, record, config)
            except Reject:
                continue
            if crystal.id in wanted:
                found[crystal.id] = [_system(crystal, t) for t in TOLERANCES]
    return found


def _system(crystal: Crystal, tolerance: float) -> str:
    try:
        return standardize(crystal, "as_given", tolerance)[1].crystal_system
    except Reject:
        return "none"


if __name__ == "__main__":
    main()
