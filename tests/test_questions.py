"""Several questions at once, weights of another run, blends; and what a model must not be told."""

import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from typing import ClassVar

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small import random_set, tiny
from tiny import document, run, write_lines

from ablation.grid import GridConfig
from ablation.run import run_grid
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest
from training import objective
from training.config import TrainingConfig
from training.dataset import CloudSet, ends_of, load
from training.ensemble import fit_members, load_members, load_run
from training.evaluate import evaluate_run
from training.identity import deciding, signature
from training.models.build import DESCRIPTIONS, new_network
from training.predict import predict
from training.split import Parts
from training.tasks import UNKNOWN, answerable
from training.train import questions_of, train

IDENTITY = {"content_hash": "0" * 64}
STRUCTURE_ONLY = [
    *("pointnet", "harmonic", "attention", "powder_cnn", "boosted", "solved", "powder", "blend")
]
POINTS_ONLY = {"q_P3", "intensity_P", "multiplicity_P", "offsets"}


@pytest.fixture(scope="module")
def labelled(clouds):
    """Crystals of which a third has a bulk modulus, and another third, in part, a gap."""
    size = np.bincount(clouds.crystal_P.numpy(), clouds.intensity_P.numpy())
    random = np.random.default_rng(0).uniform(size=len(clouds))
    bulk = np.where(random < 0.6, 85 + 40 * np.sign(size - np.median(size)), np.nan)
    gap = np.where(random > 0.3, (clouds.crystal_systems == "cubic") * 1.0, np.nan)
    return replace(clouds, labels={"bulk_modulus": bulk, "band_gap": gap})


def several(**changes):
    return tiny(**({"task": "bulk_modulus", "also": ["band_gap", "crystal_system"]} | changes))


def test_losses_are_of_what_is_known(labelled):
    """Oracle: each crystal and question by itself."""
    config = several()
    parts = Parts.of(labelled, config)
    assert set(parts.others) == {"band_gap", "crystal_system"}
    rows = torch.arange(len(labelled))
    logits = torch.randn(len(rows), 2 + 2 + 7, generator=torch.Generator().manual_seed(0))
    logits = logits.double().requires_grad_()
    total = objective.loss(logits, parts, config, rows)
    targets = [parts.target_N, *(own.target_N for own in parts.others.values())]
    expected = 0.0
    for target_N, columns in zip(targets, (slice(0, 2), slice(2, 4), slice(4, 11)), strict=True):
        for row, target in enumerate(target_N.tolist()):
            if target != UNKNOWN:
                expected -= float(logits[row, columns].log_softmax(0)[target])
    assert total.item() == pytest.approx(expected)
    total.backward()
    unknown = parts.target_N == UNKNOWN
    assert unknown.any()
    assert logits.grad[unknown, :2].abs().max() == 0
    learned = set(parts.learned.tolist())
    assert learned == set(parts.others["crystal_system"].rows["train"].tolist())
    for own in (parts, *parts.others.values()):
        assert not learned & set(own.rows["test"].tolist())


