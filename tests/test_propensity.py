"""Structure–property decoupling: prototypes against AFLOW's labels, rates with planted truth."""

import contextlib
import csv
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

import xtal
from ablation.catalogue import find_dataset
from ablation.propensity import (
    propensity,
    propensity_table,
    prototype_labels,
    read_held,
    surprise,
)
from cluster.errors import UserError
from training.proportion import proportion


@pytest.fixture(scope="module")
def catalogue(dataset):
    return find_dataset(dataset, "", {}, dataset).catalogue


@pytest.fixture(scope="module")
def labels(catalogue):
    return prototype_labels(catalogue, "primitive")


def aflow_of(catalogue):
    """AFLOW's label of each crystal's prototype, which the embedded source keeps in the group."""
    return [group.split(":")[0] for group in catalogue.groups.tolist()]


def amounts(formula):
    return sorted(int(number or 1) for number in re.findall(r"[A-Z](\d*)", formula))


def test_labels_are_those_of_aflow(catalogue, labels):
    assert len(labels) == 140
    for mine, aflow in zip(labels, aflow_of(catalogue), strict=True):
        formula, pearson, number = aflow.split("_")[:3]
        mine_formula, mine_pearson, mine_number = mine.split("_")
        assert mine_number == number
        # Lattices of one face centred are oA, oC or oS by the setting.
        assert mine_pearson.translate(str.maketrans("AS", "CC")) == pearson.replace("A", "C")
        if formula != "sigma":  # the σ phase has its name instead
            assert amounts(mine_formula) == amounts(formula)


def test_a_label_is_nearly_always_one_prototype(catalogue, labels):
    types = {}
    for mine, aflow in zip(labels, aflow_of(catalogue), strict=True):
        types.setdefault(mine, set()).add(aflow)
    mixed = [label for label, found in types.items() if len(found) > 1]
    assert len(mixed) <= 0.1 * len(types)
    # The test of the test: without atoms and space group, labels say far less.
    anonymous = {}
    for mine, aflow in zip(labels, aflow_of(catalogue), strict=True):
        anonymous.setdefault(mine.split("_")[0], set()).add(aflow)
    assert sum(len(found) > 1 for found in anonymous.values()) > 0.3 * len(anonymous)


def test_atoms_that_cannot_be_counted_are_a_question_mark(catalogue):
    assert all("?" in label for label in prototype_labels(catalogue, "as_given"))
    lost = replace(catalogue, forward=np.full(140, np.nan))
    assert all("?" in label for label in prototype_labels(lost, "primitive"))
    other = replace(catalogue, forward=catalogue.forward * 1.37)
    assert sum("?" in label for label in prototype_labels(other, "primitive")) > 70


def write_run(folder, model, ids, groups, labels, p, **changes):
    folder.mkdir(parents=True)
    document = {"task": "bulk_modulus", "classes": ["soft", "stiff"], "question": "stiff?"}
    (folder / "metrics.json").write_text(json.dumps(document | changes))
    (folder / "config.json").write_text(json.dumps({"training": {"model": model}}))
    columns = {"id": ids, "group": groups, "split": ["test"] * len(ids), "label": labels}
    pq.write_table(pa.table(columns | {"p0": 1 - p, "p1": p}), folder / "predictions.parquet")
    return folder


@pytest.fixture(scope="module")
def planted(catalogue, labels, tmp_path_factory):
    """The commonest prototype has the property; only the model of the structure knows."""
    folder = tmp_path_factory.mktemp("propensity")
    random = np.random.default_rng(0)
    names, counts = np.unique(labels, return_counts=True)
    host = str(names[counts.argmax()])
    of_host = np.array(labels) == host
    truth = np.where(of_host, 1, random.integers(2, size=len(labels)))
    knows = np.where(of_host, 0.95, 0.5) + 0.02 * random.normal(size=len(labels))
    guess = np.full(len(labels), 0.5)
    common = (catalogue.ids.tolist(), catalogue.groups.tolist(), truth)
    runs = [
        write_run(folder / "structure-0", "pointnet", *common, knows),
        write_run(folder / "structure-1", "pointnet", *common, knows + 0.01),
        write_run(folder / "formula", "composition_only", *common, guess),
    ]
    return host, runs, truth, knows


