"""Ways to train, side by side: what each costs in time and gives in AUROC of the test crystals.

    python -m benchmarks.training speed DATASET [--target 0.941] [--seeds 3]
    python -m benchmarks.training ways DATASET [--model harmonic] [--ways plain ema …] [--seeds 3]

`speed`: seconds until `pointnet` and `harmonic` reach an AUROC, one after the other in turns.
`ways`: bf16, torch.compile, gradient accumulation and a moving average of the weights, by patches
of the loop; and where early stopping would have ended each of them.

Prints Markdown. Seconds are those of a training, preparation of inputs and validation included,
what is needed to watch it taken off: of the clock, and of the processors (all threads together),
which say more where other work shares the machine.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.models import SETTINGS
from cluster.provenance import provenance
from featurization.manifest import read_manifest
from training import loop
from training.config import TrainingConfig
from training.dataset import CloudSet, load
from training.metrics import score
from training.split import Parts

Row = dict[str, float]
DECAY = 0.99  # of the moving average, a step
SHARES = 4  # of a batch, one after the other, of gradient accumulation
PATIENCE = (3, 5)


def _clocks() -> NDArray[np.float64]:
    """Seconds of the clock and of this process's processors."""
    return np.array([time.perf_counter(), time.process_time()])


def watched(data: CloudSet, config: TrainingConfig) -> list[Row]:
    """Train; of each epoch the validation and test AUROC, and the seconds since the start."""
    rows: list[Row] = []
    start, lost = _clocks(), np.zeros(2)
    validate = loop._validate

    def watching(model: Any, inputs: Any, parts: Parts, *rest: Any) -> dict[str, float]:
        nonlocal lost
        record = validate(model, inputs, parts, *rest)
        wall, cpu = _clocks() - start - lost
        test = parts.rows["test"]
        logits = torch.from_numpy(loop.predict(model, inputs, test, 512)).double()
        target = parts.target_N[test].numpy()
        tested = float(score(target, logits.softmax(dim=1).numpy())["auroc"][0])
        validated = record["validation_auroc"]
        rows.append({"wall": wall, "cpu": cpu, "validation": validated, "test": tested})
        lost += _clocks() - start - lost - (wall, cpu)
        return record

    with tempfile.TemporaryDirectory() as folder, patch.object(loop, "_validate", watching):
        loop.fit(Path(folder), data, config, identity={})
    return rows


@contextmanager
def bf16() -> Iterator[None]:
    """The network under bfloat16 autocast."""
    new = loop.new_network

    def casting(*given: Any) -> Any:
        network = new(*given)
        network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(network.forward)
        return network

    with patch.object(loop, "new_network", casting):
        yield


@contextmanager
def compiled() -> Iterator[None]:
    """The network compiled for batches of any size."""
    new = loop.new_network

    def compiling(*given: Any) -> Any:
        network = new(*given)
        network.compile(dynamic=True)
        return network

    with patch.object(loop, "new_network", compiling):
        yield


class _Part:
    """A worker that is one of several only by name: its part of the batch, and no one to add to."""

    size = SHARES

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def sum(self, tensors: list[torch.Tensor]) -> None:
        pass


@contextmanager
def accumulated() -> Iterator[None]:
    """The gradient of a batch as the sum of those of four parts."""
    step = loop._step

    class Held:
        """An optimizer that waits."""

        def __init__(self, optimizer: torch.optim.Optimizer, last: bool, first: bool) -> None:
            self.optimizer, self.last, self.first = optimizer, last, first

        def zero_grad(self, **options: Any) -> None:
            if self.first:
                self.optimizer.zero_grad(**options)

        def step(self) -> None:
            if self.last:
                self.optimizer.step()

    def parted(model: Any, optimizer: Any, *rest: Any) -> Any:
        *given, _, watch = rest
        total = 0.0
        for rank in range(SHARES):
            held = Held(optimizer, rank == SHARES - 1, rank == 0)
            total += step(model, held, *given, _Part(rank), watch)
        return total

    with patch.object(loop, "_step", parted):
        yield


