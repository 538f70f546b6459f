"""What a training takes, from a timed part of it on its own dataset; nothing is written."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import memory
from cluster.errors import UserError
from cluster.terminal import duration
from training.config import TrainingConfig
from training.dataset import Clouds, open_clouds
from training.ensemble import kinds, prepare
from training.inputs import Rows
from training.loop import fit
from training.models.boosted import Boosted
from training.models.build import is_boosted
from training.peers import Alone
from training.split import SPLITS, Parts

_SAMPLE = 3000  # crystals that are timed for all
_STEPS = (3, 15)  # a network is timed between these steps
_TREES = (5, 25)  # and trees between these numbers of rounds
WORKING = round(0.7 * 2**30)  # bytes of Python, torch and batches at work, beside the data
_FORWARD = 1 / 3  # of a step's time, for a crystal that is only answered


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a training, and of an answer to the test crystals; bytes."""

    once: float  # clouds, inputs
    training: float
    test: float
    inputs: float  # bytes of what the models see


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a training takes: in words, and in seconds of one process of this machine."""

    rows: dict[str, str]
    alone: float  # s that workers do not share
    shared: float
    memory: int  # bytes of a process


def expect(dataset: Path, config: TrainingConfig) -> Forecast:
    """What `training.train.train` would take on this machine, from one process.

    Raises:
        UserError: no dataset, no usable classes.
    """
    before = memory.resident()
    data = open_clouds(dataset, config.radiation)
    clouds = memory.resident() - before
    parts = Parts.of(data, config)
    timed = timed_training(data, config, parts)
    seconds = timed.once + timed.training + timed.test
    sides = ", ".join(f"{len(rows):,} {side}" for side, rows in parts.rows.items())
    early = ", if no early stop of the trees shortens it" if config.in_one_process else ""
    several = f"; {config.workers} workers share it" if config.workers > 1 else ""
    shared = 0.0 if config.in_one_process else timed.training
    needs = round(clouds + timed.inputs) + WORKING
    return Forecast(
        {
            "crystals": sides,
            "time": f"{duration(seconds)} in one process{early}{several}",
            "memory": f"about {needs / 2**30:.1f} GiB a process",
        },
        seconds - shared,
        shared,
        needs,
    )


def timed_training(data: Clouds, config: TrainingConfig, parts: Parts) -> Timed:
    """Time a few steps, or rounds of trees, of each kind of member and extrapolate."""
    each = [_time(data, config.model_copy(update={"model": k}), parts) for k in kinds(config)]
    return Timed(*(sum(getattr(one, name) for one in each) for name in Timed.__slots__))


def _time(data: Clouds, config: TrainingConfig, parts: Parts) -> Timed:
    some, own = _sample(data, config, parts)
    times = len(data) / len(some)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        seen = prepare(config, some, own.rows["train"], Alone(), Path(name))
        once = times * (time.perf_counter() - start)
        answer = once * len(parts.rows["test"]) / len(data)
        if is_boosted(config.model):
            # Trees want as many rows as there will be, whichever.
            whole = seen.inputs[np.arange(len(data)) % len(some)]
            training = _time_trees(whole, config, parts)
            return Timed(once, config.members * training, answer, whole.nbytes)
        marks: list[float] = []
        short = config.model_copy(
            update={"members": 1, "batch_size": min(config.batch_size, len(own.learned))}
        )
        fit(
            Path(name) / "run",
            some,
            short,
            identity={},
            inputs=seen.inputs,
            units=seen.units,
            progress=lambda at: marks.append(time.perf_counter()),
            stop_after=_STEPS[1],
        )
    size = times * seen.inputs.values_N.nbytes if isinstance(seen.inputs, Rows) else 0.0
    first = min(_STEPS[0], len(marks) - 1)
    step = (marks[-1] - marks[first - 1]) / max(1, len(marks) - first)
    questions = [parts, *parts.others.values()]
    asked, tested = (sum(len(q.rows[side]) for q in questions) for side in SPLITS[1:])
    crystals = config.epochs * (len(parts.learned) + _FORWARD * asked)
    training = config.members * step * crystals / short.batch_size
    test = config.members * step * _FORWARD * tested / short.batch_size
    return Timed(once, training, test + answer, size)


def _sample(data: Clouds, config: TrainingConfig, parts: Parts) -> tuple[Clouds, Parts]:
    """So few crystals that they are soon prepared, from all over those that are used; all of the
    set, if classes miss."""
    every = [rows for own in (parts, *parts.others.values()) for rows in own.rows.values()]
    rows = torch.cat(every).unique().numpy()
    some = data.subset(rows[:: -(-len(rows) // _SAMPLE)])
    try:
        return some, Parts.of(some, config)
    except UserError:
        return data, parts


def _time_trees(description_NF: Any, config: TrainingConfig, parts: Parts) -> float:
    """As if no validation loss stopped the boosting early."""
    rows = parts.rows["train"].numpy(), parts.rows["validation"].numpy()
    marks = []
    for trees in _TREES:
        start = time.perf_counter()
        few = config.model_copy(update={"trees": trees})
        Boosted.fitted(description_NF, parts.target_N.numpy(), *rows, few)
        marks.append(time.perf_counter() - start)
    tree = max(0.0, marks[1] - marks[0]) / (_TREES[1] - _TREES[0])
    return marks[0] + tree * config.trees
