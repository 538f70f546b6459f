"""What a long-lived worker does: train for some trials, or test a trained model for others.

It keeps what it has computed of the clouds, because the trials of an arm follow each other: the
perturbed clouds serve all models and tasks, what a model sees of them all tasks with the same
training crystals, and all seeds where the arm draws nothing.
"""

import hashlib
import time
import traceback
import warnings
from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ablation.perturbations import perturbed
from ablation.plan import Fit, Trial
from cluster.errors import UserError
from cluster.files import disk_failed
from cluster.gauges import Gauges
from cluster.ray_session import this_node
from training.config import ModelName, TrainingConfig
from training.dataset import CloudSet
from training.ensemble import Prepared, Trained, fit_members, folders, kinds, load_members, prepare
from training.gauges import TrainingGauges
from training.loop import CHECKPOINT, MODEL
from training.metrics import METRICS, score
from training.models.build import is_boosted
from training.peers import Alone
from training.split import Parts


@dataclass(frozen=True, slots=True)
class Shared:
    """A set of clouds as arrays, which Ray hands to all processes of a node without a copy."""

    name: str
    arrays: dict[str, Any]

    @classmethod
    def of(cls, name: str, data: CloudSet) -> "Shared":
        """The arrays of a set."""
        given = {field.name: getattr(data, field.name) for field in fields(data)}
        return cls(
            name, {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        )

    def opened(self) -> CloudSet:
        """The set, on the same memory; it must not be written to."""
        values = dict(self.arrays)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            for name in values:
                if name.rpartition("_")[2] in _TENSORS:
                    values[name] = torch.from_numpy(values[name])
        return CloudSet(**values)


_TENSORS = {"offsets", "P3", "P", "N33"}  # how the fields of a `CloudSet` that are tensors end


@dataclass(frozen=True, slots=True)
class Answer:
    """What a trial gave."""

    trial: Trial
    row: dict[str, Any]  # metrics and seconds, without what earlier trials of the call took
    probability_NC: NDArray[np.float32]  # of the test crystals, by id


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call gave nothing."""

    traceback: str
    hopeless: bool  # a user must mend something: to try again helps nobody
    disk: bool = False  # it is the disk's fault, not the trial's


class Worker:
    """Trains and tests, one call after the other.

    Args:
        out: the grid's folder; trainings are in `fits/ID/` while they are needed.
        threads: of the processor.
        memory: bytes to keep computed things in.
    """

    def __init__(self, out: Path, threads: int, memory: int) -> None:
        torch.set_num_threads(threads)
        self._out = out
        self._kept = _Kept(memory)
        self._opened: dict[str, CloudSet] = {}
        self._parts: dict[str, Parts] = {}
        self._drawless: set[tuple[str, float | None]] = set()
        self._gauges, self._rates = TrainingGauges(), Gauges()

    def node(self) -> str:
        """The id of the node that it is on: it has started."""
        return this_node()

    def attempt(
        self, fit: Fit | None, trials: list[Trial], base: Shared, own: Shared
    ) -> list[Answer] | Failure:
        """`train`, or `test` where there is nothing to train; an exception is an answer, too."""
        try:
            if fit is None:
                return self.test(trials, base, own)
            return self.train(fit, trials, base, own)
        except Exception as error:
            return Failure(traceback.format_exc(), isinstance(error, UserError), disk_failed(error))

    def train(self, fit: Fit, trials: list[Trial], base: Shared, own: Shared) -> list[Answer]:
        """A training, from its checkpoint if there is one, and the trials of its arm.

        Args:
            base: the clouds of the grid's dataset.
            own: those that the arm starts from, often the same.
        """
        start = time.perf_counter()
        data, clouds = self._perturbed(fit.arm, fit.strength, fit.training.seed, base, own)
        parts = self._parts_of(base, fit.training)
        prepared = self._prepared(clouds, data, fit.training, parts)
        trained = self._trained(fit, data, prepared)
        answers = []
        for trial in trials:
            rows = parts.rows["test"]
            seen, here = {kind: each.inputs for kind, each in prepared.items()}, rows
            if trial.mode == "train_only":
                seen = trained.inputs(self._open(base), rows)
                here = torch.arange(len(rows))
            answers.append(_answer(trial, trained, seen, here, parts, start))
            start = time.perf_counter()
        return answers

    def test(self, trials: list[Trial], base: Shared, own: Shared) -> list[Answer]:
        """Trained models of the reference on the perturbed test crystals of one arm and seed."""
        answers, whole, seen = [], self._open(base), {}
        parts = {trial.id: self._parts_of(base, trial.training) for trial in trials}
        tests = [parts[trial.id].rows["test"].numpy() for trial in trials]
        union = np.unique(np.concatenate(tests))
        first, start = trials[0], time.perf_counter()
        clouds = self._adopted(own, whole).subset(union)
        data, _ = self._timed(clouds, first.arm, first.strength, first.training.seed)
        for trial, rows in zip(trials, tests, strict=True):
            trained = load_members(self.folder(trial.fit), trial.training)
            model = trial.training.model
            if model not in seen or not is_boosted(model):  # each network has units of its own
                seen[model] = trained.inputs(data, torch.arange(len(data)))
            here = torch.from_numpy(np.searchsorted(union, rows))
            answers.append(_answer(trial, trained, seen[model], here, parts[trial.id], start))
            start = time.perf_counter()
        return answers

    def folder(self, fit: Fit) -> Path:
        """Where a training has its checkpoint and its model."""
        return self._out / "fits" / fit.id

    def _trained(self, fit: Fit, data: CloudSet, prepared: dict[ModelName, Prepared]) -> Trained:
        """The models of a training; those that are there are not trained again."""
        folder = self.folder(fit)
        members = folders(folder, fit.training)
        if not all((member / MODEL).exists() for member in members):
            identity = {"fit": fit.id, "arm": fit.arm, "strength": fit.strength}
            fit_members(
                folder,
                data,
                fit.training,
                identity=identity,
                seen=prepared,
                resume=True,
                progress=self._gauges.following(fit.training, fit.arm),
            )
        for member in members:
            for name in (CHECKPOINT, "history.csv"):
                (member / name).unlink(missing_ok=True)
        return load_members(folder, fit.training)

    def _perturbed(
        self, arm: str, strength: float | None, seed: int, base: Shared, own: Shared
    ) -> tuple[CloudSet, tuple[Any, ...]]:
        """The clouds of an arm, and their name among what is kept."""
        name = (own.name, arm, strength, None if (arm, strength) in self._drawless else seed)
        if (data := self._kept.get(name)) is None:
            clouds = self._adopted(own, self._open(base))
            data, drawn = self._timed(clouds, arm, strength, seed)
            if not drawn:
                self._drawless.add((arm, strength))
                name = (*name[:3], None)
            self._kept.put(name, data)
        return data, name

    def _timed(
        self, clouds: CloudSet, arm: str, strength: float | None, seed: int
    ) -> tuple[CloudSet, bool]:
        """`perturbed`, and how fast for Prometheus, unless it was done before featurization."""
        start = time.perf_counter()
        data, drawn = perturbed(clouds, arm, strength, seed)
        if data is not clouds:
            rate = len(data) / (time.perf_counter() - start)
            self._rates.set({"structures_per_second": rate}, arm=arm)
        return data, drawn

    def _prepared(
        self, clouds: tuple[Any, ...], data: CloudSet, config: TrainingConfig, parts: Parts
    ) -> dict[ModelName, Prepared]:
        """What each kind of member sees of the clouds."""
        rows, found = parts.rows["train"], {}
        digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        for kind in kinds(config):
            own = () if is_boosted(kind) else (digest, config.init)
            name = (*clouds, kind, *own)
            if (one := self._kept.get(name)) is None:
                alone = config.model_copy(update={"model": kind})
                one = prepare(alone, data, rows, Alone(), self._out / "fits")
                self._kept.put(name, one)
            found[kind] = one
        return found

    def _parts_of(self, base: Shared, config: TrainingConfig) -> Parts:
        name = str(config.model_dump(include=_SPLIT))
        if name not in self._parts:
            self._parts[name] = Parts.of(self._open(base), config)
        return self._parts[name]

    def _open(self, shared: Shared) -> CloudSet:
        if shared.name not in self._opened:
            self._opened[shared.name] = shared.opened()
        return self._opened[shared.name]

    def _adopted(self, own: Shared, base: CloudSet) -> CloudSet:
        """Clouds that an arm starts from, with the groups and labels of the grid's dataset."""
        data = self._open(own)
        if not np.array_equal(data.ids, base.ids):
            raise UserError(
                f"{own.name} has {len(data)} crystals, the grid's dataset {len(base)}, or others",
                remedy="mend the source of the dataset, then remove the folder",
            )
        return replace(
            data, groups=base.groups, crystal_systems=base.crystal_systems, labels=base.labels
        )


# All that decides `Parts`, besides the data.
_SPLIT = {"task", "threshold", "validation_fraction", "test_fraction", "train_fraction", "also"}


def _answer(
    trial: Trial,
    trained: Trained,
    inputs: Any,
    rows: torch.Tensor,
    parts: Parts,
    start: float,
) -> Answer:
    """The trial's row from `rows` of `inputs`, which are its test crystals."""
    probability_MNC = trained.shares(trained.logits_of(inputs, rows))
    probability_NC = probability_MNC.mean(axis=0).astype(np.float32)
    # Of the rounded ones, so that anybody finds these metrics in the predictions.
    target_N = parts.target_N[parts.rows["test"]].numpy()
    scores = score(target_N, probability_NC.astype(np.float64))
    row = {name: float(scores[name][0]) for name in METRICS}
    row |= {"seconds": round(time.perf_counter() - start, 3)}
    return Answer(trial, row, probability_NC)


class _Kept:
    """The things used last that fit into some bytes, and always the very last."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._things: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def get(self, name: tuple[Any, ...]) -> Any:
        if name in self._things:
            self._things.move_to_end(name)
        return self._things.get(name)

    def put(self, name: tuple[Any, ...], thing: Any) -> None:
        self._things[name] = thing
        while len(self._things) > 1 and sum(map(_bytes, self._things.values())) > self._memory:
            self._things.popitem(last=False)


def _bytes(thing: Any) -> int:
    """Of the arrays in it."""
    if is_dataclass(thing):
        return sum(_bytes(getattr(thing, field.name)) for field in fields(thing))
    if isinstance(thing, dict):
        return sum(map(_bytes, thing.values()))
    return int(getattr(thing, "nbytes", 0))