def test_one_network_answers_several_questions(labelled, tmp_path):
    config = several(model="harmonic", epochs=6, members=2)
    fit_members(tmp_path, labelled, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    for task, classes in (("bulk_modulus", 2), ("band_gap", 2), ("crystal_system", 7)):
        shares = trained.probabilities(labelled, task=task)
        assert shares.shape == (2, len(labelled), classes)
        assert np.allclose(shares.sum(axis=-1), 1)
    rows = list(csv.DictReader((tmp_path / "member-0" / "history.csv").open()))
    assert {"validation_auroc", "validation_auroc_band_gap"} < set(rows[0])
    # Crystal systems can be learned from so few crystals, whoever else is asked.
    right = trained.probabilities(labelled, task="crystal_system").mean(axis=0).argmax(axis=1)
    target = Parts.of(labelled, config).others["crystal_system"].target_N.numpy()
    assert (right == target).mean() > 0.5


def test_questions_are_asked_once_and_of_networks():
    with pytest.raises(ValueError, match="each question once"):
        several(also=["bulk_modulus"])
    with pytest.raises(ValueError, match="boosted answers one question"):
        several(model="boosted")
    with pytest.raises(ValueError, match="no weights to begin with"):
        tiny(model="boosted", init="run")
    with pytest.raises(ValueError, match="blend trains in one process"):
        tiny(model="blend", workers=2)
    assert answerable(["density", "band_gap"]) == ["band_gap", "crystal_system"]


def test_a_run_begins_with_the_weights_of_another(clouds, labelled, tmp_path):
    first = tiny(model="pointnet", epochs=1)
    fit_members(tmp_path / "first", clouds, first, identity=IDENTITY)
    recorded = {
        "dataset": "",
        "featurization": {},
        "training": first.model_dump(mode="json"),
        "identity": signature(first, IDENTITY)["identity"],
    }
    (tmp_path / "first" / "config.json").write_text(json.dumps(recorded))
    init = {"model": "pointnet", "init": str(tmp_path / "first")}
    theirs = load_members(tmp_path / "first", first).members[0].state_dict()

    def begun(config):
        return new_network(config, labelled, Parts.of(labelled, config).rows["train"]).state_dict()

    same = begun(tiny(**init))
    assert all(torch.equal(same[name], theirs[name]) for name in theirs)
    other = begun(tiny(task="bulk_modulus", **init))
    answering = {name for name in theirs if other[name].shape != theirs[name].shape}
    assert answering == {"head.3.weight", "head.3.bias"}
    assert all(torch.equal(other[n], theirs[n]) for n in theirs if n not in answering)
    for changes, message in (
        ({"width": 32}, "width is 16 there, 32 here"),
        ({"model": "harmonic"}, "model is 'pointnet' there, 'harmonic' here"),
        ({"test_fraction": 0.3}, "its training saw crystals that are for test here"),
        ({"validation_fraction": 0.3}, "its training saw crystals that are for validation here"),
        ({"init": str(tmp_path)}, "is no training run"),
    ):
        with pytest.raises(UserError, match=message):
            begun(tiny(**(init | changes)))


def test_a_formula_is_not_learned_before_it_is_tested(dataset, tmp_path):
    """Groups of prototypes are formulas with a label, those of documents formulas alone."""

    def featurized(name, pairs):
        documents = [
            document(f"{name}-{pair}-{a}", a, pair, bulk_modulus={"vrh": bulk})
            for pair in pairs
            for a, bulk in ((4.0, 60.0), (5.0, 110.0))
        ]
        run(write_lines(tmp_path / f"{name}.jsonl", documents), tmp_path / name)
        return tmp_path / name

    with h5py.File(dataset / "dataset.h5") as file:
        formulas = set(file["formula"].asstr())
    known = [re.fullmatch("([A-Z][a-z]?)([A-Z][a-z]?)", each) for each in sorted(formulas)]
    same = featurized("same", [pair.groups() for pair in known if pair])
    other = featurized("other", [(m, x) for m in ("Rb", "Cs", "K") for x in ("Cl", "Br", "I", "F")])
    first = shutil.copytree(dataset, tmp_path / "first")
    train(first, tmp_path / "run", tiny(epochs=1))

    def begun(name):
        return tiny(task="bulk_modulus", epochs=1, init=str(tmp_path / name))

    with pytest.raises(UserError, match=r"saw \d+ formulas that are for validation or test here"):
        train(same, tmp_path / "leaky", begun("run"))
    assert not (tmp_path / "leaky").exists()
    grid = GridConfig(dataset=str(same), arms=[{"name": "none"}], seeds=(0,), training=begun("run"))
    with pytest.raises(UserError, match=r"saw \d+ formulas"):
        run_grid(grid, tmp_path / "grid")
    train(first, tmp_path / "itself", tiny(epochs=1, init=str(tmp_path / "run")))  # the same split
    train(other, tmp_path / "new", begun("run"))
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())
    assert recorded["identity"]["init"] == hashlib.sha256(weights).hexdigest()
    with pytest.raises(UserError, match=r"/run: its training saw \d+ formulas"):
        train(same, tmp_path / "leaky", begun("new"))
    (first / "manifest.json").unlink()
    with pytest.raises(UserError, match="is no finished dataset"):
        train(other, tmp_path / "unknown", begun("run"))


