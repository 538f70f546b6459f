"""The picture of one crystal: its cloud in 3D and the powder pattern that the cloud implies."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from cluster.errors import UserError
from cluster.files import replacing
from featurization.inspection import space_group
from featurization.reflections import Diffraction, powder, reflections

matplotlib.use("Agg", force=False)

# Decades of intensity below the strongest reflection that colour and size tell apart.
_DECADES = 3
_LABELLED = 8
_BINS = 4001
_WIDTH = 0.004  # 1/Å
_INK = "#1b2a41"
# Okabe and Ito's vermilion, which the colour blind tell from blue and yellow.
_ACCENT = "#d55e00"
# Strong is dark, on white paper, where the brightest yellows of cividis would not be seen.
_COLOURS = ListedColormap(matplotlib.colormaps["cividis_r"](np.linspace(0.2, 1.0, 256)))
_SMALLEST = 6.0  # area of a marker, points²
_OUTLINE = withStroke(linewidth=3, foreground="white")


def write_picture(one: Diffraction, path: Path) -> None:
    """Write `crystal_figure` to a .png, .svg or .pdf file, whole or not at all.

    Raises:
        UserError: another kind of file.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UserError(
            f"{path}: no picture is written as {path.suffix!r}", remedy="name a .png, .svg or .pdf"
        )
    with replacing(path) as temporary:
        crystal_figure(one).savefig(temporary, format=kind, dpi=200)


def crystal_figure(one: Diffraction) -> Figure:
    """Two panels; both count a reflection ±q twice, and leave the origin out of the scale.

    Left, the points at both Friedel mates; colour and area grow with the logarithm of the
    intensity, absent reflections are not drawn. Right, the sum of their lines against |q|.
    """
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.15))
    _draw_cloud(figure.add_subplot(grid[0], projection="3d"), one)
    _draw_powder(figure.add_subplot(grid[1]), one)
    group = f"{space_group(one.symmetry.number)} ({one.symmetry.number})"
    title = f"{one.id}   {one.formula}   {group}, {one.symmetry.crystal_system}"
    figure.suptitle(title, parse_math=False)
    return figure


def _draw_cloud(axes: Any, one: Diffraction) -> None:
    shown = one.intensity > 0
    q = one.hkl[shown] @ one.reciprocal
    strongest = float(one.intensity.max(initial=0.0)) or 1.0
    level = np.log10(np.clip(one.intensity[shown] / strongest, 10.0**-_DECADES, None))
    # Large markers of a crowded cloud shrink, so that there is paper left between them.
    largest = 60.0 * min(1.0, 300.0 / max(len(level), 1))
    size = _SMALLEST + largest * (1.0 + level / _DECADES) ** 2
    q, level, size = np.concatenate([q, -q]), np.tile(level, 2), np.tile(size, 2)
    # Not as vectors: a file of ten thousand markers would not print.
    points = axes.scatter(
        *q.T,
        s=size,
        c=level,
        cmap=_COLOURS,
        vmin=-_DECADES,
        vmax=0,
        linewidths=0,
        alpha=0.85,
        rasterized=True,
    )
    bar = axes.figure.colorbar(points, shrink=0.6, pad=0.12, ticks=range(-_DECADES, 1))
    bar.set_label("intensity / strongest")
    bar.ax.set_yticklabels(
        [f"≤ $10^{{-{_DECADES}}}$"] + [f"$10^{{{n}}}$" for n in range(1 - _DECADES, 1)]
    )
    reach = 1.02 * float(np.abs(np.concatenate([q, one.reciprocal])).max())
    for name, vector in zip(("a*", "b*", "c*"), one.reciprocal, strict=True):
        axes.quiver(
            0, 0, 0, *vector, color=_ACCENT, arrow_length_ratio=0.15, linewidth=1.8, zorder=5
        )
        place = vector + 0.11 * reach * vector / np.linalg.norm(vector)
        text = axes.text(*place, name, color=_ACCENT, ha="center", va="center", zorder=6)
        text.set(weight="bold", path_effects=[_OUTLINE])
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_box_aspect((1, 1, 1), zoom=1.1)
    axes.set_proj_type("ortho")
    axes.computed_zorder = False  # the basis is in front of the points
    axes.set(xlabel="$q_x$ (1/Å)", ylabel="$q_y$ (1/Å)", zlabel="$q_z$ (1/Å)")


def _draw_powder(axes: Any, one: Diffraction) -> None:
    q, total = powder(one)
    end = 1.04 * float(q.max(initial=one.complete_to))
    heights, edges = np.histogram(q, _BINS, range=(0.0, end), weights=total)
    offset = (np.arange(_BINS) - _BINS // 2) * edges[1]
    profile = np.convolve(heights, np.exp(-4.0 * np.log(2.0) * (offset / _WIDTH) ** 2), "same")
    scale = 100.0 / (profile.max() or 1.0)
    profile *= scale
    place = 0.5 * (edges[1:] + edges[:-1])
    axes.fill_between(place, profile, color=_INK, alpha=0.15, linewidth=0)
    axes.plot(place, profile, color=_INK, linewidth=1.0)
    if one.config.miller_limit is not None:
        axes.axvspan(one.complete_to, end, color="0.9", zorder=0)
        text = "shells cut by the Miller cube"
        axes.text(0.99, 0.98, text, ha="right", va="top", transform=axes.transAxes, color="0.35")
    axes.set(xlim=(0, end), ylim=(0, 118))
    axes.set_xlabel("|q| = 1/d (1/Å)")
    axes.set_ylabel("intensity × multiplicity (highest 100)")
    axes.set_title(
        f"powder pattern, {one.config.radiation}: no Lorentz–polarization factor,\n"
        f"lines broadened to {_WIDTH} 1/Å (FWHM)",
        fontsize=10,
    )
    at_length = axes.secondary_xaxis("top", functions=(_inverse, _inverse))
    at_length.set_xlabel("d (Å)")
    at_length.set_xticks([d for d in (10, 5, 3, 2, 1.5, 1.2, 1, 0.8, 0.6, 0.5) if 1 / d < end])
    at_length.xaxis.set_major_formatter("{x:g}")
    labelled: list[float] = []
    for row in reflections(one)[:_LABELLED]:
        height = float(np.interp(row["q"], place, profile))
        # A peak of many lines has no one name.
        alone = scale * row["intensity"] * row["multiplicity"] > 0.7 * height
        if alone and all(abs(row["q"] - other) > 0.025 * end for other in labelled):
            labelled.append(row["q"])
            name = " ".join(f"{index}".replace("-", "−") for index in row["hkl"])
            text = axes.text(row["q"], height + 2.0, name, color=_ACCENT, fontsize=9)
            text.set(rotation=90, ha="center", path_effects=[_OUTLINE])
    axes.spines["right"].set_visible(False)


def _inverse(x: Any) -> Any:
    return 1.0 / np.maximum(x, 1e-9)
