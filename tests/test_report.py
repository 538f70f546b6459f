"""The report: numbers, words, escaping, offline and byte-identical pages, a real browser."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from ablation.curves import GRID, mean_roc, reliability, roc
from ablation.figures import wrapped
from ablation.report import _json, write_report
from ablation.report_clouds import POINTS, expand, read_clouds
from ablation.report_data import FILES, read_study
from ablation.report_study import Effect
from ablation.report_text import answer, flattened, interval, notes, number
from cluster.errors import UserError
from training.metrics import Interval, confusion_matrix, evaluate

SYSTEMS = ("cubic", "hexagonal", "tetragonal", "orthorhombic", "trigonal", "monoclinic")
SECTIONS = "answer metrics run data roc calibration confusion clouds tables provenance glossary"
HOSTILE = "</script><script>alert(1)</script>"
# Arm → how much of the signal is left.
ARMS = {
    "none": 1.0,
    "unit_intensity": 0.85,
    "no_directions": 0.55,
    "radial_only": 0.5,
    "permuted_intensity": 0.75,
    "jitter": 1.0,
    "random_points": 0.1,
}


def make_dataset(
    folder: Path, count: int = 24, cell: float = 4.0, q_max: float = 1.2, prefix: str = "mp-"
) -> Path:
    """A dataset of cubic-like cells with smooth random intensities, in two shards."""
    (folder / "shards").mkdir(parents=True)
    shards = []
    for shard, rows in enumerate(np.array_split(np.arange(count), 2)):
        rng = np.random.default_rng(shard)
        clouds = []
        for row in rows:
            a = cell + 0.05 * row
            m = int(q_max * a)
            grid = np.stack(np.meshgrid(*[np.arange(-m, m + 1)] * 3, indexing="ij"), -1)
            hkl = grid.reshape(-1, 3)
            half = (hkl[:, 2] > 0) | (
                (hkl[:, 2] == 0) & ((hkl[:, 1] > 0) | ((hkl[:, 1] == 0) & (hkl[:, 0] >= 0)))
            )
            hkl = hkl[half & (np.linalg.norm(hkl / a, axis=1) <= q_max)]
            q = hkl / a
            fall = np.exp(-3 * np.linalg.norm(q, axis=1) ** 2)
            clouds.append((hkl, q, 0.3 * fall * rng.exponential(size=len(hkl))))
        path = folder / "shards" / f"{shard:04d}.h5"
        with h5py.File(path, "w") as file:
            text = h5py.string_dtype("utf-8")
            file.create_dataset("id", data=[f"{prefix}{r}" for r in rows], dtype=text)
            file.create_dataset("formula", data=[f"Si{r + 1}O2" for r in rows], dtype=text)
            systems = [SYSTEMS[r % len(SYSTEMS)] for r in rows]
            file.create_dataset("symmetry/crystal_system", data=systems, dtype=text)
            file["symmetry/number"] = np.full(len(rows), 221, dtype=np.int16)
            file["labels/bulk_modulus"] = np.linspace(20, 200, len(rows))
            file["offsets"] = np.cumsum([0] + [len(c[0]) for c in clouds])
            file["hkl"] = np.concatenate([c[0] for c in clouds]).astype(np.int16)
            file["q"] = np.concatenate([c[1] for c in clouds]).astype(np.float32)
            file["intensity"] = np.concatenate([c[2] for c in clouds]).astype(np.float32)
            file["intensity"].attrs["units"] = "(e/Å³)²"
            file["multiplicity"] = np.where((file["hkl"][:] == 0).all(1), 1, 2).astype(np.uint8)
            file["lattice"] = np.stack([np.eye(3)] * len(rows))
        shards.append({"file": f"shards/{path.name}", "structures": len(rows)})
    manifest = {"format_version": 1, "shards": shards, "config": {"radiation": "xray"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def predict(rng, labels, classes, strength):
    """Softmax of noisy logits."""
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += 2.4 * strength
    p = np.exp(1.2 * logits)
    return p / p.sum(1, keepdims=True)


def make_ablation(
    folder: Path,
    classes=("soft", "stiff"),
    arms=ARMS,
    seeds=(0, 1, 2),
    crystals=300,
    prefix="mp-",
    **grid,
) -> Path:
    """An ablation folder in the layout that the trials write."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    labels = rng.integers(0, len(classes), crystals)
    ids = [f"{prefix}{i}" for i in range(crystals)]
    groups = [f"g{i // 2}" for i in range(crystals)]
    predictions, results, scores = [], [], {}
    for arm, strength in arms.items():
        for seed in seeds:
            p = predict(rng, labels, len(classes), strength)
            columns = {f"p{c}": p[:, c] for c in range(len(classes))}
            base = {"trial": [f"{arm}-{seed}"] * crystals, "arm": [arm] * crystals}
            base |= {"seed": [seed] * crystals, "id": ids, "group": groups, "label": labels}
            predictions.append(pa.table(base | columns))
            found = evaluate(labels, p, groups, resamples=40)
            scores.setdefault(arm, []).append(found)
            row = {"trial": f"{arm}-{seed}", "task": "bulk_modulus", "model": "pointnet"}
            row |= {"arm": arm, "strength": 1.0, "mode": "retrain", "seed": seed}
            row |= {"status": "finished", "seconds": 412.0 + seed, "commit": "2783c0c"}
            results.append(row | {name: i.value for name, i in found.items()})
    metrics, effects = [], []
    for arm, found in scores.items():
        for name in found[0]:
            value, low, high = (
                float(np.mean([getattr(f[name], part) for f in found]))
                for part in ("value", "low", "high")
            )
            metrics.append({"arm": arm, "metric": name, "value": value, "low": low, "high": high})
            if arm != "none":
                reference = metrics[list(found[0]).index(name)]["value"]
                d, half = value - reference, (high - low) / 2
                row = {"arm": arm, "metric": name, "none": reference, "value": value}
                row |= {"difference": d, "low": d - half, "high": d + half, "seeds": len(seeds)}
                effects.append(row)
    pq.write_table(pa.concat_tables(predictions), folder / "predictions.parquet")
    pq.write_table(pa.Table.from_pylist(results), folder / "results.parquet")
    pq.write_table(pa.Table.from_pylist(metrics), folder / "metrics.parquet")
    names = ["arm", "metric", "none", "value", "difference", "low", "high", "seeds"]
    kinds = [pa.string(), pa.string(), *[pa.float64()] * 5, pa.int64()]
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    pq.write_table(pa.Table.from_pylist(effects, schema), folder / "effects.parquet")
    counts = {str(name): 100 + i for i, name in enumerate(classes)}
    summary = {
        "sources": [{"kind": "json lines", "path": "mp_elastic.jsonl.gz", "sha256": "ab" * 32}]
    }
    summary |= {"structures": 7851, "rejected": 18, "points": 4_512_733, "content_hash": "cd" * 32}
    summary |= {"config": {"radiation": "xray", "cell": "primitive", "selection": "sphere:1.2"}}
    document = {
        "task": "bulk_modulus",
        "title": "bulk modulus",
        "question": "bulk modulus above 85 GPa?",
        "unit": "GPa",
        "threshold": 85.0,
        "classes": list(classes),
        "model": "pointnet",
        "arms": list(arms),
        "seeds": list(seeds),
        "primary_metric": "auroc",
        "dataset": "dataset",
        "dataset_summary": summary,
        "class_counts": {"train": counts, "validation": counts, "test": counts},
        "arm_descriptions": dict.fromkeys(arms, "Destroys the intensities; keeps all positions."),
        "training": {"epochs": 40, "batch_size": 64, "learning_rate": 1e-3},
        "provenance": {"commit": "2783c0c", "versions": {"numpy": "2.4.6"}, "hardware": "1 GPU"},
        "attribution": "Data: the Materials Project, CC BY 4.0; Jain et al. 2013.",
    }
    (folder / "grid.json").write_text(json.dumps(document | grid))
    return folder