def test_a_blend_is_the_mean_of_its_kinds(dataset, tmp_path):
    run = tmp_path / "run"
    train(dataset, run, tiny(model="blend", trees=20, epochs=1, members=2))
    trained, _ = load_run(run)
    assert [state["config"]["model"] for state in trained.states] == ["boosted", "harmonic"] * 2
    assert [state["config"]["seed"] for state in trained.states] == [0, 0, 1, 1]
    predict(run, str(dataset), tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert all(row["prediction"] and row["lower"] <= row["upper"] for row in rows)
    assert (
        "mean of 4 models, half of them trees; `lower` and" in (run / "MODEL_CARD.md").read_text()
    )


def test_all_questions_are_those_of_the_labels_that_a_dataset_has(dataset, tmp_path):
    assert questions_of(dataset) == ["crystal_system"]
    lines = [document(f"m{i}", 4 + i / 9, band_gap=i / 10) for i in range(3)]
    lines += [document("n", 5, energy_above_hull=0.1)]
    run(write_lines(tmp_path / "s.jsonl", lines), tmp_path / "labelled")
    assert questions_of(tmp_path / "labelled") == ["band_gap", "stability", "crystal_system"]


def test_each_question_has_its_row(dataset, labelled, tmp_path):
    run, config = tmp_path / "run", several(model="pointnet", epochs=1)
    made = read_manifest(dataset)["config"]
    identity = IDENTITY | {"featurization": deciding(FeaturizationConfig(**made))}
    fit_members(run, labelled, config, identity=identity)
    recorded = {
        "dataset": str(dataset),
        "training": config.model_dump(mode="json"),
        "featurization": made,
        "identity": signature(config, identity)["identity"],
    }
    (run / "config.json").write_text(json.dumps(recorded))
    counts = predict(run, str(dataset), tmp_path / "all.csv", task="all")
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert len(rows) == 3 * counts["crystals"] == 3 * len(labelled)
    order = ["bulk_modulus", "band_gap", "crystal_system"]
    assert [row["task"] for row in rows[:6]] == order * 2
    for row in rows:
        system = row["task"] == "crystal_system"
        assert (row["probability"] == "") == system
        assert (row["probability_cubic"] != "") == system
        assert row["prediction"]
    predict(run, str(dataset), tmp_path / "gap.csv", task="band_gap")
    gap = list(csv.DictReader((tmp_path / "gap.csv").open()))
    assert gap == [{name: row[name] for name in gap[0]} for row in rows[1::3]]
    predict(run, str(dataset), tmp_path / "first.csv")
    first = list(csv.DictReader((tmp_path / "first.csv").open()))
    assert [row["task"] for row in first] == ["bulk_modulus"] * len(labelled)
    with pytest.raises(UserError, match="was not asked about stability"):
        predict(run, str(dataset), tmp_path / "no.csv", task="stability")


def test_each_question_is_evaluated_as_if_it_were_the_only_one(tmp_path):
    pairs = product(("Li", "Na", "K", "Rb", "Cs", "Mg", "Ca", "Sr", "Ba", "Zn"), "FOSNPC")
    lines = [
        document(f"m{n}", 3.5 + n / 40, pair, band_gap=n % 3 / 2, bulk_modulus={"vrh": 60.0 + n})
        for n, pair in enumerate(pairs)
    ]
    run(write_lines(tmp_path / "s.jsonl", lines), tmp_path / "data")
    data = load(tmp_path / "data")
    config = {"model": "harmonic", "epochs": 1, "members": 2, "task": "bulk_modulus"}
    train(tmp_path / "data", tmp_path / "both", tiny(**config, also=["band_gap"]))
    train(tmp_path / "data", tmp_path / "gap", tiny(**(config | {"task": "band_gap"})))
    answer = json.loads((tmp_path / "both" / "metrics.json").read_text())
    alone = json.loads((tmp_path / "gap" / "metrics.json").read_text())
    gap = answer["also"]["band_gap"]
    assert set(alone) - set(gap) == {"attribution", "best_epoch", "provenance"}
    for name in ("calibration", "by_class", "by_crystal_system", "doubt", "confusion_matrix"):
        assert set(gap[name]) == set(alone[name]) if isinstance(gap[name], dict) else gap[name]
    table = pq.read_table(tmp_path / "both" / "predictions-band_gap.parquet").to_pydict()
    trained, _ = load_run(tmp_path / "both")
    expected = dict(
        zip(data.ids, trained.probabilities(data, task="band_gap").mean(axis=0)[:, 1], strict=True)
    )
    gaps = dict(zip(data.ids, data.labels["band_gap"], strict=True))
    assert set(table["split"]) == {"validation", "test"}
    for id, p1, label in zip(table["id"], table["p1"], table["label"], strict=True):
        assert p1 == pytest.approx(expected[id], abs=1e-6)
        assert label == (gaps[id] > 0.001)
    itself = evaluate_run(tmp_path / "both", task="band_gap", against=tmp_path / "both")
    pairs = itself["also"]["band_gap"]["against"]["bootstrap"]
    assert all(pair["difference"]["value"] == 0 for pair in pairs.values())
    assert "against" not in itself
    against = evaluate_run(
        tmp_path / "both", task="band_gap", against=tmp_path / "gap", leaks=True
    )["also"]["band_gap"]
    pair = against["against"]["bootstrap"]["auroc"]
    assert pair["reference"] == pytest.approx(alone["metrics"]["auroc"]["value"])
    assert pair["value"] == pytest.approx(gap["metrics"]["auroc"]["value"])
    assert against["leakage"]["by_novelty"]
    assert (tmp_path / "both" / "leakage-band_gap.parquet").exists()
    back = evaluate_run(tmp_path / "gap", against=tmp_path / "both")["against"]["bootstrap"]
    assert back["auroc"]["value"] == pytest.approx(pair["reference"])
    with pytest.raises(UserError, match="asks another question"):
        evaluate_run(tmp_path / "both", against=tmp_path / "gap")
    with pytest.raises(UserError, match=r"--task stability: .* was not asked about it"):
        evaluate_run(tmp_path / "gap", task="stability")
    said = (tmp_path / "both" / "MODEL_CARD.md").read_text()
    assert said.count("fitted on validation") == 2


class Spied(CloudSet):
    """Notes what is read of the columns of a crystal."""

    __slots__ = ()
    seen: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        if name in CloudSet.__dataclass_fields__:
            Spied.seen.add(name)
        return super().__getattribute__(name)

    def subset(self, rows):
        """What is only copied is not read."""
        before = set(Spied.seen)
        part = super().subset(rows)
        Spied.seen &= before
        return spied(part)


def spied(data):
    return Spied(**{name: getattr(data, name) for name in CloudSet.__dataclass_fields__})


def disguised(data):
    """The same clouds under other names, formulas, symmetries, labels, indices and cells."""
    number = len(data)
    return replace(
        data,
        ids=np.array([f"x{i}" for i in range(number)]),
        groups=np.array(["NaCl"] * number),
        crystal_systems=np.array(["monoclinic"] * number),
        labels={name: -values for name, values in data.labels.items()},
        hkl_P3=data.hkl_P3 * 0,
        lattice_N33=data.lattice_N33 * 0 + torch.eye(3),
    )


@pytest.mark.parametrize("model", STRUCTURE_ONLY)
def test_a_model_of_structure_sees_points_alone(model, tmp_path):
    """Logits are equal to the bit whatever the formula, the atoms, the id, the cell are said to be.

    The model was trained with formulas and ids as they are, so that it could have learned them.
    """
    data = random_set(0, [int(n) for n in np.random.default_rng(0).integers(5, 40, 60)])
    config = tiny(task="bulk_modulus", model=model, epochs=1, trees=5)
    fit_members(tmp_path, data, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    assert np.array_equal(trained.logits(data), trained.logits(disguised(data)))


def stored_whole(data, seed):
    """The same clouds with both mates of each pair stored, in another order."""
    points = torch.repeat_interleave(data.multiplicity_P)
    second = torch.diff(points, prepend=torch.tensor([-1])) == 0
    generator = torch.Generator().manual_seed(seed)
    order = torch.argsort(data.crystal_P[points] + torch.rand(len(points), generator=generator))
    points, sign = points[order], torch.where(second[order], -1.0, 1.0)[:, None]
    crystals = torch.bincount(data.crystal_P[points], minlength=len(data))
    return replace(
        data,
        offsets=ends_of(crystals),
        hkl_P3=data.hkl_P3[points] * sign.short(),
        q_P3=data.q_P3[points] * sign,
        intensity_P=data.intensity_P[points],
        multiplicity_P=torch.ones_like(points),
    )


@pytest.mark.parametrize("model", STRUCTURE_ONLY)
def test_half_a_cloud_says_what_all_of_it_says(model, tmp_path):
    """By Friedel's law; of 40 to 99 pairs, `attention` has to leave some out."""
    data = random_set(0, [int(n) for n in np.random.default_rng(0).integers(40, 99, 60)])
    config = tiny(task="bulk_modulus", model=model, epochs=1, trees=40)
    fit_members(tmp_path, data, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    assert np.abs(trained.logits(data) - trained.logits(stored_whole(data, 1))).max() < 1e-4
    # Rounding does not part mates, and a point whose mate is not there stays.
    whole = stored_whole(data, 2)
    jitter = 1 + 1e-7 * torch.randn(len(whole.q_P3), 1, generator=torch.Generator().manual_seed(0))
    jittered = replace(whole, q_P3=whole.q_P3 * jitter)
    assert np.abs(trained.logits(data) - trained.logits(jittered)).max() < 1e-3


def test_the_formula_is_noticed_where_it_is_told():
    """The test above can fail: here is a model that reads the formula, and one that reads cells."""
    data = random_set(0, [20] * 6)
    data = replace(data, groups=np.array(["Si", "GaAs", "MgO", "Fe", "Al2O3", "TiO2"]))
    for model in ("composition_only", "lattice_only"):
        describe = DESCRIPTIONS[model]
        assert not np.array_equal(describe(data), describe(disguised(data)), equal_nan=True)


@pytest.mark.parametrize("model", [model for model in STRUCTURE_ONLY[1:] if model != "blend"])
def test_nothing_but_points_is_read(model):
    data = random_set(0, [20] * 6)
    watched = spied(data)
    config = TrainingConfig(model=model, width=16)
    if model in DESCRIPTIONS:
        Spied.seen.clear()
        DESCRIPTIONS[model](watched)
    else:
        network = new_network(config, data, torch.arange(6))
        Spied.seen.clear()
        network.prepare(watched)
    # `ids` for the number of crystals alone.
    assert Spied.seen - {"ids"} == POINTS_ONLY
