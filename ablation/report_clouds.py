"""A few diffraction clouds of test crystals, read from a dataset folder for the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ablation.report_study import REFERENCE, Study
from training.tasks import TASKS

POINTS = 4000
"""Points (both Friedel mates) beyond which only the strongest of a cloud are shown."""

_SUMMARY = ("sources", "structures", "rejected", "points", "content_hash", "config")


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
    """The clouds, or why there are none; and what the manifest says of the dataset."""

    shown: tuple[ShownCloud, ...]
    problem: str
    summary: Mapping[str, Any]


def read_clouds(study: Study, dataset: Path | None, folder: Path) -> Clouds:
    """Choose and read clouds; a missing or broken dataset is a `problem`, not an error.

    Chosen are test crystals of the reference arm, one class after the other, crystal systems
    that are not shown yet first, then by id; as many as there are classes, at least 4. When no
    test crystal is in the dataset, its first crystals are taken.

    Args:
        study: gives classes, predictions and the dataset's path.
        dataset: overrides the study's path.
        folder: a relative path of the study is tried from here, too.
    """
    if dataset is None and not study.dataset:
        return Clouds((), "The dataset is not named, so no clouds are shown.", {})
    wanted = [dataset] if dataset else [Path(study.dataset), folder / study.dataset]
    root = next((path for path in wanted if (path / "manifest.json").is_file()), None)
    if root is None:
        problem = f"The dataset “{wanted[0].name}” was not found, so no clouds are shown."
        return Clouds((), problem, {})
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        shards = [root / str(shard["file"]) for shard in manifest["shards"]]
        if not all(path.resolve().is_relative_to(root.resolve()) for path in shards):
            raise ValueError("a shard lies outside the dataset")
        known = study.dataset_summary.get("content_hash")
        if known is not None and manifest.get("content_hash", known) != known:
            problem = f"The dataset “{root.name}” has other content than the one of these results."
            return Clouds((), problem, {})
        summary = {name: manifest[name] for name in _SUMMARY if name in manifest}
        return Clouds(_read(study, shards), "", summary)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".replace(str(root), root.name)
        return Clouds((), f"The dataset “{root.name}” could not be read ({reason}).", {})


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
    classes: dict[str, int] = {}
    stated: dict[str, list[float]] = {}
    trials = study.of_arm(REFERENCE) or study.trials
    for trial in trials:
        of_true = trial.probabilities[np.arange(len(trial.labels)), trial.labels]
        for i, label, p in zip(trial.ids, trial.labels, of_true, strict=True):
            classes[i] = int(label)
            stated.setdefault(i, []).append(float(p))
    return classes, {i: float(np.mean(values)) for i, values in stated.items()}


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