def make_run(folder: Path, classes=("metal", "insulator"), crystals=250) -> Path:
    """A training-run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    labels = rng.integers(0, len(classes), 2 * crystals)
    p = predict(rng, labels, len(classes), 1.0)
    groups = [f"g{i // 2}" for i in range(len(labels))]
    columns = {f"p{c}": p[:, c] for c in range(len(classes))}
    base = {"id": [f"mp-{i}" for i in range(len(labels))], "group": groups}
    base |= {"split": ["validation"] * crystals + ["test"] * crystals, "label": labels}
    pq.write_table(pa.table(base | columns), folder / "predictions.parquet")
    test = slice(crystals, None)
    found = evaluate(labels[test], p[test], groups[crystals:], resamples=40)
    document = {
        "task": "band_gap",
        "question": "metal or insulator?",
        "classes": list(classes),
        "split": "test",
        "structures": crystals,
        "metrics": {n: {"value": i.value, "low": i.low, "high": i.high} for n, i in found.items()},
        "confusion_matrix": confusion_matrix(labels[test], p[test]).tolist(),
        "class_counts": {"test": dict.fromkeys(classes, 5)},
        "provenance": {"commit": "2783c0c"},
        "attribution": "Data: the Materials Project, CC BY 4.0.",
    }
    (folder / "metrics.json").write_text(json.dumps(document))
    config = {"dataset": "dataset", "task": "band_gap", "model": "pointnet", "epochs": 30}
    (folder / "config.json").write_text(json.dumps(config | {"seed": 0}))
    lines = ["epoch,train_loss,validation_loss,validation_auroc,learning_rate"]
    for e in range(30):
        fall = np.exp(-e / 8)
        lines.append(f"{e},{0.3 + 0.4 * fall},{0.4 + 0.3 * fall},{0.93 - 0.3 * fall},0.001")
    (folder / "history.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    folder = make_ablation(tmp_path_factory.mktemp("report") / "ablation")
    make_dataset(folder / "dataset")
    write_report(folder)
    return folder


class Page(HTMLParser):
    """What a browser would see: elements, their text, and what they would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.within = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within == "script":
            self.scripts[-1] += data
        elif self.within != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def figures(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_ablation_page_has_all_sections_and_figures(ablation):
    page = page_of(ablation)
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert ids >= {*SECTIONS.split(), "effects"}
    assert list(page.figures) == ["effects", "roc", "reliability", "clouds"]
    assert all(f"figure-{name}" in ids for name in page.figures)
    targets = {a["href"][1:] for t, a in page.tags if t == "a" and a["href"].startswith("#")}
    assert targets <= ids
    assert "Bulk modulus above 85 GPa?" in page.text
    assert "Materials Project, CC BY 4.0" in page.text


def test_run_page_has_all_sections_and_figures(tmp_path):
    folder = make_run(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    page = page_of(folder)
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert ids >= {*SECTIONS.split(), "history"}
    assert "effects" not in ids
    assert list(page.figures) == ["history", "roc", "reliability"]
    assert "The dataset “dataset” was not found" in page.text
    assert "One training seed only" in page.text


def test_run_page_takes_the_data_from_the_manifest(tmp_path):
    folder = make_run(tmp_path / "run")
    write_report(folder, dataset=make_dataset(tmp_path / "silica"))
    page = page_of(folder)
    assert "datasetsilica" in page.text
    assert "config · radiationxray" in page.text
    assert len(page.figures["clouds"]["data"]) == 2 * 4


def test_clouds_of_another_dataset_are_not_shown(tmp_path):
    folder = make_ablation(tmp_path / "a", arms={"none": 1.0}, seeds=(0,))
    dataset = make_dataset(tmp_path / "data")
    manifest = json.loads((dataset / "manifest.json").read_text())
    for content_hash, shown in (("cd" * 32, 4), ("ef" * 32, 0)):
        manifest["content_hash"] = content_hash
        (dataset / "manifest.json").write_text(json.dumps(manifest))
        clouds = read_clouds(read_study(folder), dataset, folder)
        assert len(clouds.shown) == shown
        assert ("other content" in clouds.problem) == (shown == 0)


def test_multi_class_page(tmp_path):
    folder = make_ablation(
        tmp_path, classes=SYSTEMS, arms={"none": 1.0, "jitter": 0.9}, seeds=(0,), dataset=""
    )
    write_report(folder)
    text = page_of(folder).text
    assert "macro one-vs-rest AUROC" in text
    assert "The dataset is not named" in text


def test_page_needs_no_network(ablation):
    source = (ablation / "report.html").read_text(encoding="utf-8")
    page = page_of(ablation)
    loads = [
        value
        for tag, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data", "action", "poster") and tag != "a"
    ]
    assert loads == []
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert all(link.startswith("#") or (ablation / link).is_file() for link in links)
    assert not any(tag in ("iframe", "object", "embed", "base", "link") for tag, _ in page.tags)
    assert not re.search(r"url\(|@import", source[: source.index("</style>")])
    policy = next(
        a["content"]
        for t, a in page.tags
        if t == "meta" and "content" in a and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "http" not in policy
    # Plotly's own library once, and its button that uploads a figure switched off.
    assert source.count("plotly.js v") == 1
    assert "showSendToCloud: false" in page.scripts[-1]


def test_same_inputs_give_same_bytes(ablation):
    files = ["report.html", *(f"tables/{p.name}" for p in (ablation / "tables").iterdir())]
    before = {name: (ablation / name).read_bytes() for name in files}
    write_report(ablation)
    assert before == {name: (ablation / name).read_bytes() for name in files}


def test_hostile_names_stay_text(tmp_path):
    arms = {"none": 1.0, HOSTILE: 0.5, "<img src=x onerror=alert(1)>%{x}": 0.9}
    folder = make_ablation(
        tmp_path / HOSTILE.replace("/", "_"),
        classes=("soft", HOSTILE),
        arms=arms,
        prefix=HOSTILE,
        question=f"{HOSTILE}?",
        title=HOSTILE,
        unit=HOSTILE,
        attribution=HOSTILE,
        provenance={HOSTILE: {"x": HOSTILE}},
        dataset_summary={HOSTILE: HOSTILE},
        class_counts={HOSTILE: {HOSTILE: 3}},
    )
    dataset = make_dataset(tmp_path / "data", prefix=HOSTILE)
    write_report(folder, dataset=dataset)
    page = page_of(folder)
    # One script of figures, plotly, one of ours: none was added, and none was cut short.
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) > 10
    shown = json.dumps(page.figures)
    assert "<script" not in shown
    assert "<img" not in shown
    assert "%{x}" not in json.dumps(page.figures["roc"]["data"])
    assert html.escape(HOSTILE, quote=False) in shown
    assert len(page.figures["clouds"]["data"]) == 8


def test_escaping_tests_can_fail():
    page = Page(f"<p>{HOSTILE}</p><script>const x = {json.dumps(HOSTILE)};</script>")
    assert sum(tag == "script" for tag, _ in page.tags) > 1


@given(st.lists(st.text(max_size=30) | st.floats(allow_nan=False), max_size=5))
@settings(max_examples=60, deadline=None)
def test_embedded_json_survives_a_script_element(document):
    text = _json(document)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == document


@given(st.text(max_size=60), st.integers(5, 40))
@example("__ %{x} <b>&lt; permuted_intensity", 7)
@settings(max_examples=100, deadline=None)
def test_wrapped_names_are_escaped_and_whole(name, width):
    lines = wrapped(name, width).split("<br>")
    assert not any("<" in line for line in lines)
    plain = [html.unescape(line) for line in lines]
    assert re.sub(r"\s", "", "".join(plain)) == re.sub(r"\s", "", name)
    if name.strip() and "%{" not in name:
        assert max(map(len, plain)) <= width


# Numbers ---------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(2, 80), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_roc_is_that_of_sklearn(seed, number_of, levels):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(number_of) % 2)
    scores = rng.integers(0, levels, number_of) / levels  # heavily tied
    false_rate, true_rate = roc(labels == 1, scores)
    expected = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(false_rate, expected[0], atol=1e-12)
    np.testing.assert_allclose(true_rate, expected[1], atol=1e-12)
    area = np.trapezoid(true_rate, false_rate)
    assert area == pytest.approx(roc_auc_score(labels, scores))


def test_macro_roc_has_the_macro_area():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 3000)
    p = predict(rng, labels, 4, 0.5)
    expected = roc_auc_score(labels, p, multi_class="ovr", average="macro")
    assert np.trapezoid(mean_roc(labels, p), GRID) == pytest.approx(expected, abs=5e-3)
    # A class that is absent is left out; a single class has no curve.
    kept = labels < 3
    assert np.isfinite(mean_roc(labels[kept], p[kept])).all()
    assert np.isnan(mean_roc(np.zeros(5, dtype=int), p[:5])).all()


def test_reliability_counts_and_intervals():
    p1 = np.array([0.01, 0.02, 0.03, 0.99, 1.0, 0.0])
    labels = np.array([0, 0, 1, 1, 1, 0])
    found = reliability(labels, np.column_stack([1 - p1, p1]))
    assert found.count.tolist() == [4, 2]
    np.testing.assert_allclose(found.observed, [0.25, 1.0])
    np.testing.assert_allclose(found.stated, [0.015, 0.995])
    expected = binomtest(1, 4).proportion_ci(method="wilson")
    np.testing.assert_allclose([found.low[0], found.high[0]], expected)
    # Two seeds of the same crystals: as many crystals, hence the same intervals.
    twice = reliability(
        np.tile(labels, 2), np.tile(np.column_stack([1 - p1, p1]), (2, 1)), repeats=2
    )
    np.testing.assert_allclose(twice.low, found.low)
    assert twice.count.tolist() == [8, 4]


def test_reliability_of_true_probabilities_is_diagonal():
    rng = np.random.default_rng(1)
    p1 = rng.uniform(size=60_000)
    labels = (rng.uniform(size=len(p1)) < p1).astype(int)
    found = reliability(labels, np.column_stack([1 - p1, p1]))
    assert np.abs(found.observed - found.stated).max() < 0.03
    assert ((found.low < found.stated) & (found.stated < found.high)).mean() > 0.75
    # Overconfident statements leave the diagonal.
    sharp = p1**3 / (p1**3 + (1 - p1) ** 3)
    wrong = reliability(labels, np.column_stack([1 - sharp, sharp]))
    assert np.abs(wrong.observed - wrong.stated).max() > 0.1


def test_tables_hold_the_numbers(ablation):
    with (ablation / "tables" / "effects.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = pq.read_table(ablation / "effects.parquet").to_pylist()
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert {k: type(want[k])(v) for k, v in row.items()} == want
    study = read_study(ablation)
    assert study.confusion.sum() == 3 * 300
    with (ablation / "tables" / "confusion.csv").open(newline="") as stream:
        assert [r[1:] for r in list(csv.reader(stream))[1:]] == study.confusion.astype(str).tolist()
    cell = pq.read_table(ablation / "metrics.parquet").to_pylist()[0]["value"]
    assert f"{cell:.3f}" in page_of(ablation).text


# Words -----------------------------------------------------------------------------------------


@pytest.fixture
def study(ablation):
    return read_study(ablation)


def with_result(study, found, changes):
    metrics = {**study.metrics, "none": {"auroc": found}}
    effects = {a: {"auroc": Effect(found.value, 0.0, c, 3)} for a, c in changes.items()}
    return replace(study, metrics=metrics, effects=effects)


def test_answer_is_no_stronger_than_its_intervals(study):
    changes = {
        "a": Interval(-0.031, -0.05, -0.012),
        "b": Interval(-0.004, -0.012, 0.004),
        "c": Interval(0.02, 0.01, 0.03),
    }
    words = " ".join(answer(with_result(study, Interval(0.94, 0.92, 0.953), changes)))
    assert "ranks “stiff” above “soft” crystals with AUROC 0.940 [0.920, 0.953]" in words
    assert "AUROC falls by 0.031 [0.012, 0.050] with “a”." in words
    assert "AUROC rises by 0.020 [0.010, 0.030] with “c”." in words
    assert "For “b” (−0.004 [−0.012, +0.004]) no effect was resolved" in words
    assert "no effect was resolved" not in words.replace(
        "For “b” (−0.004 [−0.012, +0.004]) no effect was resolved", ""
    )


@pytest.mark.parametrize(
    ("found", "phrase"),
    [
        (Interval(0.53, 0.48, 0.57), "no ability to rank “stiff” above “soft” crystals was res"),
        (Interval(0.40, 0.35, 0.45), "worse than chance"),
        (Interval(float("nan"), float("nan"), float("nan")), "is not defined"),
    ],
)
def test_answer_at_or_below_chance(study, found, phrase):
    words = answer(with_result(study, found, {}))[0]
    assert phrase in words
    assert "ranks “stiff” above “soft” crystals with" not in words


def test_many_effects_are_counted(study):
    changes = {f"arm{i}": Interval(-0.1 - i / 100, -0.3, -0.01) for i in range(5)}
    words = " ".join(answer(with_result(study, Interval(0.94, 0.92, 0.95), changes)))
    assert "1 more arm has a smaller resolved effect" in words
    assert "“arm0”" not in words
    assert any("not corrected" in note for note in notes(study))


def test_numbers_are_written_as_text():
    assert number(-0.0001, signed=True) == "0.000"
    assert number(-0.5) == "−0.500"
    assert number(float("nan")) == "–"
    assert interval(Interval(0.01, -0.02, 0.04), signed=True) == "+0.010 [−0.020, +0.040]"
    assert flattened({"a_b": {"c": 1, "none": None}, "d": [1, 2], "e": True}) == [
        ("a b · c", "1"),
        ("d", "1, 2"),
        ("e", "yes"),
    ]


# Clouds ----------------------------------------------------------------------------------------


def test_expanded_cloud_is_centrosymmetric(tmp_path):
    path = make_dataset(tmp_path / "data") / "shards" / "0000.h5"
    with h5py.File(path) as file:
        part = slice(*file["offsets"][:2])
        stored = [file[name][part] for name in ("hkl", "q", "intensity", "multiplicity")]
    hkl, q, intensity = expand(*stored)
    assert len(hkl) == stored[3].sum()
    points = {tuple(h): (tuple(v), i) for h, v, i in zip(hkl.tolist(), q, intensity, strict=True)}
    assert len(points) == len(hkl)
    for h, (place, value) in points.items():
        mate, same = points[tuple(-x for x in h)]
        assert same == value
        np.testing.assert_array_equal(np.add(place, mate), 0)


def test_clouds_cover_classes_and_keep_the_strongest(tmp_path):
    folder = make_ablation(tmp_path, arms={"none": 1.0}, seeds=(0,))
    make_dataset(tmp_path / "dataset", count=12, cell=10.0)
    study = read_study(folder)
    clouds = read_clouds(study, None, folder).shown
    assert [c.true_class for c in clouds] == ["soft", "soft", "stiff", "stiff"]
    assert len({c.crystal_system for c in clouds}) == 4
    truth = {
        i: study.classes[k]
        for i, k in zip(study.trials[0].ids, study.trials[0].labels, strict=True)
    }
    assert all(truth[c.id] == c.true_class for c in clouds)
    assert all(len(c.q) == POINTS < c.total and c.unit == "(e/Å³)²" for c in clouds)
    shard = "0000" if int(clouds[0].id.removeprefix("mp-")) < 6 else "0001"
    with h5py.File(tmp_path / "dataset" / "shards" / f"{shard}.h5") as file:
        row = file["id"].asstr()[:].tolist().index(clouds[0].id)
        part = slice(*file["offsets"][row : row + 2])
        both = np.sort(np.repeat(file["intensity"][part], file["multiplicity"][part]))
    np.testing.assert_array_equal(np.sort(clouds[0].intensity), both[-POINTS:])
    write_report(folder)
    assert "The strongest 4000 of" in page_of(folder).text


def test_dataset_without_test_crystals_shows_its_first(tmp_path):
    folder = make_ablation(tmp_path, arms={"none": 1.0}, seeds=(0,))
    clouds = read_clouds(read_study(folder), make_dataset(tmp_path / "d", prefix="x"), folder)
    assert [c.id for c in clouds.shown] == ["x0", "x1", "x2", "x3"]
    assert all(c.true_class is None for c in clouds.shown)


@pytest.mark.parametrize(
    "manifest",
    ["{", "[]", '{"shards": [{"file": "../x.h5"}]}', '{"shards": [{"file": "shards/no.h5"}]}'],
)
def test_broken_dataset_is_said_and_the_page_goes_on(tmp_path, manifest):
    folder = make_ablation(tmp_path, arms={"none": 1.0}, seeds=(0,))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "manifest.json").write_text(manifest)
    write_report(folder)
    page = page_of(folder)
    assert "The dataset “dataset” could not be read" in page.text
    assert "clouds" not in page.figures
    assert str(tmp_path) not in page.text


# Errors ----------------------------------------------------------------------------------------


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither .*[\s\S]*grid\.json[\s\S]*history\.csv"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make, name)
        for make, kind in ((make_ablation, "ablation"), (make_run, "run"))
        for name in FILES[kind]
        if name != "grid.json"
    ],
)
def test_missing_and_broken_files_are_named(tmp_path, make, name):
    folder = make(tmp_path / "x", crystals=20)
    (folder / name).write_bytes(b"\xff\x00 not what it should be\n1,2,3\n")
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is missing"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def rewrite(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_broken_content_is_named(tmp_path):
    folder = make_ablation(tmp_path / "a", crystals=20)
    path = folder / "predictions.parquet"
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns("p1"), path)
    with pytest.raises(UserError, match="no column 'p1'"):
        write_report(folder)
    labels = pa.array([7] * len(whole))
    pq.write_table(whole.set_column(whole.column_names.index("label"), "label", labels), path)
    with pytest.raises(UserError, match=r"row 0 .*label 7"):
        write_report(folder)
    pq.write_table(whole.slice(0, 0), path)
    with pytest.raises(UserError, match="no predictions"):
        write_report(folder)
    pq.write_table(whole, path)
    grid = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps(grid | {"primary_metric": "luck"}))
    with pytest.raises(UserError, match="'luck' of arm 'none'"):
        write_report(folder)
    del grid["question"]
    (folder / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(UserError, match="field 'question'"):
        write_report(folder)


def test_only_the_reference_has_finished(tmp_path):
    folder = make_ablation(tmp_path, arms={"none": 1.0}, seeds=(0,), crystals=40)
    write_report(folder)
    page = page_of(folder)
    assert "No ablated arm has finished" in page.text
    assert "effects" not in page.figures


def test_undefined_numbers_are_shown_as_such(tmp_path):
    folder = make_ablation(tmp_path, arms={"none": 1.0, "jitter": 1.0}, seeds=(0,), crystals=40)

    def blank(table):
        nothing = pa.array([None] * len(table), pa.float64())
        for name in ("value", "difference", "low", "high"):
            table = table.set_column(table.column_names.index(name), name, nothing)
        return table

    rewrite(folder / "effects.parquet", blank)
    write_report(folder)
    assert "For “jitter” the effect is not defined." in page_of(folder).text


# A real browser --------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


PROBE = """<script>
setTimeout(() => {
  document.querySelectorAll("button[data-cloud]")[2].click();
  setTimeout(() => {
    const plot = document.getElementById("figure-clouds");
    const probe = document.createElement("pre");
    probe.id = "probe";
    probe.textContent = JSON.stringify({
      visible: plot.data.map((trace) => trace.visible),
      hidden: [...document.querySelectorAll("span[data-cloud]")].map((text) => text.hidden),
      point: Array.from(plot._fullData[4].customdata[0]),
    });
    document.body.append(probe);
  }, 1000);
}, 1000);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_browser_draws_every_figure_and_turns_to_another_cloud(ablation, tmp_path):
    source = (ablation / "report.html").read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(source.replace("</body>", PROBE), encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "--disable-gpu",
            "--enable-unsafe-swiftshader",
            "--use-angle=swiftshader",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--enable-logging=stderr",
            "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert not re.search(r"Uncaught|Refused to|violates the following", done.stderr)
    dom = done.stdout
    for name in ("effects", "roc", "reliability"):
        begin = dom.index(f'id="figure-{name}"')
        figure = dom[begin : dom.index("<figcaption", begin)]
        assert figure.count('class="scatterlayer') >= 1
        assert figure.count("<path") > 10
    begin = dom.index('id="figure-clouds"')
    figure = dom[begin : dom.index("<figcaption", begin)]
    assert "<canvas" in figure or "WebGL is not supported" in figure
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1])
    assert found["visible"] == [False] * 4 + [True] * 2 + [False] * 2
    assert found["hidden"] == [True, True, False, True]
    h, k, l, length, spacing, intensity = found["point"]  # noqa: E741
    assert (h, k, l) != (0, 0, 0)
    assert length * spacing == pytest.approx(1.0, abs=1e-5)
    assert intensity > 0
    assert "cloud.plotly.com" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
