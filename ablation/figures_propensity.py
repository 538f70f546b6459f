"""The picture of `xtal propensity`: observed and predicted rates of structure prototypes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ablation.figures import BLACK, GREY, panels, wrapped
from ablation.report_study import Row
from training.figures import COLOURS

SHOWN = 40
"""Prototypes that the picture holds: the first and the last of the ranking."""
_MARKS = ("o", "^", "D", "v", "P", "X")


def propensity_figure(
    rows: Sequence[Row], models: Sequence[str], positive: str, base: float
) -> Figure:
    """One row a prototype: observed rate with its 95 % interval, and what each model says."""
    shown = list(rows) if len(rows) <= SHOWN else [*rows[: SHOWN // 2], *rows[-SHOWN // 2 :]]
    figure, (axes,) = panels(1, 1, 1.3 + 0.27 * len(shown))
    axes.axvline(base, color=GREY, linestyle="dotted", label="all held-out crystals")
    places = np.arange(len(shown))
    observed = np.array([row["observed"] for row in shown])
    low = observed - np.array([row["observed_low"] for row in shown])
    high = np.array([row["observed_high"] for row in shown]) - observed
    axes.errorbar(
        observed,
        places,
        xerr=np.maximum([low, high], 0),
        linestyle="none",
        marker="s",
        markersize=5,
        color=BLACK,
        capsize=2,
        label="observed",
    )
    for place, model in enumerate(models):
        axes.plot(
            [row[model] for row in shown],
            places + 0.18 * (place + 1) / max(1, len(models)),
            linestyle="none",
            marker=_MARKS[place % len(_MARKS)],
            color=COLOURS[place % len(COLOURS)],
            label=wrapped(model, 24),
        )
    names = [f"{row['prototype']}  {row['example']} ({row['members']})" for row in shown]
    axes.set_yticks(places, names, fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"share that is {wrapped(positive, 30)}")
    figure.legend(loc="outside upper right", ncols=3, fontsize=8)
    return figure
