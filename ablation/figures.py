"""How the report's flat figures look, and how they become SVG and PNG: the same bytes each time.

Colours are those of `training.figures`, and matplotlib's RdBu for signed effects, whose numbers
stand in their cells; marks differ in shape, too. Names are drawn letter by letter, never as TeX,
and letters are outlines, so that a figure looks alike on every machine.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg", force=False)

BLACK, GREY = "#000000", "#8a8f98"
WIDTH = 6.2  # inches
_STYLE: Any = {
    "text.parse_math": False,
    "svg.hashsalt": "crystal-genome",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # matplotlib carries it
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b616b",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.dpi": 200,  # of the layout, too: hinted letters have other widths at another
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as files hold it."""

    svg: bytes
    png: bytes
    caption: str


def draw(make: Callable[[], Figure], caption: str) -> Drawing:
    """Make a figure in the report's style and save it."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = make()
        svg, png = io.BytesIO(), io.BytesIO()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for both files
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", metadata={"Software": None})
    return Drawing(svg.getvalue(), png.getvalue(), caption)


def panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of the report's width with rows × columns axes, row by row."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def row_height(names: Sequence[str], size: float) -> float:
    """Inches a row of a figure whose rows have these names, in letters of `size` points.

    So many that no name touches the next, whichever of them has the most lines.
    """
    lines = 1 + max(name.count("\n") for name in names)
    return max(0.26, (1.2 * lines + 0.4) * size / 72)


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` characters; breaks after `_` too, but not in brackets."""
    # textwrap breaks at spaces and hyphens only, so "_" passes through it as a space.
    lines = textwrap.wrap(re.sub(r"_(?![^(]*\))", "_ ", name), width) or [name]
    return "\n".join(line.replace("_ ", "_") for line in lines)
