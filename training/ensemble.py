"""Train the members of an ensemble; load what a run folder holds.

An ensemble of one lives in the run folder itself, the members of a larger one in `member-K/`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.config import build_config
from cluster.errors import RunFailed, UserError
from cluster.provenance import provenance
from training import checkpoint
from training.config import BLEND, ModelName, TrainingConfig, recorded
from training.dataset import Clouds
from training.described import Kept, descriptions
from training.identity import check_count, featurization_of, signature
from training.inputs import prepared
from training.loop import MODEL, device, fit, predict
from training.models.boosted import Boosted
from training.models.build import (
    Inputs,
    Network,
    empty_network,
    is_boosted,
    new_network,
    units_of,
)
from training.peers import Alone, Peers
from training.portions import blocks
from training.progress import Progress
from training.split import Parts


@dataclass(frozen=True, slots=True)
class Trained:
    """The models of a run."""

    config: TrainingConfig
    states: list[dict[str, Any]]  # of each member: config, identity, provenance, best_epoch
    members: list[Network | Boosted]

    def logits(
        self, data: Clouds, rows: Tensor | None = None, kept: Kept | None = None
    ) -> NDArray[np.float64]:
        """(members, n, C) logits of all questions of the crystals `rows`, by default of all.

        What trees see is read where it is kept.
        """
        parts = []
        for block in blocks(data, torch.arange(len(data)) if rows is None else rows):
            inputs = self.inputs(data, block, kept)
            parts.append(self.logits_of(inputs, torch.arange(len(block))))
        return np.concatenate(parts, axis=1)

    def inputs(self, data: Clouds, rows: Tensor, kept: Kept | None = None) -> dict[ModelName, Any]:
        """Kind of member → what it sees of the crystals `rows`, for `logits_of`."""
        return {
            kind: descriptions(kind, data, rows, kept)
            if isinstance(each, Boosted)
            else each.prepare(data.subset(rows.numpy()))
            for kind, each in zip(kinds(self.config), self.members, strict=False)
        }

    def logits_of(self, inputs: Mapping[ModelName, Any], rows: Tensor) -> NDArray[np.float64]:
        """(members, n, C) logits of some of the crystals that `inputs` is of."""
        each_kind = zip(cycle(kinds(self.config)), self.members, strict=False)
        return np.stack(
            [_logits(each, inputs[kind], rows, self.config) for kind, each in each_kind]
        )

    def probabilities(
        self, data: Clouds, rows: Tensor | None = None, task: str | None = None
    ) -> NDArray[np.float64]:
        """(members, n, C) of one question, by default the first.

        The ensemble's answer is the mean over its members.

        Raises:
            RunFailed: an answer is not finite.
        """
        return finite(self.shares(self.logits(data, rows), task))

    def shares(
        self, logits_MNC: NDArray[np.float64], task: str | None = None
    ) -> NDArray[np.float64]:
        """Logits of all questions → (members, n, C) probabilities of one, by default the first."""
        own = logits_MNC[:, :, self.config.columns(task or self.config.task)]
        return torch.from_numpy(own).softmax(dim=-1).numpy()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a model sees of a set of clouds: the same for all trainings on the same crystals."""

    inputs: Any  # (N, F) of trees, else what `training.inputs.prepared` gave
    units: dict[str, Tensor]  # that a network has from its training crystals


def prepare(
    config: TrainingConfig,
    data: Clouds,
    train_rows: Tensor,
    peers: Peers,
    folder: Path,
    kept: Kept | None = None,
) -> Prepared:
    """All of a training that depends on the clouds, but neither on a seed nor on labels.

    Args:
        config: of one kind of model, not of a blend.
        folder: where inputs are kept that do not fit into memory.
        kept: where blocks of what trees see are kept.
    """
    if is_boosted(config.model):
        every = torch.arange(len(data))
        return Prepared(descriptions(config.model, data, every, kept), {})
    network = new_network(config, data, train_rows)
    return Prepared(prepared(network, data, peers, folder), units_of(network))


