"""The training loop: exact resumption, one process or several.

Nothing random is carried from step to step: the order of an epoch is drawn from (seed, epoch), the
rotations and the dropped channels of a step from (seed, epoch, step). A checkpoint therefore needs
only the position, and several workers that share a batch draw the same numbers and keep their part.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import Stopped, UserError
from cluster.files import write_text
from cluster.provenance import provenance
from training import checkpoint, objective
from training.config import TrainingConfig
from training.dataset import CloudBatch, Clouds
from training.identity import signature
from training.inputs import prepared
from training.models.build import Inputs, Network, new_network
from training.peers import Alone, Dropout, Peers
from training.progress import Progress, Stopwatch
from training.rotations import posed_rotations
from training.split import Parts

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"


@dataclass
class _Position:
    """All of a training that is neither weights nor optimizer state."""

    epoch: int = 0
    step: int = 0  # in the epoch
    loss_sum: float = 0.0  # over the crystals of this epoch so far
    best_epoch: int = -1
    best: list[float] = field(default_factory=list)  # validation AUROC (not of numbers), −loss
    history: list[dict[str, float]] = field(default_factory=list)


def device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def predict(
    model: Network, inputs: Inputs, rows: Tensor, batch_size: int, peers: Peers | None = None
) -> NDArray[np.float32]:
    """(len(rows), C) logits of some of the crystals that `model.prepare` was given, in order."""
    peers = peers or Alone()
    where = next(model.parameters()).device
    model.eval()
    mine = rows[peers.rank :: peers.size]
    parts = []
    for part in mine.split(batch_size):
        parts.append(model(inputs.batch(part).to(where)).float().cpu())
    logits = torch.cat(parts) if parts else torch.zeros(0, model.classes)
    return peers.gather(logits.numpy())


def fit(
    run: Path,
    data: Clouds,
    config: TrainingConfig,
    *,
    identity: dict[str, Any],
    inputs: Inputs | None = None,
    units: Mapping[str, Tensor] | None = None,
    resume: bool = False,
    peers: Peers | None = None,
    progress: Callable[[Progress], None] = lambda at: None,
    stop_after: int | None = None,
) -> Network | None:
    """Train; write checkpoints, `history.csv` and the best model into `run` (worker 0 only).

    Args:
        identity: what the data is (content hash, arm); a checkpoint of other data is refused.
        inputs: what `training.inputs.prepared` gives for the network, if it is known already.
        units: what the training crystals set in the network, if it is known already.
        resume: go on from the checkpoint in `run` if there is one; the result is bit for bit
            that of a training which was never interrupted.
        progress: called after each step; if it raises `Stopped`, the position is saved first.
        stop_after: leave after this many steps in this call.

    Returns:
        The model of the best validation epoch, or None when stopped early.

    Raises:
        UserError: no usable classes, a checkpoint of another training, or a training that diverges.
        Stopped: by `progress`.
    """
    peers = peers or Alone()
    parts = Parts.of(data, config)
    where = device()
    model = new_network(config, data, parts.rows["train"], units)
    inputs = prepared(model, data, peers, run) if inputs is None else inputs
    model.to(where)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    at, best = _Position(), dict(model.state_dict())
    signed: dict[str, Any] = signature(config, identity)
    path = run / CHECKPOINT
    if resume and path.exists():
        at, best = _restore(path, signed, model, optimizer)
    # Without the time, so that equal trainings give equal files.
    made = {name: value for name, value in provenance().items() if name != "created"}
    signed |= {"provenance": made}
    best = {name: tensor.detach().clone() for name, tensor in best.items()}
    train = parts.learned
    steps = math.ceil(len(train) / config.batch_size)
    taken, saved = 0, time.monotonic()
    while at.epoch < config.epochs:
        watch = Stopwatch()
        order = train[torch.randperm(len(train), generator=_generator(config.seed, at.epoch))]
        while at.step < steps:
            rate = learning_rate(at.epoch * steps + at.step, config.epochs * steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = order[at.step * config.batch_size : (at.step + 1) * config.batch_size]
            random = _generator(config.seed, at.epoch, at.step)
            at.loss_sum += _step(
                model, optimizer, inputs, parts, config, rows, random, peers, watch
            )
            at.step += 1
            taken += 1
            if at.step < steps:
                late = time.monotonic() - saved >= config.checkpoint_seconds
                if peers.rank == 0 and (late or at.step % config.checkpoint_steps == 0):
                    _save(path, at, best, signed, model, optimizer)
                    saved = time.monotonic()
                try:
                    progress(Progress(at.epoch, config.epochs, at.step, steps))
                except Stopped:
                    if peers.rank == 0:
                        _save(path, at, best, signed, model, optimizer)
                    raise
                if taken == stop_after:
                    return None
        record = _validate(model, inputs, parts, config, peers, at, rate)
        standing = objective.standing(record, config)
        if not at.best or standing > at.best:
            at.best, at.best_epoch = standing, at.epoch
            best = {name: t.detach().clone() for name, t in model.state_dict().items()}
        at.history.append(record)
        at.epoch, at.step, at.loss_sum = at.epoch + 1, 0, 0.0
        if peers.rank == 0:
            # In this order: a training that ends with its checkpoint has its whole history.
            write_text(run / "history.csv", _table(at.history))
            _save(path, at, best, signed, model, optimizer)
            saved = time.monotonic()
        progress(Progress(at.epoch - 1, config.epochs, steps, steps, record, watch.speed()))
        if taken == stop_after and at.epoch < config.epochs:
            return None
    model.load_state_dict(best)
    if peers.rank == 0:
        checkpoint.save(run / MODEL, best, signed | {"best_epoch": at.best_epoch})
    return model


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to 0 at the last of `steps`."""
    warmup = max(1, round(config.warmup_fraction * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * fraction))