def test_a_planted_host_is_ranked_first_and_beyond_composition(planted, dataset, tmp_path):
    host, runs, _truth, knows = planted
    held, table = propensity(dataset, runs, tmp_path / "out", members=4)
    rows = table.to_pylist()
    assert rows[0]["prototype"] == host
    first = rows[0]
    assert first["observed"] == 1.0
    assert first["beyond_composition_only"] == pytest.approx(0.5)
    assert first["pointnet"] == pytest.approx(0.96, abs=0.03)
    assert first["p_composition_only"] == min(row["p_composition_only"] for row in rows)
    assert list(held.predicted) == ["pointnet", "composition_only"]
    np.testing.assert_allclose(held.predicted["pointnet"], knows + 0.005)  # the mean of two runs
    lows = [row["observed_low"] for row in rows]
    assert lows == sorted(lows, reverse=True)
    assert all(row["members"] >= 4 for row in rows)
    assert pq.read_table(tmp_path / "out" / "propensity.parquet").to_pylist() == rows
    with (tmp_path / "out" / "propensity.csv").open(newline="") as stream:
        assert [row["prototype"] for row in csv.DictReader(stream)] == [
            row["prototype"] for row in rows
        ]
    assert (tmp_path / "out" / "propensity.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert (tmp_path / "out" / "propensity.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_table_as_json(planted, dataset, tmp_path, monkeypatch, capsys):
    words = ["propensity", dataset, *planted[1], "--out", tmp_path / "out", "--members", 4]
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["xtal", *map(str, words), *more])
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            xtal.main()
        printed = capsys.readouterr().out
        if not more:
            assert "held-out crystals" in printed
            assert planted[0][:8] in printed
    rows = pq.read_table(tmp_path / "out" / "propensity.parquet").to_pylist()
    assert json.loads(printed) == rows


def test_rates_are_those_of_the_members(planted, catalogue, labels):
    _host, runs, truth, _ = planted
    table = propensity_table(read_held(runs), catalogue, labels, 3)
    for row in table.to_pylist():
        members = np.flatnonzero(np.array(labels) == row["prototype"])
        groups = catalogue.groups[members].tolist()
        share = proportion(truth[members], groups)
        found = (row["observed"], row["observed_low"], row["observed_high"])
        assert found == (share.value, share.low, share.high)
        assert (row["crystals"], row["groups"]) == (len(members), len(set(groups)))


def test_surprise_is_the_binomial_tail():
    assert surprise(9, np.full(10, 0.5)) == pytest.approx(binomtest(9, 10).pvalue)
    assert surprise(5, np.full(10, 0.5)) == 1.0
    assert surprise(2, np.array([0.1, 0.2])) == pytest.approx(2 * 0.1 * 0.2)
    assert surprise(0, np.array([0.1, 0.2])) == 1.0


def test_runs_that_do_not_fit_are_named(planted, dataset, tmp_path):
    _host, runs, _truth, _knows = planted
    held = read_held(runs)
    common = (held.ids, held.groups, held.labels, np.full(len(held.ids), 0.5))
    other = write_run(tmp_path / "a", "pointnet", *common, task="band_gap")
    with pytest.raises(UserError, match="is of task band_gap"):
        read_held([*runs, other])
    many = write_run(tmp_path / "b", "pointnet", *common, classes=["x", "y", "z"])
    with pytest.raises(UserError, match="with 3 classes"):
        read_held([many])
    flipped = (held.ids, held.groups, 1 - held.labels, np.full(len(held.ids), 0.5))
    with pytest.raises(UserError, match="another class"):
        read_held([*runs, write_run(tmp_path / "c", "pointnet", *flipped)])
    elsewhere = ([f"x{i}" for i in range(5)], ["g"] * 5, np.zeros(5, int), np.full(5, 0.5))
    with pytest.raises(UserError, match="no held-out crystal in common"):
        read_held([*runs, write_run(tmp_path / "d", "pointnet", *elsewhere)])
    with pytest.raises(UserError, match="is missing"):
        read_held([tmp_path])
    with pytest.raises(UserError, match="no prototype has 99 of"):
        propensity(dataset, runs, tmp_path / "out", members=99)
    with pytest.raises(UserError, match="was not found"):
        propensity(tmp_path / "nowhere", runs, tmp_path / "out")
