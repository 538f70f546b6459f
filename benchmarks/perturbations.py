"""What each arm of an ablation costs: ms for 1,000 crystals.

    python -m benchmarks.perturbations DATASET [--crystals 1000] [--repeats 3]

Prints Markdown: the least time of some repeats at the default strength, and its ratio to the time
that making one batch of all the crystals takes. Arms that need clouds of their own are applied to
those given.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ablation.perturbations import ARMS, perturb
from cluster.provenance import provenance
from featurization.manifest import read_manifest
from training.dataset import load


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--crystals", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    data = load(asked.dataset)
    data = data.subset(np.random.default_rng(0).permutation(len(data))[: asked.crystals])
    made, count = provenance(), len(data)
    selection = read_manifest(asked.dataset)["config"]["selection"]
    rows = torch.arange(count)

    def cost(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(asked.repeats):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        return 1e6 * best / count

    one = cost(lambda: data.batch(rows))
    print(
        f"{count} crystals, {len(data.q_P3):,} stored points, "
        f"{selection}, {torch.get_num_threads()} threads; "
        f"{made['hardware']}; {str(made['created'])[:10]}, commit {str(made['commit'])[:12]}. "
        f"To make one batch of them all: {one:.0f} ms for 1,000 crystals.\n"
    )
    print("| arm | ms for 1,000 crystals | × making the batch |\n|---|---|---|")
    for name in ARMS:
        spent = cost(lambda name=name: perturb(data, name, None, 0))  # type: ignore[misc]
        print(f"| {name} | {spent:.1f} | {spent / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
