"""Figures of single tasks and runs: ROC, reliability, training history."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ablation.curves import GRID, mean_roc, reliability
from ablation.figures import BLACK, GREY, WIDTH, panels, wrapped
from ablation.report_study import Study
from ablation.trials import Condition
from training.figures import BLUE, COLOURS, DASHES, VERMILION
from training.metrics import ECE_BINS, ece_bins

SHOWN_ROC = 6
"""Conditions beside the reference that the ROC figure draws: those of the largest effects."""


def roc_conditions(study: Study) -> list[Condition]:
    """The reference, and what changes the primary metric most."""
    ranked = sorted(study.primary_effects(), key=lambda e: -abs(e.difference.value))
    found = [] if study.reference is None else [study.reference]
    return [*found, *(effect.condition for effect in ranked[:SHOWN_ROC])]


def roc_figure(study: Study, run: bool) -> Figure:
    """Mean ROC of each condition, and thin lines for the single seeds of the reference."""
    figure, (axes,) = panels(1, 1, 5.4)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="dotted", linewidth=1, label="chance")
    for place, condition in enumerate(roc_conditions(study)):
        by_seed = study.trials.probabilities[condition]
        curves = [mean_roc(study.trials.labels, by_seed[seed]) for seed in sorted(by_seed)]
        first = condition == study.reference
        colour = BLACK if first else COLOURS[(place - 1) % len(COLOURS)]
        if first and len(curves) > 1:
            for curve in curves:
                axes.plot([0, *GRID], [0, *curve], color=colour, linewidth=0.6, alpha=0.45)
        axes.plot(
            [0, *GRID],
            [0, *np.mean(curves, axis=0)],
            color=colour,
            linewidth=2.2 if first else 1.6,
            linestyle=DASHES[0] if first else DASHES[place % len(DASHES)],
            label="test crystals" if run else wrapped(condition.name, 34),
        )
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def reliability_figure(study: Study) -> Figure:
    """Reliability diagram of the reference, all seeds together, above the count of each bin."""
    assert study.reference is not None
    by_seed = study.trials.probabilities[study.reference]
    curve = reliability(
        np.tile(study.trials.labels, len(by_seed)),
        np.concatenate([by_seed[seed] for seed in sorted(by_seed)]),
        repeats=len(by_seed),
    )
    figure = Figure(figsize=(WIDTH, 4.6))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=GREY, linestyle="dotted", linewidth=1)
    errors = [curve.observed - curve.low, curve.high - curve.observed]
    top.errorbar(
        curve.stated, curve.observed, yerr=errors, color=BLUE, marker="o", markersize=5, capsize=2
    )
    centres = (ece_bins(curve.stated) + 0.5) / ECE_BINS
    bottom.bar(centres, curve.count, width=0.9 / ECE_BINS, color=BLUE, alpha=0.6)
    binary = len(study.classes) == 2
    name = wrapped(study.classes[1], 30)
    top.set(ylabel=f"share that is {name}" if binary else "share that is right", ylim=(-0.02, 1.02))
    stated = f"probability of {name}" if binary else "probability of the top class"
    bottom.set(xlabel=stated, ylabel="count", xlim=(-0.01, 1.01))
    return figure


def history_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Losses above, validation AUROC below, against the epoch."""
    figure = Figure(figsize=(WIDTH, 4.6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    epochs = [row.get("epoch", math.nan) for row in history]
    for column, name, colour, dash, axes in (
        ("train_loss", "training loss", BLACK, "solid", top),
        ("validation_loss", "validation loss", VERMILION, "dashed", top),
        ("validation_auroc", "validation AUROC", BLUE, "solid", bottom),
    ):
        values = [row.get(column, math.nan) for row in history]
        axes.plot(epochs, values, color=colour, linestyle=dash, label=name)
    top.set_ylabel("loss")
    bottom.set(ylabel="validation AUROC", xlabel="epoch")
    top.legend()
    return figure