@contextmanager
def averaged() -> Iterator[None]:
    """Validation and answer by a moving average of the weights."""
    step, validate = loop._step, loop._validate
    means: dict[int, dict[str, torch.Tensor]] = {}

    def stepping(model: Any, *rest: Any) -> Any:
        loss = step(model, *rest)
        mean = means.setdefault(id(model), {})
        for name, weight in model.named_parameters():
            if name in mean:
                mean[name].lerp_(weight.detach(), 1 - DECAY)
            else:
                mean[name] = weight.detach().clone()
        return loss

    def validating(model: Any, *rest: Any) -> Any:
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        model.load_state_dict(means[id(model)], strict=False)
        record = validate(model, *rest)
        model.load_state_dict(own, strict=False)
        return record

    with patch.object(loop, "_step", stepping), patch.object(loop, "_validate", validating):
        yield


@contextmanager
def plain() -> Iterator[None]:
    """The loop as it is."""
    yield


WAYS: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "bf16": bf16,
    "compile": compiled,
    "accumulate": accumulated,
    "ema": averaged,
}


def best(rows: list[Row]) -> Row:
    """The epoch that validation chooses."""
    return max(rows, key=lambda row: row["validation"])


def stopped(rows: list[Row], patience: int) -> list[Row]:
    """What is left of a training that ends `patience` epochs after its best one so far."""
    for number in range(len(rows)):
        seen = rows[: number + 1]
        if number - seen.index(best(seen)) >= patience:
            return seen
    return rows


def config_of(model: str, task: str, seed: int) -> TrainingConfig:
    return TrainingConfig(task=task, model=model, seed=seed, **SETTINGS[model])


def ways(data: CloudSet, model: str, task: str, names: list[str], seeds: int) -> None:
    """A row a way; in turns, so that what else the machine does meets all of them."""
    runs: dict[str, list[list[Row]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            with WAYS[name]():
                runs[name].append(watched(data, config_of(model, task, seed)))
    print(f"\n## {model}, {task}\n")
    print("| way | test AUROC, mean | seeds | CPU s a training | s |")
    print("|---|---|---|---|---|")
    ends = dict(runs)
    for patience in PATIENCE:
        label = f"plain, ended {patience} epochs after its best"
        ends[label] = [stopped(rows, patience) for rows in runs.get("plain", [])]
    for name, all_rows in ends.items():
        tests = [best(rows)["test"] for rows in all_rows]
        cpu, wall = (np.mean([rows[-1][clock] for rows in all_rows]) for clock in ("cpu", "wall"))
        shown = " ".join(f"{t:.4f}" for t in tests)
        print(f"| {name} | {np.mean(tests):.4f} | {shown} | {cpu:.1f} | {wall:.1f} |")


def speed(data: CloudSet, task: str, target: float, seeds: int, models: list[str]) -> None:
    """Seconds to a test AUROC, and all epochs of each training."""
    print(f"\n## Seconds to a test AUROC of {target}, {task}\n")
    print("| model | seed | CPU s to it | s to it | CPU s in all | last AUROC | AUROC @ CPU s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    reached: dict[str, list[float]] = {model: [] for model in models}
    for seed in range(seeds):
        for model in models:
            rows = watched(data, config_of(model, task, seed))
            hit = next((r for r in rows if r["test"] >= target), {"cpu": np.nan, "wall": np.nan})
            reached[model].append(hit["cpu"])
            course = " ".join(f"{row['test']:.3f}@{row['cpu']:.0f}" for row in rows)
            print(
                f"| {model} | {seed} | {hit['cpu']:.1f} | {hit['wall']:.1f} | "
                f"{rows[-1]['cpu']:.1f} | {rows[-1]['test']:.4f} | {course} |",
                flush=True,
            )
    first = np.array(reached[models[0]])
    for model in models[1:]:
        ratio = np.array(reached[model]) / first
        print(f"\n{model} / {models[0]}, CPU s: " + ", ".join(f"{each:.3f}" for each in ratio))


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "ways"))
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--task", default="bulk_modulus")
    parser.add_argument("--target", type=float, default=0.941)
    parser.add_argument("--models", nargs="+", default=["pointnet", "harmonic"])
    parser.add_argument("--model", default="harmonic")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    data, made = load(asked.dataset), provenance()
    print(
        f"{len(data)} crystals, {read_manifest(asked.dataset)['config']['selection']}, "
        f"{torch.get_num_threads()} threads; {made['created'][:10]}, {made['hardware']}, "
        f"commit {str(made['commit'])[:12]}"
    )
    if asked.what == "speed":
        speed(data, asked.task, asked.target, asked.seeds, asked.models)
    else:
        ways(data, asked.model, asked.task, asked.ways, asked.seeds)


if __name__ == "__main__":
    main()
