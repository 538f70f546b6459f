"""Crystal system without a model: count the invariants of a cloud, and show whom that misjudges.

    python -m benchmarks.laue DATASET

A Laue group of centre, rotations and mirrors leaves a certain number of combinations of spherical
harmonics of each degree unchanged (the trivial representation in that of degree ℓ; group theory,
nothing fitted). As many singular values of the cloud's coefficients are above rounding, and the
numbers of degrees 2, 4, 6 together differ from group to group. Needs clouds in a sphere.
"""

import argparse
from pathlib import Path

import numpy as np

from training.dataset import CloudSet, load
from training.models.descriptors import invariants
from training.split import split_of

# Laue group → crystal system, numbers of invariants of degrees 2, 4, 6.
GROUPS = {
    "-1": ("triclinic", 5, 9, 13),
    "2/m": ("monoclinic", 3, 5, 7),
    "mmm": ("orthorhombic", 2, 3, 4),
    "4/m": ("tetragonal", 1, 3, 3),
    "4/mmm": ("tetragonal", 1, 2, 2),
    "-3": ("trigonal", 1, 3, 5),
    "-3m": ("trigonal", 1, 2, 3),
    "6/m": ("hexagonal", 1, 1, 3),
    "6/mmm": ("hexagonal", 1, 1, 2),
    "m-3": ("cubic", 0, 1, 2),
    "m-3m": ("cubic", 0, 1, 1),
}
_FLOOR = -4.5  # log10; rounding of float32 stands at −5


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    data = load(parser.parse_args().dataset)
    laue = groups_of(data)
    systems = np.array([GROUPS[name][0] for name in laue])
    right = systems == data.crystal_systems
    test = split_of(data.groups.tolist(), 0.1, 0.1) == "test"
    for title, part in (("test", test), ("all", np.ones_like(test))):
        recalls = [right[part & (data.crystal_systems == s)].mean() for s in np.unique(systems)]
        print(
            f"{title}: {part.sum()} crystals, {(~right[part]).sum()} misjudged, accuracy "
            f"{right[part].mean():.4f}, balanced accuracy {np.mean(recalls):.4f}"
        )
    print("\n| id | formula | split | system | seen as | Laue group |\n|---|---|---|---|---|---|")
    for row in np.flatnonzero(~right):
        print(
            f"| {data.ids[row]} | {data.groups[row]} | {'test' if test[row] else 'other'} | "
            f"{data.crystal_systems[row]} | {systems[row]} | {laue[row]} |"
        )


def groups_of(data: CloudSet) -> list[str]:
    """The Laue group of each crystal whose numbers of invariants are nearest."""
    values_NS = invariants(data)[:, -27:]
    blocks = (slice(0, 5), slice(5, 14), slice(14, 27))
    found = np.stack([(values_NS[:, block] > _FLOOR).sum(axis=1) for block in blocks], axis=1)
    names = list(GROUPS)
    table = np.array([GROUPS[name][1:] for name in names], dtype=np.int64)
    distance = np.abs(found[:, None] - table).sum(axis=2)
    return [names[k] for k in distance.argmin(axis=1)]


if __name__ == "__main__":
    main()
