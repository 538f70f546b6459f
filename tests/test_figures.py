"""Are the figures' colours told apart on paper, and by readers who see fewer of them; and names?"""

import itertools
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ablation.figures import _STYLE, GREY, wrapped
from ablation.figures_effects import contrast_figure, forest, heat_map
from ablation.perturbations import ARMS
from ablation.report_study import Effect
from ablation.trials import Condition
from training.figures import COLOURS, DASHES, curves_figure
from training.metrics import Interval

# Machado, Oliveira & Fernandes, IEEE TVCG 15, 1291 (2009), severity 1.0, of linear sRGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopes": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopes": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(  # sRGB, D65 (IEC 61966-2-1)
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colour):
    part = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB (1976) of linear sRGB."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colours, reader):
    """Smallest difference ΔE of two colours as a reader sees them; 2.3 is just noticeable."""
    seen = [lab(np.array(SEEN_BY[reader]) @ linear(each)) for each in colours]
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))


def contrast(colour):
    """With white, as the W3C defines it; it asks for 3 of graphics."""
    return 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05)


@pytest.mark.parametrize("reader", SEEN_BY)
def test_colours_are_told_apart(reader):
    assert nearest(COLOURS, reader) > 15


def test_that_test_finds_red_and_green():
    pair = ("#d62728", "#2ca02c")
    assert nearest(pair, "all") > 15
    assert nearest(("#a05020", "#708020"), "deuteranopes") < 15


def test_colours_stand_out_on_white():
    assert lab(linear("#ffffff")) == pytest.approx([100, 0, 0], abs=0.01)
    assert contrast("#000000") == pytest.approx(21)
    assert [each for each in (*COLOURS, GREY) if contrast(each) < 3] == []


def test_lines_differ_without_colour():
    """Neighbours in dashes; all seven of crystal systems in dashes and colour together."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(7), 200)
    figure = curves_figure(random.integers(7, size=200), p, tuple("abcdefg"))
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_label() in set("abcdefg")]
        looks = [(line.get_linestyle(), line.get_color()) for line in lines]
        assert len(set(looks)) == len(lines) == 7
        assert all(a[0] != b[0] for a, b in itertools.pairwise(looks))
    assert len(set(DASHES)) == 4


def effects(mode, models=("pointnet",)):
    """Of every arm, at a dose that takes room."""
    change = Interval(-0.123, -0.2, -0.05)
    return [
        Effect(
            Condition(model, name, arm.strength and 0.05, mode),
            *(0.9, 0.8, change, 3, 0.01, "undecided", {"metric": "auroc"}),
        )
        for model in models
        for name, arm in ARMS.items()
    ]


def touching(figure):
    """Pairs of texts of one panel that share a place."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts]
        placed = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
        pairs = itertools.combinations(placed, 2)
        found += [(one[0], other[0]) for one, other in pairs if one[1].overlaps(other[1])]
    return found


@pytest.mark.parametrize("mode", ["retrain", "train_only"])
def test_names_of_many_arms_do_not_touch(mode):
    with matplotlib.rc_context(_STYLE):
        assert touching(forest(effects(mode), "AUROC")) == []


@pytest.mark.parametrize(
    ("tasks", "models"), [(1, ["a"]), (3, ["a"]), (4, ["a"]), (5, ["lattice_only", "harmonic"])]
)
def test_columns_and_cells_of_a_heat_map_do_not_touch(tasks, models):
    names = ["log_shear_modulus", "crystal_system", "bulk_modulus", "band_gap", "stability"]
    found = [e for e in effects("test_only", models) if e.condition.arm in list(ARMS)[1:13]]
    studies = [SimpleNamespace(task=name, primary="auroc", effects=found) for name in names[:tasks]]
    with matplotlib.rc_context(_STYLE):
        assert touching(heat_map(studies)) == []


@pytest.mark.parametrize("verdict", ["supported", "undecided", "contradicted"])
@pytest.mark.parametrize("at", [-0.5, -0.061, -0.013, -0.004, -0.0006, 0.02, 0.3])
@pytest.mark.parametrize("wide", [0.3, 0.9, 4])
def test_numbers_below_a_contrast_do_not_touch(verdict, at, wide):
    ends = {"low": at - wide * abs(at), "high": at + wide * abs(at), "difference": at}
    row = {"task": "log_shear_modulus", "symmetry": at, "intensity": at / 17, "verdict": verdict}
    with matplotlib.rc_context(_STYLE):
        assert touching(contrast_figure([row | ends], "AUROC")) == []


@pytest.mark.parametrize("verdict", ["undecided", "one seed", None])
def test_a_cell_without_a_verdict_is_pale(verdict):
    large = Interval(0.5, -0.1, 1.1)
    found = [
        Effect(
            Condition("a", arm, None, "retrain"),
            0.9,
            0.8,
            large,
            3,
            0.01,
            said,
            {"metric": "auroc"},
        )
        for arm, said in (("intensity_binary", verdict), ("directions_random", "effect"))
    ]
    figure = heat_map([SimpleNamespace(task="stability", primary="auroc", effects=found)])
    figure.set_dpi(50)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    axes = figure.axes[0]
    shades = []
    for row in (0, 1):
        x, y = axes.transData.transform((0.4, row))
        at = pixels[len(pixels) - 1 - int(y), int(x)]
        shades.append(at.max() - at.min())
    assert shades[0] < 0.3 * shades[1]


def test_a_mode_stays_in_one_piece():
    assert wrapped("intensity_shuffled (test_only)", 25) == "intensity_shuffled\n(test_only)"
    assert wrapped("intensity_shuffled_in_shells", 20) == "intensity_shuffled_\nin_shells"
