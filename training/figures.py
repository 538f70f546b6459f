"""Figures for TensorBoard, and the colours of all figures.

Colours are four of Okabe & Ito (2008) and two of Tol (2021): they keep apart for colour-blind
readers and stand out on white. What they do not tell in a black-and-white print, dashes and marks
do.
"""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.dataset import Clouds
from training.metrics import FloatArray

matplotlib.use("Agg", force=False)

BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#882255", "#332288")
DASHES = ("solid", "dashed", "dotted", "dashdot")


def confusion_figure(counts_CC: NDArray[np.int64], classes: tuple[str, ...]) -> Figure:
    """Rows are true classes; shade is the part of a row, figures are counts."""
    counts = np.asarray(counts_CC)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(1.6 + 0.7 * len(classes), 1.4 + 0.6 * len(classes)), tight_layout=True)
    axes = figure.subplots()
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        ink = "black" if shares[row, column] > 0.5 else "white"
        axes.text(column, row, str(count), ha="center", va="center", color=ink)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def roc(positive_N: NDArray[np.bool_], score_N: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Receiver operating characteristic: equal scores are one threshold (Fawcett 2006, alg. 1).

    Returns:
        False- and true-positive rates, (T + 1,) each for T distinct scores, from (0, 0) to (1, 1);
        NaN where one of the two classes is absent.
    """
    order = np.argsort(-score_N, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score_N[order])), len(order) - 1)
    hits = np.cumsum(positive_N[order])[last]
    alarms = last + 1 - hits
    with np.errstate(invalid="ignore", divide="ignore"):
        false_rate = np.append(0.0, alarms / np.float64((~positive_N).sum()))
        true_rate = np.append(0.0, hits / np.float64(positive_N.sum()))
    return false_rate, true_rate


def curves_figure(
    target_N: NDArray[np.int64], probability_NC: NDArray[np.float64], classes: tuple[str, ...]
) -> Figure:
    """ROC and precision–recall, one line a class (only class 1 of a binary task)."""
    figure = Figure(figsize=(9, 4), tight_layout=True)
    left, right = figure.subplots(1, 2)
    for c in [1] if len(classes) == 2 else range(len(classes)):
        positive = target_N == c
        if not 0 < positive.sum() < len(positive):
            continue
        false_rate, true_rate = roc(positive, probability_NC[:, c])
        hits, alarms = positive.sum() * true_rate[1:], (~positive).sum() * false_rate[1:]
        look: Any = {
            "color": COLOURS[c % len(COLOURS)],
            "linestyle": DASHES[c % len(DASHES)],
            "label": classes[c],
        }
        left.plot(false_rate, true_rate, **look)
        right.step(true_rate[1:], hits / (hits + alarms), where="post", **look)
    left.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    left.set(xlabel="false positive rate", ylabel="true positive rate")
    right.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    left.legend()
    return figure


def cloud_figure(data: Clouds, row: int) -> Figure:
    """One diffraction cloud in 3D; area and colour grow with the logarithm of the intensity."""
    chosen = data.subset(np.array([row]))
    q = chosen.q_P3.numpy()
    intensity = chosen.intensity_P.numpy()
    level = np.log10(np.maximum(intensity, intensity.max() * 1e-6) / max(intensity.max(), 1e-30))
    figure = Figure(figsize=(6, 5), tight_layout=True)
    axes: Any = figure.add_subplot(projection="3d")
    q, level = np.concatenate([q, -q]), np.concatenate([level, level])
    points = axes.scatter(*q.T, s=4 + 10 * (level + 6), c=level, cmap="cividis")
    figure.colorbar(points, label="log₁₀ I / I_max", shrink=0.7, pad=0.12)
    axes.set(xlabel="q_x (1/Å)", ylabel="q_y (1/Å)", zlabel="q_z (1/Å)")
    axes.set_title(f"{chosen.ids[0]} ({chosen.crystal_systems[0]})")
    return figure
