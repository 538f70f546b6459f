"""Figures of effects: forest, dose–response, heat map, contrast, lost crystals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ablation.contrast import signed
from ablation.figures import BLACK, GREY, WIDTH, panels, row_height, wrapped
from ablation.report_study import Effect, Row, Study
from ablation.significance import MARGIN
from training.figures import BLUE, COLOURS, DASHES, VERMILION

SHOWN_FOREST = 45
"""Conditions that a forest plot holds; of more, those of the largest effects are drawn."""
# Verdict → colour, mark, and whether it is decided: the mark is filled, the cell in full colour.
_LOOK = {
    "effect": (BLUE, "s", True),
    "small effect": (BLUE, "D", True),
    "no effect": (VERMILION, "o", True),
    "undecided": (GREY, "o", False),
    "one seed": (GREY, "^", False),
}
_SIGNS = {"effect": "", "small effect": "", "no effect": " ≈", "undecided": " ?", "one seed": " ¹"}

_PALE = 0.2


def _verdict(effect: Effect) -> str:
    return effect.verdict or "undecided"


def forest(effects: Sequence[Effect], title: str) -> Figure:
    """Change of the primary metric against the reference, one row a condition, 95 % intervals."""
    shown = set(map(id, sorted(effects, key=lambda e: -abs(e.difference.value))[:SHOWN_FOREST]))
    rows = [effect for effect in effects if id(effect) in shown]
    names = [wrapped(effect.condition.name, 30) for effect in rows]
    figure, (axes,) = panels(1, 1, 1.2 + row_height(names, 9) * len(rows))
    axes.axvspan(-MARGIN, MARGIN, color="#f0e442", alpha=0.25, linewidth=0)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    used: dict[str, None] = {}
    for place, effect in enumerate(rows):
        colour, mark, filled = _LOOK[_verdict(effect)]
        first = effect.verdict not in used
        used[effect.verdict] = None
        d = effect.difference
        axes.plot([d.low, d.high], [place, place], color=colour, linewidth=1.6)
        axes.plot(
            [d.value],
            [place],
            linestyle="none",
            marker=mark,
            color=colour,
            markerfacecolor=colour if filled else "white",
            label=effect.verdict if first else None,
        )
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"change of {title} against the untouched input")
    figure.legend(loc="outside upper right", ncols=len(used), fontsize=8)
    return figure


def doses(study: Study) -> dict[tuple[str, str], dict[str, list[Effect]]]:
    """(arm, mode) → model → effects on the primary metric by strength, of at least two."""
    found: dict[tuple[str, str], dict[str, list[Effect]]] = {}
    for model in dict.fromkeys(e.condition.model for e in study.effects):
        for effect in study.primary_effects(model):
            c = effect.condition
            if c.strength is not None:
                found.setdefault((c.arm, c.mode), {}).setdefault(model, []).append(effect)
    for by_model in found.values():
        for model, effects in by_model.items():
            by_model[model] = sorted(effects, key=lambda e: e.condition.strength or 0.0)
    return {
        key: curves
        for key, by_model in found.items()
        if (curves := {m: e for m, e in by_model.items() if len(e) > 1})
    }


def dose_figure(study: Study, arms: Mapping[str, Row], title: str) -> Figure:
    """Effect against strength, one panel an arm and mode, with the 95 % band."""
    curves = doses(study)
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, axes = panels(rows, columns, 0.5 + 2.0 * rows)
    for panel, ((arm, mode), by_model) in zip(axes, curves.items(), strict=False):
        _dose_panel(panel, by_model)
        what = arms.get(arm, {})
        unit = f" ({what['unit']})" if what.get("unit") else ""
        panel.set_xlabel(f"{what.get('strength') or 'strength'}{unit}", fontsize=8)
        suffix = "" if mode == "retrain" else f" ({mode})"
        panel.set_title(wrapped(arm + suffix, 24), fontsize=8.5)
        panel.tick_params(labelsize=7)
    for panel in axes[len(curves) :]:
        panel.set_visible(False)
    low = min(panel.get_ylim()[0] for panel in axes[: len(curves)])
    high = max(panel.get_ylim()[1] for panel in axes[: len(curves)])
    for panel in axes:
        panel.set_ylim(low, high)
    figure.supylabel(f"change of {title}", fontsize=9)
    if len({model for by_model in curves.values() for model in by_model}) > 1:
        handles = {str(line.get_label()): line for panel in axes for line in panel.get_lines()}
        named = {n: h for n, h in handles.items() if not n.startswith("_")}
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=8
        )
    return figure


def _dose_panel(axes: Axes, by_model: Mapping[str, Sequence[Effect]]) -> None:
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.axhspan(-MARGIN, MARGIN, color="#f0e442", alpha=0.25, linewidth=0)
    ends = []
    for place, (model, effects) in enumerate(by_model.items()):
        x = [e.condition.strength or 0.0 for e in effects]
        ends += [min(x), max(x)]
        colour = COLOURS[place % len(COLOURS)]
        low, high = ([getattr(e.difference, end) for e in effects] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            x,
            [e.difference.value for e in effects],
            color=colour,
            linestyle=DASHES[place % len(DASHES)],
            marker="o",
            markersize=3.5,
            label=wrapped(model, 24),
        )
    if min(ends) > 0 and max(ends) / min(ends) >= 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def heat_cells(studies: Sequence[Study]) -> tuple[list[str], list[str], list[list[Effect | None]]]:
    """Rows (arm and mode), columns (task, and model if there are several), and their effects.

    Of an arm with several strengths the last one in the grid's order stands, which is the strongest
    of its ladder; the figure names it.
    """
    several = len({e.condition.model for s in studies for e in s.effects}) > 1
    cells: dict[tuple[str, str], dict[str, Effect]] = {}
    columns: dict[str, None] = {}
    for study in studies:
        for effect in study.effects:
            if effect.row["metric"] != study.primary:
                continue
            c = effect.condition
            column = f"{study.task} · {c.model}" if several else study.task
            columns[column] = None
            cells.setdefault((c.arm, c.mode), {})[column] = effect
    rows = []
    for by_column in cells.values():
        names = dict.fromkeys(effect.condition.name for effect in by_column.values())
        rows.append(" / ".join(names))
    table = [[by_column.get(column) for column in columns] for by_column in cells.values()]
    return rows, list(columns), table


def heat_map(studies: Sequence[Study]) -> Figure:
    """Effect of each arm on each task; a cell's sign is its verdict, without one it is pale."""
    rows, columns, table = heat_cells(studies)
    values = np.array(
        [[math.nan if e is None else e.difference.value for e in row] for row in table]
    )
    limit = float(np.nanmax(np.abs(values), initial=0.05))
    decided = np.array([[e is not None and _LOOK[_verdict(e)][2] for e in row] for row in table])
    names = [wrapped(name, 34) for name in rows]
    # Where there are more columns than labels find room for beside each other, they stand upright.
    upright = len(columns) > 3
    titles = columns if upright else [wrapped(name, 16) for name in columns]
    above = 0.08 * max(map(len, titles)) if upright else 0.5
    size = max(WIDTH, 3.2 + 0.5 * len(columns)), 0.8 + above + row_height(names, 8) * len(rows)
    figure = Figure(figsize=size)
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    image.set_alpha(np.where(decided, 1.0, _PALE))
    for (row, column), value in np.ndenumerate(values):
        effect = table[row][column]
        if effect is not None and math.isfinite(value):
            ink = "white" if decided[row, column] and abs(value) > 0.6 * limit else "black"
            text = signed(value) + _SIGNS[_verdict(effect)]
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(columns)), titles, rotation=90 if upright else 0)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    figure.colorbar(image, ax=axes, shrink=min(0.6, 3 / size[1]), label="change", pad=0.02)
    return figure