def finite(answer_MNC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Answers of the members, as they are.

    Raises:
        RunFailed: some are not finite.
    """
    if broken := int((~np.isfinite(answer_MNC).all(axis=(0, 2))).sum()):
        raise RunFailed(
            f"the model's answers to {broken:,} of {answer_MNC.shape[1]:,} crystals are not "
            "finite numbers",
            remedy="see whether the dataset is whole with xtal verify, then train again with a "
            "lower learning_rate",
        )
    return answer_MNC


def fit_members(
    run: Path,
    data: Clouds,
    config: TrainingConfig,
    *,
    identity: dict[str, Any],
    seen: Mapping[ModelName, Prepared] | None = None,
    resume: bool = False,
    peers: Peers | None = None,
    progress: Callable[[Progress], None] = lambda at: None,
) -> None:
    """Train all members into `run`; what trees see of the clouds is left for the evaluation.

    Args:
        seen: what `prepare` gives for each kind of member, if it is known; else computed once.

    Raises:
        UserError: as `training.loop.fit`.
    """
    peers = peers or Alone()
    parts = Parts.of(data, config)
    known, passed = dict(seen or {}), 0
    for number, folder in enumerate(folders(run, config)):
        own = _own(config, number)
        kind = own.model

        def shifted(at: Progress, passed: int = passed) -> None:
            progress(replace(at, epoch=at.epoch + passed, epochs=config.members * config.passes))

        grown = resume and is_boosted(kind) and _is_grown(folder, own, identity)
        if kind not in known and not grown:
            train, kept = parts.rows["train"], Kept.of(run, identity)
            known[kind] = prepare(own, data, train, peers, run, kept)
        if is_boosted(kind):
            if not grown:
                _boost(folder, known[kind].inputs, parts, own, identity)
            shifted(Progress(0, 1, 1, 1))
        else:
            fit(
                folder,
                data,
                own,
                identity=identity,
                inputs=known[kind].inputs,
                units=known[kind].units,
                resume=resume,
                peers=peers,
                progress=shifted,
            )
        passed += own.passes


def load_run(run: Path) -> tuple[Trained, dict[str, Any]]:
    """The models of a training run and the content of its config.json.

    Raises:
        UserError: no training run, a config.json that is not that of the models, or as
            `load_members`.
    """
    said = recorded(run)
    config = build_config(TrainingConfig, said["training"], where=str(run / "config.json"))
    featurization_of(run, said)
    check_count(run, config, len(folders(run, config)))
    return load_members(run, config, said["identity"]), said


def load_members(
    run: Path, config: TrainingConfig, identity: Mapping[str, Any] | None = None
) -> Trained:
    """The models in a run folder, each compared with what it should be.

    Args:
        identity: that the models must have; None: whichever dataset they are of.

    Raises:
        UserError: a member is missing or damaged, or was trained with other settings, for other
            questions or on features of another version.
    """
    members, states = [], []
    for number, folder in enumerate(folders(run, config)):
        if not (folder / MODEL).exists():
            raise UserError(
                f"the training in {run} has not finished",
                remedy="finish it with xtal train --resume",
            )
        own = _own(config, number)
        tensors, state = checkpoint.read_model(folder / MODEL, own, identity)
        try:
            members.append(_member(own, tensors))
        except Exception as error:  # PyTorch and XGBoost raise many kinds
            raise UserError(
                f"{folder / MODEL} does not fit its model: {type(error).__name__}: "
                f"{error}".splitlines()[0],
                remedy="train again, or use the version of xtal that trained it",
            ) from error
        states.append(state)
    return Trained(config, states, members)


def _own(config: TrainingConfig, number: int) -> TrainingConfig:
    """The settings of one member alone."""
    several = kinds(config)
    kind, seed = several[number % len(several)], config.seed + number // len(several)
    return config.model_copy(update={"model": kind, "seed": seed, "members": 1})


def _member(config: TrainingConfig, tensors: dict[str, Tensor]) -> Network | Boosted:
    if is_boosted(config.model):
        return Boosted.from_tensors(len(config.question.classes), tensors)
    network = empty_network(config)
    network.load_state_dict(tensors)
    return network.to(device()).eval()


def _logits(
    member: Network | Boosted, inputs: Any, rows: Tensor, config: TrainingConfig
) -> NDArray[np.float64]:
    if isinstance(member, Boosted):
        return member.logits(inputs[rows.numpy()])
    given: Inputs = inputs
    return predict(member, given, rows, config.batch_size).astype(np.float64)


def _is_grown(run: Path, config: TrainingConfig, identity: dict[str, Any]) -> bool:
    """Whether there is a model of this training, and no other."""
    if not (run / MODEL).exists():
        return False
    signed = signature(config, identity)
    checkpoint.check_signature(run / MODEL, signed, checkpoint.read(run / MODEL)[1])
    return True


def _boost(
    run: Path,
    description_NF: NDArray[np.float32],
    parts: Parts,
    config: TrainingConfig,
    identity: dict[str, Any],
) -> None:
    signed = signature(config, identity)
    rows = (parts.rows["train"].numpy(), parts.rows["validation"].numpy())
    model = Boosted.fitted(description_NF, parts.target_N.numpy(), *rows, config)
    made = {name: value for name, value in provenance().items() if name != "created"}
    state = signed | {"provenance": made, "best_epoch": model.rounds}
    checkpoint.save(run / MODEL, model.tensors(), state)


def folders(run: Path, config: TrainingConfig) -> list[Path]:
    """Where the model of each member lies."""
    count = config.members * len(kinds(config))
    return [run] if count == 1 else [run / f"member-{number}" for number in range(count)]


def kinds(config: TrainingConfig) -> tuple[ModelName, ...]:
    """Models of which each member of an ensemble has one."""
    return BLEND if config.model == "blend" else (config.model,)
