"""A few diffraction clouds of test crystals, read from a dataset folder for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from ablation.catalogue import DatasetPlace
from ablation.report_study import Study
from training.tasks import TASKS

POINTS = 4000
"""Points (both Friedel mates) beyond which only the strongest of a cloud are shown."""


@dataclass(frozen=True, slots=True)
class ShownCloud:
    """One crystal's cloud with both mates of each Friedel pair."""

    id: str
    formula: str
    crystal_system: str
    space_group: int
    hkl: NDArray[np.int16]  # (P, 3)
    q: NDArray[np.float32]  # (P, 3), 1/Å
    intensity: NDArray[np.float32]  # (P,)
    unit: str  # of the intensity
    total: int  # points before the strongest were chosen
    true_class: str | None  # None when it is not a test crystal
    probability: float | None  # of the true class, mean over the seeds of the reference
    label: float | None  # value of the task's property
    label_unit: str


@dataclass(frozen=True, slots=True)
class Clouds:
    """The clouds, or why there are none."""

    shown: tuple[ShownCloud, ...]
    problem: str


def read_clouds(study: Study, place: DatasetPlace) -> Clouds:
    """Choose and read clouds; a missing or broken dataset is a `problem`, not an error.

    Chosen are test crystals of the reference arm, one class after the other, crystal systems
    that are not shown yet first, then by id; as many as there are classes, at least 4. When no
    test crystal is in the dataset, its first crystals are taken.
    """
    if place.problem or place.root is None:
        return Clouds((), f"{place.problem} No clouds are shown.")
    try:
        return Clouds(_read(study, place.shards), "")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".replace(str(place.root), place.root.name)
        return Clouds((), f"The dataset “{place.root.name}” could not be read ({reason}).")


def expand(
    hkl: NDArray[np.int16],
    q: NDArray[np.float32],
    intensity: NDArray[np.float32],
    multiplicity: NDArray[np.uint8],
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
    """Add the Friedel mate −hkl, −q of each point of multiplicity 2, with its intensity."""
    pair = multiplicity == 2
    return (
        np.concatenate([hkl, -hkl[pair]]),
        np.concatenate([q, -q[pair]]),
        np.concatenate([intensity, intensity[pair]]),
    )


def _read(study: Study, shards: Sequence[Path]) -> tuple[ShownCloud, ...]:
    classes, probabilities = _test_crystals(study)
    found: list[tuple[str, str, Path, int]] = []  # id, crystal system, shard, row
    first: list[tuple[str, str, Path, int]] = []
    for path in shards:
        with h5py.File(path, "r", locking=False) as file:
            ids = file["id"].asstr()[:]
            systems = file["symmetry/crystal_system"].asstr()[:]
        entries = [
            (str(i), str(system), path, row)
            for row, (i, system) in enumerate(zip(ids, systems, strict=True))
        ]
        found += [entry for entry in entries if entry[0] in classes]
        first += entries[: max(0, 4 - len(first))]
    chosen = _choose(found, classes, max(4, len(study.classes))) or first
    return tuple(
        _cloud(study, path, row, classes.get(i), probabilities.get(i)) for i, _, path, row in chosen
    )


def _test_crystals(study: Study) -> tuple[dict[str, int], dict[str, float]]:
    """Class of each test crystal, and the mean probability that the reference gave to it."""
    trials = study.trials
    classes = dict(zip(trials.ids, trials.labels.tolist(), strict=True))
    if study.reference is None:
        return classes, {}
    mean_NC = np.mean(list(trials.probabilities[study.reference].values()), axis=0)
    of_true = mean_NC[np.arange(len(trials.labels)), trials.labels]
    return classes, dict(zip(trials.ids, of_true.tolist(), strict=True))


def _choose(
    found: Sequence[tuple[str, str, Path, int]], classes: Mapping[str, int], count: int
) -> list[tuple[str, str, Path, int]]:
    waiting = sorted(found, key=lambda entry: entry[0])
    chosen: list[tuple[str, str, Path, int]] = []
    while waiting and len(chosen) < count:
        systems = [entry[1] for entry in chosen]
        shown = [classes[entry[0]] for entry in chosen]
        best = min(
            waiting,
            key=lambda entry: (shown.count(classes[entry[0]]), systems.count(entry[1]), entry[0]),
        )
        waiting.remove(best)
        chosen.append(best)
    return sorted(chosen, key=lambda entry: (classes[entry[0]], entry[0]))


def _units(data: h5py.Dataset) -> str:
    unit = data.attrs.get("units", "")
    return unit.decode() if isinstance(unit, bytes) else str(unit)


def _label_of(task: str) -> str:
    labels: dict[str, str] = {known.name: known.label for known in TASKS.values()}
    return labels.get(task, task)


def _cloud(
    study: Study, path: Path, row: int, class_index: int | None, probability: float | None
) -> ShownCloud:
    with h5py.File(path, "r", locking=False) as file:
        begin, end = (int(offset) for offset in file["offsets"][row : row + 2])
        part = slice(begin, end)
        hkl, q, intensity = expand(
            file["hkl"][part], file["q"][part], file["intensity"][part], file["multiplicity"][part]
        )
        label = file.get(f"labels/{_label_of(study.task)}")
        value = float("nan") if label is None else float(label[row])
        total = len(intensity)
        if total > POINTS:
            strongest = np.sort(np.argsort(-intensity, kind="stable")[:POINTS])
            hkl, q, intensity = hkl[strongest], q[strongest], intensity[strongest]
        return ShownCloud(
            id=str(file["id"].asstr()[row]),
            formula=str(file["formula"].asstr()[row]),
            crystal_system=str(file["symmetry/crystal_system"].asstr()[row]),
            space_group=int(file["symmetry/number"][row]),
            hkl=hkl,
            q=q,
            intensity=intensity,
            unit=_units(file["intensity"]),
            total=total,
            true_class=None if class_index is None else study.classes[class_index],
            probability=probability,
            label=value if np.isfinite(value) else None,
            label_unit=study.unit if label is None else _units(label) or study.unit,
        )
