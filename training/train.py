"""One training run from dataset to metrics: the folder that `xtal train` writes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import exclusive, sha256_of, write_text
from cluster.provenance import provenance
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest
from training import checkpoint, domain
from training.config import TrainingConfig, recorded
from training.dataset import Clouds, open_clouds
from training.described import Kept
from training.distributed import fit_on_workers
from training.ensemble import fit_members
from training.evaluate import evaluate_run
from training.identity import differences, featurization_of, identity_of, signature
from training.models import warmstart
from training.progress import Progress, stopping
from training.split import Parts
from training.tasks import TaskName, answerable
from training.tensorboard import log_epochs


def train(
    dataset: str | Path,
    run: str | Path,
    config: TrainingConfig,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] = lambda at: None,
) -> dict[str, Any]:
    """Train and evaluate; returns the content of `metrics.json`.

    `run` gets config.json, checkpoint.safetensors, model.safetensors, history.csv, metrics.json,
    predictions.parquet, domain.safetensors, MODEL_CARD.md and tensorboard/; of an ensemble, each
    member's checkpoint, model and history are in `member-K/`.

    Raises:
        UserError: no dataset, no usable classes, `run` holds another training, another job is at
            work in it, or `config.init` saw what is held out here.
        Stopped: by SIGTERM or SIGUSR1, before the first step or between steps, which are saved.
    """
    dataset, run = Path(dataset), Path(run)
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file", remedy="give the path of a new folder")
    with exclusive(run):
        data, parts, identity = _fit(dataset, run, config, resume, progress)
        domain.write(run, data, parts.learned, parts.rows["validation"], identity)
        answer = evaluate_run(run, dataset, data=data)
        Kept.of(run, identity).discard()
        return answer


def _fit(
    dataset: Path,
    run: Path,
    config: TrainingConfig,
    resume: bool,
    progress: Callable[[Progress], None],
) -> tuple[Clouds, Parts, dict[str, Any]]:
    """Fit all members, here or on workers; clouds, split and identity of the training."""
    with stopping(run, progress) as told:
        data, parts, identity = _begin(dataset, run, config, resume)
        if config.workers > 1:
            # While Ray starts, no signal may break in.
            told(Progress(0, config.members * config.passes, 0, 1))
            fit_on_workers(dataset, run, config, identity=identity, resume=resume, progress=told)
            return data, parts, identity
        with log_epochs(run) as log:

            def both(at: Progress) -> None:
                log(at)
                told(at)

            fit_members(run, data, config, identity=identity, resume=resume, progress=both)
    return data, parts, identity


def _begin(
    dataset: Path, run: Path, config: TrainingConfig, resume: bool
) -> tuple[Clouds, Parts, dict[str, Any]]:
    """Write config.json, or compare what is there; clouds, split and identity of the training."""
    manifest = read_manifest(dataset)
    begun = (run / "config.json").exists()
    if begun and not resume:
        raise UserError(
            f"{run} holds a training already", remedy="add --resume to go on, or give a new folder"
        )
    if run.exists() and any(run.iterdir()) and not begun:
        raise UserError(f"{run} is not empty and holds no training", remedy="give a new folder")
    data = open_clouds(dataset, config.radiation)
    parts = Parts.of(data, config)  # a question that cannot be asked leaves no folder behind
    identity = identity_of(manifest, data.ids, parts, config)
    if config.init is not None:
        init = Path(config.init)
        _check_init(init, manifest)
        warmstart.check_formulas(init, dataset, data, parts)
        identity["init"] = sha256_of(warmstart.weights(init))
    if begun:
        there = recorded(run)
        earlier = build_config(TrainingConfig, there["training"], where=f"{run}/config.json")
        theirs = {"config": earlier.deciding(), "identity": there["identity"]}
        checkpoint.check_signature(run / "config.json", signature(config, identity), theirs)
    else:
        said = {
            "dataset": str(dataset.resolve()),
            "featurization": manifest["config"],
            "training": config.model_dump(),
            "identity": identity,
            "provenance": provenance(),
        }
        write_text(run / "config.json", json.dumps(said, indent=1))
    return data, parts, identity


def questions_of(dataset: Path) -> list[TaskName]:
    """All questions that a dataset has labels for.

    Raises:
        UserError: no finished dataset.
    """
    shards = read_manifest(dataset)["shards"]
    return answerable(sorted({label for row in shards for label in row["labels"]}))


def _check_init(init: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a run to begin with whose crystals were featurized otherwise."""
    theirs = featurization_of(init, recorded(init))
    if differing := differences(theirs, FeaturizationConfig(**manifest["config"])):
        raise UserError(
            f"init = {init}: its crystals were featurized otherwise: {'; '.join(differing)}",
            remedy="featurize the dataset with the settings of that run",
        )
