"""The report: numbers, words, escaping, offline and byte-identical pages, a real browser."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from browser import needs_chromium, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from simulated import plain, predictions, write_grid
from sklearn.metrics import roc_auc_score, roc_curve

from ablation.curves import GRID, mean_roc, reliability
from ablation.demo import _sentences
from ablation.figures import draw, panels, wrapped
from ablation.figures_effects import heat_cells
from ablation.report import _json, write_report
from ablation.report_clouds import POINTS, expand, read_clouds
from ablation.report_data import FILES, read_report
from ablation.report_study import Effect
from ablation.report_text import answer, flattened, interval, notes, number, p_value
from ablation.tables import write_statistics
from ablation.trials import Condition
from cluster.errors import UserError
from training.config import TrainingConfig
from training.figures import roc
from training.metrics import Interval, confusion_matrix, evaluate

SYSTEMS = ("cubic", "hexagonal", "tetragonal", "orthorhombic", "trigonal", "monoclinic")
SECTIONS = "answer run data clouds tables provenance glossary"
HOSTILE = "</script><script>alert(1)</script>"


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
            file.create_dataset("group", data=[f"g{r}" for r in rows], dtype=text)
            file.create_dataset("symmetry/bravais", data=["cP"] * len(rows), dtype=text)
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


CLASSES = {"crystal_system": SYSTEMS, "bulk_modulus": ("soft", "stiff")}
DOSES = {("pointnet", "jitter", s, "retrain"): 1.5 - s for s in (0.1, 0.4, 1.0)}
SKILLS = {"none": 1.5, "directions_random": 0.3, "intensity_binary": 1.2, "intensity_shuffled": 1.1}


def make_grid(
    folder, *tasks, skills=SKILLS, conditions=DOSES, seeds=(0, 1, 2), crystals=150, **grid
):
    """A grid of some tasks, of `bulk_modulus` by default."""
    random = np.random.default_rng(7)
    tables = {
        task: predictions(
            random,
            plain(skills) | conditions,
            classes=len(CLASSES[task]),
            seeds=seeds,
            crystals=crystals,
        )
        for task in tasks or ("bulk_modulus",)
    }
    options = {"classes": CLASSES, "resamples": 40} | grid
    return write_grid(folder, tables, **options)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    folder = make_grid(
        tmp_path_factory.mktemp("report") / "ablation", "bulk_modulus", "crystal_system", missing=3
    )
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


def test_a_grids_page_has_all_sections_and_figures(ablation):
    page = page_of(ablation)
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert ids >= {*SECTIONS.split(), "claim", "overview"}
    kinds = ("effects", "doses", "losses", "roc", "reliability")
    names = [f"{kind}-{task}" for task in CLASSES for kind in kinds] + ["heat-map", "contrast"]
    assert ids >= {f"figure-{name}" for name in names} | {f"task-{task}" for task in CLASSES}
    files = sorted(path.name for path in (ablation / "figures").iterdir())
    assert files == sorted(f"{name}.{end}" for name in names for end in ("svg", "png"))
    drawings = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(drawings) == len(names)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in drawings)
    targets = {a["href"][1:] for t, a in page.tags if t == "a" and a["href"].startswith("#")}
    assert targets <= ids
    assert list(page.figures) == ["clouds"]
    assert "Materials Project, CC BY 4.0" in page.text
    assert re.findall(r"[a-z)][.;][A-Z]\w+ \w+", page.text) == []  # sentences run together
    assert "3 of 45 trials are missing" in page.text


def test_the_declared_claim_is_worded_with_its_numbers(ablation):
    text = page_of(ablation).text
    assert text.count("supported: AUROC changes by −0.") == 2
    rows = pq.read_table(ablation / "tables" / "contrasts.parquet").to_pylist()
    for row in rows:
        assert row["verdict"] == "supported"
        assert f"{row['difference']:+.3f}".replace("-", "−") in text
    assert "directions_random" in text
    assert "intensity_binary, intensity_shuffled" in text


def test_a_page_of_one_task_answers_in_front(tmp_path):
    folder = make_grid(tmp_path, skills={"none": 1.5, "twin": 1.5}, conditions={}, crystals=60)
    write_report(folder)
    page = page_of(folder)
    assert "Stiff (bulk_modulus)?" in page.text
    assert "ranks “stiff” above “soft” crystals" in page.text
    assert "not tested: it takes finished trials" in page.text
    assert "trials are missing" not in page.text
    assert "figure-effects" in {attrs.get("id") for _, attrs in page.tags}


def test_run_page_has_all_sections_and_figures(tmp_path):
    folder = make_run(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    page = page_of(folder)
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert ids >= {*SECTIONS.split(), "history", "figure-history", "figure-roc"}
    assert "claim" not in ids
    assert page.scripts == []
    assert "The dataset “dataset” was not found" in page.text
    assert "One training seed only" in page.text


def test_run_page_takes_the_data_from_the_manifest(tmp_path):
    folder, dataset = make_run(tmp_path / "run"), make_dataset(tmp_path / "silica")
    manifest = json.loads((dataset / "manifest.json").read_text())
    source = {"spec": "sand.jsonl", "kind": "jsonl", "sha256": "ab" * 32, "licence": "CC BY 4.0"}
    source |= {"records": 24, "block": 64, "without_shard": {"records": [[0, 3]], "present": 0}}
    for sources, title in (([source], "source"), ([source, source], "source 2")):
        text = json.dumps(manifest | {"sources": sources})
        (dataset / "manifest.json").write_text(text)
        write_report(folder, dataset=dataset)
        page = page_of(folder)
        for name, value in {"spec": "sand.jsonl", "licence": "CC BY 4.0", "records": "24"}.items():
            assert f"{title} · {name}{value}" in page.text
        assert "{" not in page.text
    assert "datasetsilica" in page.text
    assert "config · radiationxray" in page.text
    assert len(page.figures["clouds"]["data"]) == 2 * 4


def test_clouds_of_another_dataset_are_not_shown(tmp_path):
    folder = make_grid(tmp_path / "a", skills={"none": 1.0}, conditions={}, seeds=(0,))
    dataset = make_dataset(tmp_path / "data")
    manifest = json.loads((dataset / "manifest.json").read_text())
    for content_hash, shown in (("cd" * 32, 4), ("ef" * 32, 0)):
        manifest["content_hash"] = content_hash
        (dataset / "manifest.json").write_text(json.dumps(manifest))
        report = read_report(folder, dataset)
        clouds = read_clouds(report.studies[0], report.place)
        assert len(clouds.shown) == shown
        assert ("other content" in clouds.problem) == (shown == 0)


def test_page_needs_no_network(ablation):
    source = (ablation / "report.html").read_text(encoding="utf-8")
    page = page_of(ablation)
    loads = [
        value
        for tag, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data", "action", "poster") and tag != "a"
        if not str(value).startswith("data:image/svg+xml;base64,")
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


def test_same_inputs_give_same_bytes_everywhere(ablation, tmp_path):
    names = [
        p.relative_to(ablation)
        for kind in ("tables", "figures")
        for p in (ablation / kind).iterdir()
    ]
    names += [Path("report.html"), Path("effects.parquet"), Path("metrics.parquet")]
    before = {name: (ablation / name).read_bytes() for name in names}
    copy = tmp_path / "ablation"  # nothing made before, so that all is made anew
    copy.mkdir()
    for path in ablation.iterdir():
        if path.name in ("dataset",):
            shutil.copytree(path, copy / path.name)
        elif path.name == "grid.json" or path.name.startswith(("predictions-", "results")):
            shutil.copy(path, copy)
    write_report(copy)
    assert before == {name: (copy / name).read_bytes() for name in names}


def test_tables_of_the_same_trials_are_not_made_again(tmp_path, monkeypatch):
    folder = make_grid(tmp_path, skills={"none": 1.0, "a": 0.5}, conditions={}, crystals=40)
    first = write_statistics(folder).by_name
    monkeypatch.setattr("ablation.tables.Samples", None)
    again = write_statistics(folder).by_name
    assert {name: table.to_pylist() for name, table in again.items()} == {
        name: table.to_pylist() for name, table in first.items()
    }
    results = pq.read_table(folder / "results.parquet")
    pq.write_table(results.slice(1), folder / "results.parquet")
    with pytest.raises(TypeError):  # they are made again: of other trials
        write_statistics(folder)


def test_hostile_names_stay_text(tmp_path):
    skills = {"none": 1.0, HOSTILE: 0.5, "<img src=x onerror=alert(1)>$\\frac{x}$": 0.9}
    random = np.random.default_rng(0)
    table = predictions(random, plain(skills, HOSTILE), crystals=40, prefix=HOSTILE)
    folder = write_grid(
        tmp_path / HOSTILE.replace("/", "_"),
        {"stable": table},
        classes={"stable": ("$_^{", HOSTILE)},
        resamples=20,
        attribution=HOSTILE,
        provenance={HOSTILE: {"x": HOSTILE}},
        dataset_summary={HOSTILE: HOSTILE},
    )
    dataset = make_dataset(tmp_path / "data", prefix=HOSTILE)
    write_report(folder, dataset=dataset)
    page = page_of(folder)
    # One script of the figure, plotly, one of ours: none was added, and none was cut short.
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) > 10
    shown = json.dumps(page.figures)
    assert "<script" not in shown
    assert "<img" not in shown
    assert len(page.figures["clouds"]["data"]) == 8
    for path in (folder / "figures").glob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")


def test_a_task_that_leaves_the_folder_is_refused(tmp_path):
    folder = make_grid(tmp_path, skills={"none": 1.0}, conditions={}, crystals=20)
    grid = json.loads((folder / "grid.json").read_text())
    grid["tasks"]["../x"] = grid["tasks"]["bulk_modulus"]
    (folder / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(UserError, match="no name of a file"):
        write_report(folder)


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
@settings(max_examples=100, deadline=None)
def test_wrapped_names_are_whole(name, width):
    lines = wrapped(name, width).split("\n")
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", name)
    if name.strip():
        assert max(map(len, lines)) <= width


def test_figures_draw_names_letter_by_letter():
    def make():
        figure, (axes,) = panels(1, 1, 1.0)
        axes.set_xlabel("$\\nothing{ <b>&")  # as TeX this raises
        return figure

    drawing = draw(make, "")
    assert drawing.png.startswith(b"\x89PNG")
    assert b"<b>" not in drawing.svg
    assert drawing == draw(make, "")


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


def test_the_demo_says_the_verdicts_of_the_report(ablation):
    effects = pq.read_table(ablation / "effects.parquet")
    effects = effects.filter(pc.equal(effects["task"], "bulk_modulus"))
    said = _sentences(ablation, TrainingConfig(task="bulk_modulus"))
    rows = [row for row in effects.to_pylist() if row["metric"] == "auroc"]
    assert {"effect", "undecided"} <= {row["verdict"] for row in rows}
    for row in rows:
        (line,) = (line for line in said if f"{row['difference']:+.3f} [" in line)
        assert line.split("]")[1].strip() == row["verdict"]


def test_tables_hold_the_numbers(ablation):
    expected = pq.read_table(ablation / "effects.parquet").to_pylist()
    with (ablation / "tables" / "effects.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(expected) == 2 * 6 * 6
    for row, want in zip(rows, expected, strict=True):
        for name, value in want.items():
            assert row[name] == ("" if value is None else row[name])
            if value is not None:
                assert type(value)(row[name]) == value
    report = read_report(ablation)
    assert [study.confusion.sum() for study in report.studies] == [450, 450]
    for path in (ablation / "tables").glob("*.csv"):
        kin = path.with_suffix(".parquet")
        kin = kin if kin.is_file() else ablation / kin.name
        with path.open(newline="") as stream:
            assert len(list(csv.reader(stream))) == pq.read_metadata(kin).num_rows + 1
    text = page_of(ablation).text
    for row in expected:
        if row["metric"] == "auroc":
            assert number(row["difference"], signed=True) in text


def test_the_heat_map_has_a_row_an_arm_and_a_column_a_task(ablation):
    rows, columns, cells = heat_cells(read_report(ablation).studies)
    assert columns == ["bulk_modulus", "crystal_system"]
    assert rows == [*list(SKILLS)[1:], "jitter 1"]
    assert all(effect is not None for row in cells for effect in row)


# Words -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(ablation):
    return read_report(ablation).studies[0]


def with_result(study, found, changes):
    condition = study.reference
    row = {"metric": "auroc"}
    effects = tuple(
        Effect(Condition(study.model, a), found.value, 0.0, c, 3, 0.0, verdict, row)
        for a, (c, verdict) in changes.items()
    )
    return replace(study, metrics={condition: {"auroc": found}}, effects=effects)


def test_answer_is_no_stronger_than_its_tests(study):
    changes = {
        "a": (Interval(-0.031, -0.05, -0.012), "effect"),
        "b": (Interval(-0.004, -0.012, 0.004), "no effect"),
        "c": (Interval(0.02, 0.01, 0.03), "small effect"),
        "d": (Interval(-0.03, -0.06, -0.001), "undecided"),
        "e": (Interval(-0.03, -0.06, -0.01), "one seed"),
    }
    words = " ".join(answer(with_result(study, Interval(0.94, 0.92, 0.953), changes)))
    assert "ranks “stiff” above “soft” crystals with AUROC 0.940 [0.920, 0.953]" in words
    assert "AUROC falls by 0.031 [0.012, 0.050] with “a”." in words
    assert "AUROC rises by 0.020 [0.010, 0.030] with “c”." in words
    assert "For “b” (−0.004 [−0.012, +0.004]): no effect, within ±0.02." in words
    assert "For “d” (−0.030 [−0.060, −0.001]): undecided" in words
    assert "For “e” (−0.030 [−0.060, −0.010]): one seed" in words


@pytest.mark.parametrize(
    ("found", "phrase"),
    [
        (Interval(0.53, 0.48, 0.57), "no ability to rank “stiff” above “soft” crystals was res"),
        (Interval(0.40, 0.35, 0.45), "worse than chance"),
        (Interval(math.nan, math.nan, math.nan), "is not defined"),
    ],
)
def test_answer_at_or_below_chance(study, found, phrase):
    words = answer(with_result(study, found, {}))[0]
    assert phrase in words
    assert "ranks “stiff” above “soft” crystals with" not in words


def test_many_effects_are_counted(study, ablation):
    changes = {f"arm{i}": (Interval(-0.1 - i / 100, -0.3, -0.01), "effect") for i in range(5)}
    words = " ".join(answer(with_result(study, Interval(0.94, 0.92, 0.95), changes)))
    assert "1 more perturbation has a smaller effect" in words
    assert "“arm0”" not in words
    assert any("Holm" in note for note in notes(read_report(ablation)))


def test_numbers_are_written_as_text():
    assert number(-0.0001, signed=True) == "0.000"
    assert number(-0.5) == "−0.500"
    assert number(math.nan) == number(None) == p_value(None) == "–"
    assert p_value(0.0123) == "0.012"
    assert p_value(1e-6) == "< 0.001"
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


def clouds_of(folder, dataset=None):
    report = read_report(folder, dataset)
    return report.studies[0], read_clouds(report.studies[0], report.place).shown


def test_clouds_cover_classes_and_keep_the_strongest(tmp_path):
    folder = make_grid(tmp_path, skills={"none": 1.0}, conditions={}, seeds=(0,))
    make_dataset(tmp_path / "dataset", count=12, cell=10.0)
    study, clouds = clouds_of(folder)
    assert [c.true_class for c in clouds] == ["soft", "soft", "stiff", "stiff"]
    assert len({c.crystal_system for c in clouds}) == 4
    truth = dict(zip(study.trials.ids, study.trials.labels, strict=True))
    assert all(study.classes[truth[c.id]] == c.true_class for c in clouds)
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
    folder = make_grid(tmp_path, skills={"none": 1.0}, conditions={}, seeds=(0,))
    _, clouds = clouds_of(folder, make_dataset(tmp_path / "d", prefix="x"))
    assert [c.id for c in clouds] == ["x0", "x1", "x2", "x3"]
    assert all(c.true_class is None for c in clouds)


def test_broken_dataset_is_said_and_the_page_goes_on(tmp_path):
    folder = make_grid(tmp_path, skills={"none": 1.0}, conditions={}, seeds=(0,), crystals=40)
    (tmp_path / "dataset").mkdir()
    wrong = ["[]", '{"shards": [{"file": "../x.h5"}]}', '{"shards": [{"file": "shards/no.h5"}]}']
    for manifest in wrong:
        (tmp_path / "dataset" / "manifest.json").write_text(manifest)
        assert "“dataset” could not be read" in read_report(folder).place.problem
    (tmp_path / "dataset" / "manifest.json").write_text("{")
    write_report(folder)
    page = page_of(folder)
    assert "The dataset “dataset” could not be read" in page.text
    assert page.scripts == []
    assert str(tmp_path) not in page.text


# Errors ----------------------------------------------------------------------------------------


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither .*[\s\S]*grid\.json[\s\S]*metrics\.json"):
        write_report(tmp_path)


def small_grid(folder):
    return make_grid(folder, skills={"none": 1.0, "a": 0.5}, conditions={}, crystals=20)


@pytest.mark.parametrize(
    ("make", "name"),
    [(small_grid, "results.parquet"), (small_grid, "predictions-bulk_modulus.parquet")]
    + [(make_run, name) for name in FILES["run"]],
)
def test_missing_and_broken_files_are_named(tmp_path, make, name):
    folder = make(tmp_path / "x")
    (folder / name).write_bytes(b"\xff\x00 not what it should be\n1,2,3\n")
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is missing|no predictions yet"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_broken_content_is_named(tmp_path):
    folder = small_grid(tmp_path / "a")
    path = folder / "predictions-bulk_modulus.parquet"
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns("p1"), path)
    with pytest.raises(UserError, match=r"predictions-bulk[\s\S]*lack columns \['p1'\]"):
        write_report(folder)
    labels = pa.array([7] * len(whole))
    pq.write_table(whole.set_column(whole.column_names.index("label"), "label", labels), path)
    with pytest.raises(UserError, match=r"predictions-bulk.* = 7 is not in 0 … 1"):
        write_report(folder)
    pq.write_table(whole.slice(0, 0), path)
    with pytest.raises(UserError, match="no predictions yet"):
        write_report(folder)
    pq.write_table(whole, path)
    grid = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps(grid | {"primary_metric": "luck"}))
    with pytest.raises(UserError, match="primary metric 'luck'"):
        write_report(folder)
    del grid["tasks"]["bulk_modulus"]["question"]
    (folder / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(UserError, match=r"field 'tasks\.bulk_modulus\.question'"):
        write_report(folder)


# Grids that are not finished -------------------------------------------------------------------


def test_only_the_reference_has_finished(tmp_path):
    folder = make_grid(
        tmp_path, skills={"none": 1.0}, conditions={}, seeds=(0,), crystals=40, missing=9
    )
    write_report(folder)
    page = page_of(folder)
    assert "No perturbed arm has finished" in page.text
    assert "9 of 10 trials are missing" in page.text
    assert not any(attrs.get("id") == "figure-effects" for _, attrs in page.tags)


def test_the_reference_has_not_finished_yet(tmp_path):
    folder = make_grid(tmp_path, skills={"a": 1.0, "b": 0.4}, conditions={}, crystals=40, missing=3)
    write_report(folder)
    page = page_of(folder)
    assert "No trial of the untouched input has finished" in page.text
    assert pq.read_table(folder / "effects.parquet").num_rows == 0
    assert pq.read_table(folder / "metrics.parquet").num_rows == 2 * 6


def test_a_task_without_a_trial_is_left_out(tmp_path):
    folder = make_grid(tmp_path, "bulk_modulus", "crystal_system", crystals=40, conditions={})
    (folder / "predictions-crystal_system.parquet").unlink()
    report = read_report(folder)
    assert [study.task for study in report.studies] == ["bulk_modulus"]


def test_undefined_numbers_are_shown_as_such(tmp_path):
    folder = make_grid(tmp_path, skills={"none": 1.0, "a": 1.0}, conditions={}, crystals=40)
    path = folder / "predictions-bulk_modulus.parquet"
    table = pq.read_table(path)
    zeros = pa.array([0] * len(table), pa.int64())
    pq.write_table(table.set_column(table.column_names.index("label"), "label", zeros), path)
    write_report(folder)
    assert "is not defined on these 40 held-out crystals" in page_of(folder).text
    effects = pq.read_table(folder / "effects.parquet")
    assert pc.sum(pc.is_null(effects["difference"])).as_py() == 5  # ece alone is defined


# A real browser --------------------------------------------------------------------------------

PROBE = r"""<script>
setTimeout(() => {
  document.querySelectorAll("button[data-cloud]")[2].click();
  setTimeout(() => {
    const plot = document.getElementById("figure-clouds");
    const scene = plot._fullLayout.scene._scene;
    const canvas = plot.querySelector("canvas");
    const box = canvas.getBoundingClientRect();
    const before = scene.getCamera().eye;
    const drag = (kind, at, buttons) => canvas.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, view: window, button: 0, buttons,
      clientX: box.left + at, clientY: box.top + box.height / 2,
    }));
    drag("mousedown", 100, 1);
    for (let at = 100; at <= 200; at += 10) drag("mousemove", at, 1);
    drag("mouseup", 200, 0);
    setTimeout(() => {
      const eye = scene.getCamera().eye;
      const probe = document.createElement("pre");
      probe.id = "probe";
      probe.hidden = true;
      probe.textContent = JSON.stringify({
        drawn: [...document.images].map((image) => image.naturalWidth > 100 && image.complete),
        elsewhere: document.documentElement.outerHTML
          .replace(/<script[^]*?<\/script>/g, "").includes("cloud.plotly.com"),
        visible: plot.data.map((trace) => trace.visible),
        hidden: [...document.querySelectorAll("span[data-cloud]")].map((text) => text.hidden),
        point: Array.from(plot._fullData[4].customdata[0]),
        turned: Math.hypot(eye.x - before.x, eye.y - before.y, eye.z - before.z),
      });
      document.body.append(probe);
    }, 500);
  }, 1000);
}, 1000);
</script></body>"""


@needs_chromium
def test_browser_draws_every_figure_and_turns_to_another_cloud(ablation, tmp_path):
    source = (ablation / "report.html").read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(source.replace("</body>", PROBE), encoding="utf-8")
    rows, log = seen(tmp_path, ["probed.html"], wait=5000)
    assert not re.search(r"Uncaught|Refused to|violates the following", log)
    for row in rows:  # a phone and a desktop
        assert row["taken"] <= row["width"]  # nothing runs out of the page
        found = json.loads(row["probe"])
        assert found["drawn"] == [True] * 12
        left = 2 * len(found["hidden"]) - 6
        assert found["visible"] == [False] * 4 + [True] * 2 + [False] * left
        assert found["hidden"] == [place != 2 for place in range(len(found["hidden"]))]
        h, k, l, length, spacing, intensity = found["point"]  # noqa: E741
        assert (h, k, l) != (0, 0, 0)
        assert length * spacing == pytest.approx(1.0, abs=1e-5)
        assert intensity > 0
        assert found["turned"] > 0.1  # by dragging
        assert not found["elsewhere"]
