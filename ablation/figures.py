"""The flat figures of the report, as plotly figures that look alike and need no network.

Colours are those of Okabe & Ito (2008), and cividis for intensities (Nuñez et al. 2018): both
keep their order for colour-blind readers. Text in a figure passes through plotly's small HTML
subset, so all names are escaped here.
"""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ablation.curves import GRID, mean_roc, reliability
from ablation.report_study import REFERENCE, Study
from training.metrics import ECE_BINS, Interval

BLACK, BLUE, VERMILION, GREY = "#000000", "#0072B2", "#D55E00", "#8a8f98"
_ARM_COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot")


def roc_figure(study: Study) -> go.Figure:
    """Mean ROC of each arm, and thin lines for the single seeds of the reference."""
    figure = blank_figure(height=560)
    figure.add_trace(_line([0, 1], [0, 1], GREY, name="chance", dash="dot", width=1))
    for arm in study.arms:
        curves = [mean_roc(t.labels, t.probabilities) for t in study.of_arm(arm)]
        if not curves:
            continue
        colour, dash = _style(study.arms, arm)
        if arm == REFERENCE and len(curves) > 1:
            for curve in curves:
                trace = _line([0, *GRID], [0, *curve], colour, dash="solid", width=0.7)
                figure.add_trace(trace.update(opacity=0.45, showlegend=False, hoverinfo="skip"))
        name = "test crystals" if study.kind == "run" else wrapped(arm, 40)
        mean = np.mean(curves, axis=0)
        width = 2.6 if arm == REFERENCE else 1.8
        figure.add_trace(_line([0, *GRID], [0, *mean], colour, name=name, dash=dash, width=width))
    figure.update_xaxes(title_text="false-positive rate", range=[-0.01, 1.01], constrain="domain")
    figure.update_yaxes(title_text="true-positive rate", range=[-0.01, 1.01], constrain="domain")
    figure.update_yaxes(scaleanchor="x", scaleratio=1)
    return figure.update_layout(
        legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0, "xanchor": "left"}
    )


def reliability_figure(study: Study) -> go.Figure:
    """Reliability diagram of the reference, all seeds together, above the count of each bin."""
    trials = study.of_arm(REFERENCE)
    labels = np.concatenate([t.labels for t in trials])
    curve = reliability(
        labels, np.concatenate([t.probabilities for t in trials]), repeats=len(trials)
    )
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.76, 0.24], vertical_spacing=0.05
    )
    _dress(figure, height=520)
    figure.add_trace(_line([0, 1], [0, 1], GREY, name="perfect", dash="dot", width=1), row=1, col=1)
    figure.add_trace(
        go.Scatter(
            x=curve.stated,
            y=curve.observed,
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"color": BLUE, "size": 7},
            error_y={
                "array": curve.high - curve.observed,
                "arrayminus": curve.observed - curve.low,
                "symmetric": False,
                "color": BLUE,
                "thickness": 1,
                "width": 3,
            },
            customdata=curve.count,
            hovertemplate="stated %{x:.3f}<br>observed %{y:.3f}<br>%{customdata} predictions"
            "<extra></extra>",
        ),
        row=1,
        col=1,
    )
    centres = (np.minimum(np.ceil(curve.stated * ECE_BINS), ECE_BINS) - 0.5).clip(0.5) / ECE_BINS
    figure.add_trace(
        go.Bar(
            x=centres,
            y=curve.count,
            width=0.9 / ECE_BINS,
            marker={"color": BLUE, "opacity": 0.55},
            hovertemplate="%{y} predictions<extra></extra>",
        ),
        row=2,
        col=1,
    )
    binary = len(study.classes) == 2
    stated = f"probability of {escaped(study.classes[1])}" if binary else "probability of top class"
    observed = f"share that is {escaped(study.classes[1])}" if binary else "share that is right"
    figure.update_xaxes(range=[-0.01, 1.01])
    figure.update_xaxes(title_text=stated, row=2, col=1)
    figure.update_yaxes(title_text=observed, range=[-0.02, 1.02], row=1, col=1)
    figure.update_yaxes(title_text="count", rangemode="tozero", nticks=4, row=2, col=1)
    return figure.update_layout(showlegend=False)


