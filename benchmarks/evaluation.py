"""What evaluation says of a model: doubt against error, time to a score, learning curves.

    python -m benchmarks.evaluation doubt DATASET [--models harmonic --tasks …]
    python -m benchmarks.evaluation race DATASET --points POINTS [--tasks …]
    python -m benchmarks.evaluation curve DATASET [--tasks …]

Each prints Markdown. `doubt`: five members; the error rate of test crystals by quintile of an
ensemble's doubt, the AUROC of doubt for being wrong and Spearman's ρ of doubt against the
probability missing to the true class. `race`: seconds of this process, wall and CPU, until the
AUROC on validation is what the paper's own code reached on test crystals (`DEEPKNET`); `pointnet`
sees POINTS, as in the paper, the others DATASET. `curve`: `boosted` with parts of the training
formulas.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xgboost
from scipy.stats import spearmanr

from benchmarks.models import SETTINGS
from cluster.provenance import provenance
from training.config import TrainingConfig
from training.dataset import CloudSet, load
from training.ensemble import Trained, fit_members, load_members
from training.metrics import evaluate, group_weights, percentile_interval, score
from training.models.boosted import Boosted
from training.models.build import DESCRIPTIONS
from training.progress import Progress
from training.split import Parts
from training.uncertainty import combine, doubt_and_error

DEEPKNET = {"bulk_modulus": 0.941, "shear_modulus": 0.873, "band_gap": 0.812, "stability": 0.666}
FRACTIONS = (0.1, 0.2, 0.4, 0.7, 1.0)
_STEP = 10  # trees between two looks at a growing model


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("doubt", "race", "curve"))
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--points", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(DEEPKNET))
    parser.add_argument("--models", nargs="+", default=["harmonic", "boosted"])
    asked = parser.parse_args()
    data, made = load(asked.dataset), provenance()
    print(
        f"{len(data)} crystals, {torch.get_num_threads()} threads; {made['created'][:10]}, commit "
        f"{str(made['commit'])[:12]}\n"
    )
    if asked.what == "race":
        race(data, load(asked.points), asked.tasks, asked.models)
    elif asked.what == "doubt":
        doubt(data, asked.tasks, asked.models)
    else:
        curve(data, asked.tasks)


def head(*columns: str) -> None:
    """The first two lines of a table."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def fitted(
    data: CloudSet, config: TrainingConfig, progress: Callable[[Progress], None] = lambda at: None
) -> Trained:
    """The models of a training that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        fit_members(Path(folder), data, config, identity={}, progress=progress)
        return load_members(Path(folder), config)


def doubt(data: CloudSet, tasks: Sequence[str], models: Sequence[str]) -> None:
    """Error by quintile of doubt."""
    head(
        "task", "model", "doubt", "errors", "by quintile, sure to unsure", "AUROC for an error",
        "Spearman's ρ with 1 − p(true)",
    )  # fmt: skip
    for task in tasks:
        for model in models:
            config = configured(task, model, members=5)
            members = fitted(data, config).probabilities(data, Parts.of(data, config).rows["test"])
            rows = Parts.of(data, config).rows["test"]
            target = Parts.of(data, config).target_N[rows].numpy()
            groups = data.groups[rows.numpy()].tolist()
            whole = combine(members)
            wrong = whole.probabilities_NC.argmax(axis=1) != target
            missing = 1 - whole.probabilities_NC[np.arange(len(target)), target]
            for name, value in (("spread", whole.spread_N), ("entropy", whole.entropy_N)):
                found = doubt_and_error(wrong, value, groups, quantiles=5)
                fifths = " ".join(f"{each.error.value:.3f}" for each in found.quantiles)
                auroc = found.auroc
                print(
                    f"| {task} | {model} | {name} | {wrong.mean():.3f} of {len(wrong)} | {fifths} "
                    f"| {auroc.value:.3f} ({auroc.low:.3f}–{auroc.high:.3f}) "
                    f"| {correlation(value, missing, groups)} |",
                    flush=True,
                )


def correlation(doubt_N: Any, missing_N: Any, groups: Sequence[str]) -> str:
    """Spearman's ρ with a 95 % interval over groups."""
    drawn = [
        spearmanr(np.repeat(doubt_N, w), np.repeat(missing_N, w)).statistic
        for w in group_weights(groups, 500, 0)
    ]
    low, high = percentile_interval(np.array(drawn), groups)
    return f"{spearmanr(doubt_N, missing_N).statistic:.3f} ({low:.3f}–{high:.3f})"


