"""What a model is of: said in each of its files and in config.json, compared wherever it is loaded.

| key             | what                                                                        |
|-----------------|-----------------------------------------------------------------------------|
| `content_hash`  | of the dataset                                                              |
| `featurization` | all settings that decide a cloud                                            |
| `split`         | SHA-256 over which crystal is in training, validation and test              |
| `questions`     | of each its label, classes, threshold, unit and bins, defaults written out  |
| `features`      | version of what models see of clouds                                        |
| `init`          | SHA-256 of the weights to begin with, if any                                |
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cluster.config import build_config
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from training.config import FEATURES, TrainingConfig
from training.split import Parts

# Settings that decide the clouds that there are, none of what is in one.
_NOT_DECIDING = {
    "max_points",
    "max_atoms",
    "max_seconds",
    "occupancy",
    "id_prop_label",
    "shard_structures",
    "shard_mib",
    "absences",
}
_NAMES = {"name", "title"}  # of a task: words, which decide nothing


def identity_of(
    manifest: Mapping[str, Any], ids_N: NDArray[Any], parts: Parts, config: TrainingConfig
) -> dict[str, Any]:
    """The table above, without `init`, as plain JSON values.

    Args:
        manifest: of the dataset whose crystals are `ids_N`, split into `parts`.
    """
    return {
        "content_hash": manifest["content_hash"],
        "featurization": deciding(FeaturizationConfig(**manifest["config"])),
        "split": parts.digest(ids_N),
        **meaning(config),
    }


def meaning(config: TrainingConfig) -> dict[str, Any]:
    """What this version makes of a configuration: features, and questions with their defaults."""
    questions = {
        task.name: {name: value for name, value in asdict(task).items() if name not in _NAMES}
        for task in config.questions
    }
    plain: dict[str, Any] = json.loads(json.dumps({"features": FEATURES, "questions": questions}))
    return plain


def signature(config: TrainingConfig, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a file of a training says that it is of: the settings that decide, and the identity."""
    return {"config": config.deciding(), "identity": {**identity, **meaning(config)}}


def deciding(config: FeaturizationConfig) -> dict[str, Any]:
    """The settings that would give one crystal two clouds, as plain JSON values."""
    values = config.model_dump(mode="json", exclude=_NOT_DECIDING)
    return values | {"absences": "drop" if config.drops_absences else "keep"}


def differences(one: FeaturizationConfig, other: FeaturizationConfig) -> list[str]:
    """Each setting that would give one crystal two clouds, with both values."""
    ours, theirs = deciding(one), deciding(other)
    return [
        f"{name} is {json.dumps(theirs[name])}, the model's is {json.dumps(ours[name])}"
        for name in ours
        if ours[name] != theirs[name]
    ]


def first_difference(there: Any, asked: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name of the first value in which two JSON objects differ, and both; None if in none."""
    if not (isinstance(there, Mapping) and isinstance(asked, Mapping)):
        return None if there == asked else (name, there, asked)
    for key in {**asked, **there}:
        inner = f"{name}.{key}" if name else key
        if found := first_difference(there.get(key), asked.get(key), inner):
            return found
    return None


def featurization_of(run: Path, recorded: Mapping[str, Any]) -> FeaturizationConfig:
    """The settings that a run's crystals were featurized with.

    Args:
        recorded: the content of its config.json.

    Raises:
        UserError: they are not those that its identity names.
    """
    where = f"{run / 'config.json'}"
    config = build_config(FeaturizationConfig, recorded["featurization"], where=where)
    known = recorded["identity"].get("featurization")
    if found := first_difference(known, deciding(config), "featurization"):
        raise UserError(
            f"{where} was changed: {found[0]} = {found[2]!r}, the model was trained on "
            f"{found[1]!r}",
            remedy="put back the config.json of the training, or train again",
        )
    return config


def check_count(run: Path, config: TrainingConfig, models: int) -> None:
    """Refuse to take some members of an ensemble for all: no member says how many there are.

    Args:
        models: how many there are by `config`.
    """
    if (beyond := run / f"member-{models}").exists():
        raise UserError(
            f"{run / 'config.json'} was changed: members = {config.members}, but there is {beyond}",
            remedy="put back the config.json of the training, or train again",
        )