def forest_figure(study: Study, title: str) -> go.Figure:
    """Change of the primary metric against the reference, one row an arm, 95 % intervals.

    Filled: the interval excludes zero. Open: no effect was resolved.
    """
    rows = [
        (arm, effect.difference)
        for arm in study.arms
        if (effect := study.effects.get(arm, {}).get(study.primary)) is not None
    ]
    figure = blank_figure(height=90 + 44 * len(rows))
    figure.add_vline(x=0, line={"color": BLACK, "width": 1})
    for row, (_, difference) in enumerate(rows):
        seen = resolved(difference)
        colour = BLUE if seen else GREY
        span, value = [difference.low, difference.high], difference.value
        figure.add_trace(_line(span, [row, row], colour, dash="solid", width=2.5))
        marker = {"size": 11, "color": colour if seen else "#ffffff", "symbol": "square"}
        figure.add_trace(
            go.Scatter(
                x=[value],
                y=[row],
                mode="markers",
                marker={**marker, "line": {"color": colour, "width": 2}},
                hovertemplate=f"{value:+.4f} [{span[0]:+.4f}, {span[1]:+.4f}]<extra></extra>",
            )
        )
    ends = [x for _, d in rows for x in (d.low, d.high, d.value, 0.0) if math.isfinite(x)]
    margin = 0.06 * (max(ends) - min(ends)) or 0.01
    figure.update_xaxes(
        title_text=f"change of {title} against “{REFERENCE}”",
        range=[min(ends) - margin, max(ends) + margin],
        nticks=6,
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[wrapped(arm, 18) for arm, _ in rows],
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
    )
    return figure.update_layout(showlegend=False)


def history_figure(history: Sequence[Mapping[str, float]]) -> go.Figure:
    """Losses above, validation AUROC below, against the epoch."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    _dress(figure, height=520)
    epochs = [row.get("epoch", math.nan) for row in history]
    for column, name, colour, dash, panel in (
        ("train_loss", "training loss", BLACK, "solid", 1),
        ("validation_loss", "validation loss", VERMILION, "dash", 1),
        ("validation_auroc", "validation AUROC", BLUE, "solid", 2),
    ):
        values = [row.get(column, math.nan) for row in history]
        trace = _line(epochs, values, colour, name=name, dash=dash, width=2)
        figure.add_trace(trace, row=panel, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_yaxes(title_text="AUROC", row=2, col=1)
    return figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"}
    )


def resolved(difference: Interval) -> bool:
    """Whether the interval excludes zero."""
    return difference.low > 0 or difference.high < 0


def wrapped(name: str, width: int) -> str:
    """Escape a name for plotly, in lines of at most `width` characters; breaks after `_`."""
    # textwrap breaks at spaces and hyphens only, so "_" passes through it as a space.
    lines = textwrap.wrap(name.replace("_", "_ "), width) or [name]
    return "<br>".join(escaped(line.replace("_ ", "_")) for line in lines)


def escaped(name: str) -> str:
    """A name as plotly must be given it, to be shown letter by letter."""
    # %{ would start a template in hover texts.
    return html.escape(name.replace("%{", "% {"), quote=False)


def _style(arms: Sequence[str], arm: str) -> tuple[str, str]:
    if arm == REFERENCE:
        return BLACK, "solid"
    place = [name for name in arms if name != REFERENCE].index(arm)
    return _ARM_COLOURS[place % len(_ARM_COLOURS)], _DASHES[place // len(_ARM_COLOURS) % 4]


def _line(
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    *,
    dash: str,
    width: float,
    name: str = "",
) -> go.Scatter:
    return go.Scatter(
        x=np.asarray(x, dtype=np.float64),
        y=np.asarray(y, dtype=np.float64),
        mode="lines",
        name=name,
        line={"color": colour, "width": width, "dash": dash},
        showlegend=bool(name),
    )


def blank_figure(height: int) -> go.Figure:
    """An empty figure of `height` pixels in the report's style; its width follows the page."""
    return _dress(go.Figure(), height)


def _dress(figure: go.Figure, height: int) -> go.Figure:
    axis = {
        "showline": True,
        "linecolor": "#5b616b",
        "gridcolor": "#e8eaee",
        "ticks": "outside",
        "tickcolor": "#5b616b",
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
        "fixedrange": True,  # a finger that scrolls the page must not zoom
    }
    figure.update_xaxes(axis).update_yaxes(axis)
    return figure.update_layout(
        template="none",
        height=height,
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        margin={"l": 60, "r": 12, "t": 12, "b": 52},
        dragmode=False,
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": "#5b616b", "align": "left"},
    )
