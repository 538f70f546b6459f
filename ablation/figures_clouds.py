"""The 3D figure of the report: diffraction clouds to turn around and to point at, with plotly.

Text in it passes through plotly's small HTML subset, so names are escaped here.
"""

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from ablation.report_clouds import ShownCloud
from training.figures import VERMILION

_DECADES = 4
"""Decades of intensity below the strongest point that colour and size tell apart."""


def clouds_figure(clouds: Sequence[ShownCloud]) -> go.Figure:
    """All clouds in one 3D scene, two traces each (Bragg points, origin); the first is visible."""
    figure = go.Figure()
    for index, cloud in enumerate(clouds):
        visible = index == 0
        origin = (cloud.hkl == 0).all(axis=1)
        figure.add_trace(_bragg_points(cloud, ~origin).update(visible=visible))
        place = cloud.q[origin]
        at_origin = go.Scatter3d(
            x=place[:, 0],
            y=place[:, 1],
            z=place[:, 2],
            mode="markers",
            marker={"size": 5, "color": VERMILION, "symbol": "x"},
            hovertemplate="hkl 0 0 0, the origin<br>I "
            f"{float(cloud.intensity[origin].sum()):.4g} {escaped(cloud.unit)}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(at_origin.update(visible=visible))
    axis = {"gridcolor": "#d9dce1", "showbackground": False, "zerolinecolor": "#b5bac3"}
    figure.update_scenes(
        aspectmode="data",
        xaxis={**axis, "title": "q<sub>x</sub> (1/Å)"},
        yaxis={**axis, "title": "q<sub>y</sub> (1/Å)"},
        zaxis={**axis, "title": "q<sub>z</sub> (1/Å)"},
        camera={"eye": {"x": 1.3, "y": 1.3, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.12}},
    )
    return figure.update_layout(
        template="none",
        height=560,
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13},
        paper_bgcolor="#ffffff",
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": "#5b616b", "align": "left"},
        margin={"l": 0, "r": 0, "t": 8, "b": 56},
    )


def escaped(name: str) -> str:
    """A name as plotly must be given it, to be shown letter by letter."""
    # %{ would start a template in hover texts.
    return html.escape(name.replace("%{", "% {"), quote=False)


def _bragg_points(cloud: ShownCloud, keep: NDArray[np.bool_]) -> go.Scatter3d:
    intensity, q, hkl = cloud.intensity[keep], cloud.q[keep], cloud.hkl[keep]
    strongest = float(intensity.max(initial=0.0)) or 1.0
    relative = intensity.astype(np.float64) / strongest
    decades = np.log10(np.clip(relative, 10.0**-_DECADES, None))
    length = np.linalg.norm(q.astype(np.float64), axis=1)
    data = np.column_stack([hkl, length, 1.0 / length, intensity]).astype(np.float32)
    return go.Scatter3d(
        x=q[:, 0],
        y=q[:, 1],
        z=q[:, 2],
        mode="markers",
        marker={
            "size": (1.5 + 9.5 * (1.0 + decades / _DECADES) ** 2).astype(np.float32),
            "color": decades.astype(np.float32),
            "colorscale": "Cividis",
            "reversescale": True,
            "cmin": -_DECADES,
            "cmax": 0,
            "line": {"width": 0},
            "colorbar": {
                "title": {"text": "I / I<sub>max</sub>", "side": "bottom"},
                "tickvals": list(range(-_DECADES, 1)),
                "ticktext": [f"≤ 10<sup>−{_DECADES}</sup>"]
                + [f"10<sup>−{n}</sup>" for n in range(_DECADES - 1, 0, -1)]
                + ["1"],
                "orientation": "h",
                "y": 0,
                "yanchor": "top",
                "thickness": 10,
                "len": 0.8,
                "outlinewidth": 0,
            },
        },
        customdata=data,
        hovertemplate="hkl %{customdata[0]} %{customdata[1]} %{customdata[2]}<br>"
        "|q| %{customdata[3]:.4f} 1/Å<br>d %{customdata[4]:.4f} Å<br>"
        f"I %{{customdata[5]:.4g}} {escaped(cloud.unit)}<extra></extra>",
        showlegend=False,
    )