def _step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    parts: Parts,
    config: TrainingConfig,
    rows_B: Tensor,
    random: torch.Generator,
    peers: Peers,
    watch: Stopwatch,
) -> float:
    """One update; returns the loss summed over the crystals of the whole batch."""
    where = next(model.parameters()).device
    torch.manual_seed(random.initial_seed())  # of dropout, the same for every worker
    model.train()
    optimizer.zero_grad(set_to_none=False)
    watch.start()
    mine = slice(peers.rank, None, peers.size)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.batch, module.share = len(rows_B), mine
    batch = inputs.batch(rows_B[mine])
    if model.rotates:
        assert isinstance(batch, CloudBatch)
        batch = batch.rotated(posed_rotations(config.pose, len(rows_B), random)[mine])
    watch.has_batch()
    logits = model(batch.to(where)).float()
    loss = objective.loss(logits, parts, config, rows_B[mine])
    (loss / len(rows_B)).backward()
    total = loss.detach()
    peers.sum([*(p.grad for p in model.parameters() if p.grad is not None), total])
    optimizer.step()
    answer = float(total)
    watch.stop(len(rows_B))
    return answer


def _validate(
    model: Network,
    inputs: Inputs,
    parts: Parts,
    config: TrainingConfig,
    peers: Peers,
    at: _Position,
    rate: float,
) -> dict[str, float]:
    def answers(rows: Tensor) -> NDArray[np.float32]:
        return predict(model, inputs, rows, config.batch_size, peers)

    scores = objective.validation(answers, parts, config)
    if not np.isfinite(scores["validation_loss"]):
        raise UserError(
            f"training diverged in epoch {at.epoch}: the network's answers are not finite",
            remedy=f"lower learning_rate = {config.learning_rate:g}",
        )
    loss = at.loss_sum / len(parts.learned)
    return {"epoch": at.epoch, "train_loss": loss, **scores, "learning_rate": rate}


def _save(
    path: Path,
    at: _Position,
    best: dict[str, Tensor],
    signature: dict[str, Any],
    model: Network,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = (
        checkpoint.pack("model", model.state_dict())
        | checkpoint.pack("best", best)
        | checkpoint.pack("optimizer", checkpoint.optimizer_tensors(optimizer))
        | {"rng": torch.get_rng_state()}
    )
    checkpoint.save(path, tensors, signature | {"position": vars(at)})


def _restore(
    path: Path, signature: dict[str, Any], model: Network, optimizer: torch.optim.Optimizer
) -> tuple[_Position, dict[str, Tensor]]:
    tensors, state = checkpoint.read(path)
    checkpoint.check_signature(path, signature, state)
    model.load_state_dict(checkpoint.unpack("model", tensors))
    checkpoint.restore_optimizer(optimizer, checkpoint.unpack("optimizer", tensors))
    torch.set_rng_state(tensors["rng"])
    return _Position(**state["position"]), checkpoint.unpack("best", tensors)


def _generator(*words: int) -> torch.Generator:
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def _table(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
