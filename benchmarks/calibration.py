"""How often the statistics of an ablation are right: coverage, false alarms, size, power.

    python -m benchmarks.calibration [--simulations 400] [--out page.md]

Simulated grids of one binary task, one reference and one arm, as `ablation.stats` reads them. A
crystal's logit is gain × (±1) + how hard it is (shared within a group, the same for all trials)
+ what an arm makes of it (the same for all seeds) + noise of one training. The regimes differ in
what trainings and arms disagree about:

| regime     | noise of a training on a crystal | gain between trainings | an arm's own view |
|------------|----------------------------------|------------------------|-------------------|
| crystals   | 0.3                              | 0                      | 0                 |
| trainings  | 0.3                              | 0.3                    | 0                 |
| views      | 0.3                              | 0                      | 0.5               |
| all        | 0.3                              | 0.1                    | 0.3               |

`coverage`: share of 95 % intervals that hold the true change, 0. `false`: share of p < 5 % where
there is no change. `size`: share of equivalence tests that say "within the margin" where the true
change is the margin. `power`: share of p < 5 % where the true change is −0.05. All of AUROC.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ablation import significance, stats
from ablation.significance import ALPHA, MARGIN
from ablation.trials import Condition, Trials
from cluster.provenance import commit
from training.metrics import METRICS, score

REGIMES = {"crystals": (0.0, 0.0), "trainings": (0.3, 0.0), "views": (0.0, 0.5), "all": (0.1, 0.3)}
NOISE, GAIN, CRYSTALS, RESAMPLES = 0.3, 1.2, 300, 300
NONE, ARM = Condition("model", "none"), Condition("model", "arm")


def simulated(
    random: np.random.Generator, seeds: int, regime: str, loss: float, crystals: int = CRYSTALS
) -> Trials:
    """One grid; two thirds of the groups hold two crystals. `loss` of the arm's gain."""
    between, view = REGIMES[regime]
    group = np.minimum(np.arange(crystals), np.arange(crystals) % (2 * crystals // 3))
    labels = random.integers(2, size=crystals)
    hard = random.normal(size=crystals) + 0.7 * random.normal(size=crystals)[group]
    probabilities: dict[Condition, dict[int, NDArray[np.float64]]] = {NONE: {}, ARM: {}}
    for condition, own in probabilities.items():
        seen = hard + view * random.normal(size=crystals)
        for seed in range(seeds):
            gain = GAIN - loss * (condition == ARM) + between * random.normal()
            logit = gain * (2 * labels - 1) + seen + NOISE * random.normal(size=crystals)
            p = 1 / (1 + np.exp(-logit))
            own[seed] = np.stack([1 - p, p], axis=1)
    ids = [f"c{i:05d}" for i in range(crystals)]
    return Trials(ids, [f"g{g}" for g in group], labels, probabilities)


def change(regime: str, loss: float) -> float:
    """True change of AUROC, from many crystals and trainings."""
    trials = simulated(np.random.default_rng(0), 40, regime, loss, 4000)
    values = [
        np.mean([score(trials.labels, p)["auroc"][0] for p in trials.probabilities[c].values()])
        for c in (ARM, NONE)
    ]
    return float(values[0] - values[1])


def loss_of(regime: str, wanted: float) -> float:
    """The loss of gain that changes AUROC by `wanted`: secant rule, equal random numbers."""
    zero = change(regime, 0.0)  # what is left of chance in so many crystals
    first = 5 * abs(wanted)
    second = first * wanted / (change(regime, first) - zero)
    return second * wanted / (change(regime, second) - zero)


def measure(
    regime: str, seeds: int, simulations: int, losses: dict[str, float]
) -> dict[str, float]:
    """The four shares of one regime; `losses` of the null, the margin and an effect."""
    random = np.random.default_rng(seeds)
    counts = dict.fromkeys(("coverage", "false", "size", "power"), 0)
    widths = []
    for number in range(simulations):
        for name, loss in losses.items():
            samples = stats.Samples(
                simulated(random, seeds, regime, loss), resamples=RESAMPLES, seed=number
            )
            row = stats.effect_table(samples).to_pylist()[0]
            assert row["metric"] == "auroc"
            if name == "null":
                counts["coverage"] += row["low"] <= 0 <= row["high"]
                counts["false"] += row["p"] < ALPHA
                widths.append(row["high"] - row["low"])
            elif name == "margin":
                counts["size"] += row["p_equivalence"] < ALPHA
            else:
                counts["power"] += row["p"] < ALPHA
    shares = {name: count / simulations for name, count in counts.items()}
    return shares | {"width": float(np.median(widths))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=400)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    # Only what is counted is computed.
    stats.METRICS = {"auroc": METRICS["auroc"]}
    stats.TESTED = significance.TESTED[:1]
    start = time.perf_counter()
    lines = [
        "| regime | seeds | coverage | false | size | power at −0.05 | median width |",
        "|---|---|---|---|---|---|---|",
    ]
    for regime in REGIMES:
        losses = {"margin": loss_of(regime, -MARGIN), "effect": loss_of(regime, -0.05)}
        for seeds in (2, 3, 5):
            found = measure(regime, seeds, asked.simulations, {"null": 0.0} | losses)
            shares = " | ".join(
                f"{100 * found[name]:.1f} %" for name in ("coverage", "false", "size", "power")
            )
            lines.append(f"| {regime} | {seeds} | {shares} | {found['width']:.3f} |")
            print(lines[-1], flush=True)
    page = [
        f"# Calibration of the ablation's statistics, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m benchmarks.calibration --simulations {asked.simulations}`, commit "
        f"{commit()[:7]}, {os.cpu_count()} × {platform.processor() or platform.machine()}, "
        f"{(time.perf_counter() - start) / 60:.0f} min. {CRYSTALS} test crystals, {RESAMPLES} "
        f"resamples, margin {MARGIN:g}; one standard error of a share of 5 % is "
        f"{100 * (0.05 * 0.95 / asked.simulations) ** 0.5:.1f} %.",
        "",
        *lines,
        "",
    ]
    if asked.out:
        asked.out.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