def contrast_figure(rows: Sequence[Row], title: str) -> Figure:
    """Left what each side costs, right their difference, one row a task."""
    figure, (left, right) = panels(1, 2, 1.5 + 0.4 * len(rows))
    places = range(len(rows))
    for name, colour, mark in (("symmetry", BLUE, "o"), ("intensity", VERMILION, "^")):
        left.plot(
            [row[name] for row in rows],
            list(places),
            linestyle="none",
            marker=mark,
            color=colour,
            label=f"without {name}",
        )
    for place, row in enumerate(rows):
        colour = GREY if row["verdict"] == "undecided" else BLACK
        if row["low"] is not None:
            right.plot([row["low"], row["high"]], [place, place], color=colour)
        right.plot([row["difference"]], [place], marker="s", color=colour)
    for axes in (left, right):
        axes.axvline(0, color=BLACK, linewidth=0.8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    left.set_yticks(list(places), [wrapped(row["task"], 20) for row in rows])
    right.yaxis.tick_right()
    right.set_yticks(list(places), [row["verdict"] for row in rows])
    right.spines["right"].set_visible(True)
    right.spines["left"].set_visible(False)
    left.set_xlabel(f"change of {title}")
    right.set_xlabel("symmetry − intensity")
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure


def losses_figure(rows: Sequence[Row]) -> Figure:
    """Share of crystals lost, of all and by crystal system: symmetry against intensities."""
    figure, (axes,) = panels(1, 1, 1.3 + 0.42 * len(rows))
    for shift, side, colour, mark in (
        (-0.14, "symmetry", BLUE, "o"),
        (0.14, "intensity", VERMILION, "^"),
    ):
        known = [(i, row) for i, row in enumerate(rows) if row[f"{side}_lost"] is not None]
        values = np.array([row[f"{side}_lost"] for _, row in known], dtype=float)
        low = np.array([row[f"{side}_lost_low"] for _, row in known], dtype=float)
        high = np.array([row[f"{side}_lost_high"] for _, row in known], dtype=float)
        axes.errorbar(
            values,
            [i + shift for i, _ in known],
            xerr=np.abs([values - low, high - values]) if len(known) else None,
            linestyle="none",
            marker=mark,
            color=colour,
            capsize=2,
            label=f"without {side}",
        )
    chance = [(row["by_chance"], i) for i, row in enumerate(rows) if row["by_chance"] is not None]
    if chance:
        x, y = zip(*chance, strict=True)
        axes.plot(x, y, linestyle="none", marker="|", markersize=14, color=BLACK, label="by chance")
    axes.set_yticks(range(len(rows)), [f"{row['part']} ({row['crystals']})" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=-0.005)
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the test crystals that are lost")
    figure.legend(loc="outside upper right", ncols=3, fontsize=8)
    return figure
