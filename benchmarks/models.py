"""All models on all questions of a dataset, side by side: AUROC, parameters, seconds.

    python -m benchmarks.models DATASET [--tasks …] [--models …] [--seeds 3]

Prints Markdown. Each cell is the mean over seeds of the test AUROC (balanced accuracy for crystal
system), the AUROC of the seeds' mean probability with a 95 % interval over groups of crystals, and
the seconds of all seeds together, description of the clouds included; of networks, clouds that
train a second and the part of a step that waits for data (medians over epochs); clouds answered a
second.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from cluster.provenance import provenance
from featurization.manifest import read_manifest
from training.config import BoostedName, NetworkName, TrainingConfig
from training.dataset import CloudSet, load
from training.ensemble import fit_members, load_members
from training.metrics import evaluate, score
from training.models.boosted import Boosted
from training.progress import Speed
from training.split import Parts
from training.tasks import TASKS

# What each network was measured with; trees choose their number themselves.
SETTINGS: dict[str, dict[str, float]] = {
    "pointnet": {"epochs": 10, "batch_size": 32},
    "harmonic": {"epochs": 15, "batch_size": 128},
    "blend": {"epochs": 15, "batch_size": 128},
    "attention": {"epochs": 16, "batch_size": 64, "learning_rate": 1.5e-3},
    "powder_cnn": {"epochs": 16, "batch_size": 64},
}
COLUMNS = (
    "task", "model", "mean of seeds", "seeds", "ensemble", "95 %", "parameters", "s",
    "trained/s", "data wait", "answered/s",
)  # fmt: skip


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[n for n, t in TASKS.items() if not t.edges])
    models = [*get_args(NetworkName), *get_args(BoostedName), "blend"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    data = load(asked.dataset)
    made = provenance()
    print(
        f"{len(data)} crystals, {read_manifest(asked.dataset)['config']['selection']}, "
        f"{asked.seeds} seeds, {torch.get_num_threads()} threads; {made['created'][:10]}, "
        f"commit {str(made['commit'])[:12]}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for task in asked.tasks:
        for model in asked.models:
            settings = SETTINGS.get(model, {})
            config = TrainingConfig(task=task, model=model, members=asked.seeds, **settings)
            print(row(data, config), flush=True)


def row(data: CloudSet, config: TrainingConfig) -> str:
    """A line of the table."""
    parts = Parts.of(data, config)
    rows = parts.rows["test"]
    metric = "auroc" if config.question.threshold is not None else "balanced_accuracy"
    with tempfile.TemporaryDirectory() as folder:
        speeds: list[Speed] = []
        start = time.perf_counter()
        fit_members(
            Path(folder), data, config, identity={},
            progress=lambda at: speeds.extend([at.speed] if at.speed else []),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        trained = load_members(Path(folder), config)
    start = time.perf_counter()
    members = trained.probabilities(data, rows)
    answering = time.perf_counter() - start
    target = parts.target_N[rows].numpy()
    # A seed of a blend is one model of each kind.
    kinds = len(members) // config.members
    seeds = members.reshape(config.members, kinds, *members.shape[1:]).mean(axis=1)
    each = [float(score(target, seed)[metric][0]) for seed in seeds]
    groups = data.groups[rows.numpy()].tolist()
    whole = evaluate(target, members.mean(axis=0), groups)[metric]
    size = " + ".join(
        f"{model.rounds} trees"
        if isinstance(model, Boosted)
        else f"{sum(p.numel() for p in model.parameters()):,}"
        for model in trained.members[:kinds]
    )
    fast, waits = "", ""
    if speeds:
        fast = f"{np.median([each.clouds_per_second for each in speeds]):.0f}"
        waits = f"{np.median([each.data_wait for each in speeds]):.1%}"
    return (
        f"| {config.task} | {config.model} | {np.mean(each):.4f} | "
        f"{' '.join(f'{e:.4f}' for e in each)} | {whole.value:.4f} | "
        f"{whole.low:.4f}–{whole.high:.4f} | {size} | {seconds:.0f} | "
        f"{fast} | {waits} | {len(rows) / answering:.0f} |"
    )


if __name__ == "__main__":
    main()