def configured(task: str, model: str, **more: Any) -> TrainingConfig:
    """The settings that each model was measured with before."""
    return TrainingConfig(**({"task": task, "model": model} | SETTINGS.get(model, {}) | more))


def race(data: CloudSet, points: CloudSet, tasks: Sequence[str], models: Sequence[str]) -> None:
    """Seconds to the score of the paper's own code."""
    head(
        "task", "to reach", "model", "reached after", "wall s", "CPU s",
        "all, wall s", "all, CPU s", "CPU s to reach / all of pointnet", "validation", "test",
    )  # fmt: skip
    for task in tasks:
        paper = 0.0
        for model in ("pointnet", *models):
            own = points if model == "pointnet" else data
            config = configured(task, model)
            clock = Clock(DEEPKNET[task])
            trained = fitted(own, config, clock.look)
            total = clock.now()
            if isinstance(trained.members[0], Boosted):
                grown(clock, trained.members[0], own, config, total)
            paper = paper or total[1]
            parts = Parts.of(own, config)
            best, test = (
                float(score(parts.target_N[rows].numpy(), p)["auroc"][0])
                for rows in (parts.rows["validation"], parts.rows["test"])
                for p in [trained.probabilities(own, rows).mean(axis=0)]
            )
            wall, cpu = clock.reached or (float("nan"), float("nan"))
            spent = f"{wall:.1f} | {cpu:.1f} | {total[0]:.1f} | {total[1]:.1f} | {cpu / paper:.3f}"
            print(
                f"| {task} | {DEEPKNET[task]} | {model} | {clock.after} | {spent} "
                f"| {best:.4f} | {test:.4f} |",
                flush=True,
            )


class Clock:
    """Wall and CPU seconds since it was made, and when a score was reached first."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.reached: tuple[float, float] | None = None
        self.after = "never"
        self._start = time.perf_counter(), time.process_time()

    def now(self) -> tuple[float, float]:
        """Seconds of wall and of this process's CPU."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]

    def look(self, at: Progress) -> None:
        """As `progress` of a network."""
        reaches = (at.record or {}).get("validation_auroc", 0.0) >= self.target
        if reaches and self.reached is None:
            self.reached, self.after = self.now(), f"epoch {at.epoch + 1} of {at.epochs}"


def grown(
    clock: Clock, model: Boosted, data: CloudSet, config: TrainingConfig, total: tuple[float, float]
) -> None:
    """When trees reached the score: all of the description, and their part of the growing.

    The trees that boosting grew and threw away, at most the patience, count in the total.
    """
    began = Clock(0)
    described = DESCRIPTIONS["boosted"](data)
    before = began.now()
    parts = Parts.of(data, config)
    rows = parts.rows["validation"].numpy()
    booster = xgboost.Booster()
    booster.load_model(bytearray(model.tensors()["trees"].numpy().tobytes()))
    seen, target = xgboost.DMatrix(described[rows]), parts.target_N[rows].numpy()
    every = min(model.rounds + 150, config.trees)
    for trees in range(_STEP, model.rounds + 1, _STEP):
        p = booster.predict(seen, iteration_range=(0, trees))
        if float(score(target, np.stack([1 - p, p], axis=1))["auroc"][0]) >= clock.target:
            wall, cpu = (
                b + max(t - b, 0.0) * trees / every for b, t in zip(before, total, strict=True)
            )
            clock.reached, clock.after = (wall, cpu), f"{trees} of {every} trees"
            return


def curve(data: CloudSet, tasks: Sequence[str]) -> None:
    """Test AUROC of trees by the part of the training formulas."""
    described = DESCRIPTIONS["boosted"](data)
    head("task", "part", "training crystals", "trees", "validation", "test", "95 %")
    for task in tasks:
        for fraction in FRACTIONS:
            config = configured(task, "boosted", train_fraction=fraction)
            parts = Parts.of(data, config)
            train, held, rows = (parts.rows[s].numpy() for s in ("train", "validation", "test"))
            target = parts.target_N.numpy()
            model = Boosted.fitted(described, target, train, held, config)
            known, best = (
                torch.from_numpy(model.logits(described[part])).softmax(dim=1).numpy()
                for part in (rows, held)
            )
            whole = evaluate(target[rows], known, data.groups[rows].tolist())["auroc"]
            print(
                f"| {task} | {fraction:.0%} | {len(train)} | {model.rounds} "
                f"| {float(score(target[held], best)['auroc'][0]):.4f} | {whole.value:.4f} "
                f"| {whole.low:.4f}–{whole.high:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
