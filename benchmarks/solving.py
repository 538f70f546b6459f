"""Structures solved from points alone: how many, how rightly, how fast, how little a turn matters.

    OMP_NUM_THREADS=1 python -m benchmarks.solving DATASET [--each 40]

Prints Markdown: crystals drawn by their number of stored points; those of which atoms are found,
those that are solved (R < `refining.SOLVED`), those of them whose formula is that of the source;
seconds of a core a crystal. Each crystal is also turned at random and mirrored: it is found, solved
and given a formula as before, or counted as changed. The dataset's groups must be formulas, as
those of the Materials Project are, its selection `sphere:1.2`.
"""

import argparse
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from pymatgen.core import Composition, Element

from cluster.provenance import provenance
from training.dataset import CloudSet, load
from training.models.atoms import structures
from training.models.refining import SOLVED, Atoms
from training.models.solving import MOST_POINTS
from training.rotations import random_rotations

EDGES = (0, 250, 500, 1000, 1500, 2000, MOST_POINTS)
COLUMNS = ("stored points", "crystals", "found", "solved", "formula right", "s each", "changed")


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--each", type=int, default=40, help="crystals of each number of points")
    asked = parser.parse_args()
    data = load(asked.dataset)
    made = provenance()
    print(f"{len(data)} crystals; {made['created'][:10]}, commit {str(made['commit'])[:12]}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    sizes, random = data.offsets.diff().numpy(), np.random.default_rng(0)
    structures(data.subset(np.argsort(sizes)[:1]))  # compiles
    for low, high in pairwise(EDGES):
        rows = np.flatnonzero((sizes > low) & (sizes <= high))
        print(line(data.subset(random.permutation(rows)[: asked.each]), low, high), flush=True)


def line(some: CloudSet, low: int, high: int) -> str:
    """A row of the table."""
    start = time.process_time()
    found = structures(some)
    seconds = time.process_time() - start
    again = structures(turned(some))
    solved = [believed for _, believed in map(told, found)]
    right = [
        yes and formula(atoms) == Composition(group).reduced_formula
        for yes, atoms, group in zip(solved, found, some.groups.tolist(), strict=True)
    ]
    changed = sum(told(one) != told(other) for one, other in zip(found, again, strict=True))
    return (
        f"| {low + 1}–{high} | {len(some)} | {len(some) - found.count(None)} | {sum(solved)} | "
        f"{sum(right)} | {seconds / max(len(some), 1):.3f} | {changed} |"
    )


def turned(some: CloudSet) -> CloudSet:
    """Each crystal turned at random, and mirrored."""
    turns = -random_rotations(len(some), torch.Generator().manual_seed(0))
    return replace(some, q_P3=torch.einsum("pij,pj->pi", turns[some.crystal_P], some.q_P3))


def formula(atoms: Atoms | None) -> str:
    """Of the atoms found, reduced."""
    if atoms is None:
        return ""
    numbers, counts = np.unique(atoms.number_A.astype(int), return_counts=True)
    pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
    return Composition({Element.from_Z(z): n for z, n in pairs}).reduced_formula


def told(atoms: Atoms | None) -> tuple[str, bool]:
    """What must not change: the formula, and whether it is believed."""
    return formula(atoms), atoms is not None and atoms.misfit < SOLVED


if __name__ == "__main__":
    main()
