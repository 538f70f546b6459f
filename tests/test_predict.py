"""Prediction: features as in the training, nothing is lost, and strange crystals show."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import gemmi
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pymatgen.core import Lattice, Structure
from small import random_set, tiny
from tiny import SMALL, broken, command, document, run, write_lines

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization.config import FeaturizationConfig
from featurization.shards import Entry, read_shard
from featurization.sources import open_source
from training import card, domain, features
from training.dataset import cloud_set, load
from training.identity import differences
from training.predict import Predictor, predict
from training.train import train

PROTOTYPES = "prototypes:140"  # the source of the fixture `dataset`
ELASTIC = Path(__file__).parents[2] / "shared" / "data" / "mp_elastic.jsonl.gz"
SYSTEMS = 7


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """An ensemble of two with everything that a run has."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(dataset, folder, tiny(members=2, epochs=1))
    return folder


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """One model, without knowledge of what is strange."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(dataset, folder, tiny(epochs=1))
    (folder / domain.FILE).unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def predicted(trained):
    """The table of the source of `dataset`, by a process beside this one."""
    predict(trained, PROTOTYPES, trained / "a.parquet")
    return trained / "a.parquet"


@pytest.fixture
def here(monkeypatch):
    """Sources are featurized in this process, where that is not what is tested: it is faster."""
    monkeypatch.setattr(
        "training.predict.of_sources",
        lambda specs, config, processes: features.of_structures(specs, config),
    )


def rows_of(path):
    return pq.read_table(path).to_pylist()


def probabilities(row):
    return {name: value for name, value in row.items() if name.startswith("probability_")}


# --- the same features as those of the training --------------------------------------------------


def test_entries_in_memory_are_the_dataset(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    config = FeaturizationConfig(**manifest["config"])
    stored = load(dataset)
    items = list(features.of_structures([PROTOTYPES], config))
    assert [id for id, _ in items] == [e.id for e in by_source(dataset)]
    fresh = cloud_set([entry for _, entry in items], config)
    fresh = fresh.subset(np.argsort(fresh.ids))
    for name in ("offsets", "hkl_P3", "q_P3", "intensity_P", "multiplicity_P", "lattice_N33"):
        one, other = getattr(fresh, name), getattr(stored, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    for name in ("ids", "groups", "crystal_systems"):
        assert (getattr(fresh, name) == getattr(stored, name)).all()


def by_source(dataset):
    paths = sorted((dataset / "shards").glob("*.h5"))
    return sorted((e for path in paths for e in read_shard(path)), key=lambda e: e.source_index)


def test_predictions_of_the_source_are_those_of_the_evaluation(trained, predicted):
    by_id = {row["material_id"]: row for row in rows_of(predicted)}
    assert len(by_id) == 140
    evaluated = rows_of(trained / "predictions.parquet")
    assert len(evaluated) > 20
    classes = json.loads((trained / "metrics.json").read_text())["classes"]
    for row in evaluated:
        found = by_id[row["id"]]
        wanted = [row[f"p{c}"] for c in range(SYSTEMS)]
        assert list(probabilities(found).values()) == pytest.approx(wanted, abs=1e-6)
        assert found["prediction"] == classes[int(np.argmax(wanted))]


def test_that_comparison_finds_other_features(trained):
    """A broken variant: features of another radiation."""
    predictor = Predictor(trained)
    predictor.featurization = predictor.featurization.model_copy(update={"radiation": "neutron"})
    found = {row["material_id"]: probabilities(row) for row in predictor(PROTOTYPES)}
    wanted = {
        r["id"]: [r[f"p{c}"] for c in range(SYSTEMS)]
        for r in rows_of(trained / "predictions.parquet")
    }
    apart = [np.abs(np.array(list(found[i].values())) - p).max() for i, p in wanted.items()]
    assert max(apart) > 1e-4


def test_a_dataset_gives_what_its_source_gives(dataset, trained, predicted, tmp_path):
    counts = predict(trained, str(dataset), tmp_path / "b.parquet")
    assert counts["crystals"] == counts["predicted"] == 140
    assert pq.read_table(tmp_path / "b.parquet").equals(pq.read_table(predicted))


def test_processes_and_blocks_change_nothing(trained, predicted, tmp_path, monkeypatch):
    monkeypatch.setattr("training.predict._CRYSTALS", 33)
    monkeypatch.setattr(features, "_BLOCK", 9)
    done = []
    predict(trained, PROTOTYPES, tmp_path / "b.parquet", processes=2, progress=done.append)
    assert done == [33, 66, 99, 132, 140]
    one, other = rows_of(predicted), rows_of(tmp_path / "b.parquet")
    assert [row["material_id"] for row in one] == [row["material_id"] for row in other]
    for a, b in zip(one, other, strict=True):
        assert probabilities(a) == pytest.approx(probabilities(b), abs=1e-6)


def test_the_second_radiation_of_two(tmp_path):
    config = FeaturizationConfig(selection="miller:1", also_radiation=("neutron", "electron"))
    run("prototypes:9", tmp_path / "d", config)
    stored = load(tmp_path / "d", "electron")
    entries = [entry for _, entry in features.of_dataset(tmp_path / "d", config)]
    fresh = cloud_set(entries, config, "electron")
    fresh = fresh.subset(np.argsort(fresh.ids))
    assert torch.equal(fresh.intensity_P, stored.intensity_P)
    assert not torch.equal(fresh.intensity_P, load(tmp_path / "d", "neutron").intensity_P)
    with pytest.raises(UserError, match="no intensities of radiation xray_pymatgen"):
        cloud_set(entries, config, "xray_pymatgen")


# --- refusals ------------------------------------------------------------------------------------


def test_a_dataset_featurized_otherwise_is_refused_by_name(trained, tmp_path):
    run("prototypes:3", tmp_path / "d", FeaturizationConfig(selection="miller:1", b_iso=0.5))
    with pytest.raises(UserError) as refused:
        predict(trained, str(tmp_path / "d"), tmp_path / "a.csv")
    assert 'selection is "miller:1", the model\'s is "miller:2"' in str(refused.value)
    assert "b_iso is 0.5, the model's is 0.0" in str(refused.value)
    assert "cell is" not in str(refused.value)
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"shard_structures": 3, "max_seconds": 5.0, "max_points": 5000}, False),
        ({"absences": "keep"}, False),  # as auto in miller
        ({"absences": "drop"}, True),
        ({"also_radiation": ("neutron",)}, True),
        ({"symprec": 0.01}, True),
    ],
)
def test_only_settings_of_the_cloud_count(change, differs):
    assert bool(differences(SMALL, SMALL.model_copy(update=change))) is differs


def test_bad_requests_are_explained(trained, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [document("a")])
    before = source.read_bytes()
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    for out, source_, problem in [
        (tmp_path / "a.txt", str(source), "ends in none of"),
        (source, str(source), "is the source itself"),
        (folder, str(source), "is a folder"),
        (tmp_path / "b.csv", str(tmp_path / "absent"), "is no file, folder or known word"),
    ]:
        with pytest.raises(UserError, match=problem):
            predict(trained, source_, out)
    for suffix in (".csv", ".parquet", ".jsonl"):
        with pytest.raises(OSError, match="File name too long") as caught:
            predict(trained, str(source), tmp_path / f"{'n' * 240}{suffix}")
        assert caught.value.filename  # for the message
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "folder.csv"]
    with pytest.raises(UserError, match=r"no config\.json"):
        Predictor(tmp_path)


# --- nothing is lost -----------------------------------------------------------------------------


def test_what_cannot_be_read_is_a_row_in_its_place(trained, tmp_path, here):
    documents = [broken("x"), document("a"), broken("y"), document("b", a=5.0), broken("z")]
    source = write_lines(tmp_path / "s.jsonl", documents)
    with source.open("a") as stream:
        stream.write('{"material_id": "cut", "struct\n')
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        counts = predict(trained, str(source), tmp_path / name)
        assert counts["crystals"] == 6
        assert counts["predicted"] == 2
        assert counts["not predicted"] == 4
    rows = rows_of(tmp_path / "a.parquet")
    assert [row["material_id"] for row in rows] == ["x", "a", "y", "b", "z", "cut"]
    for row in rows:
        good = row["material_id"] in "ab"
        assert (row["reason"] is None) is good
        assert (row["prediction"] is not None) is good
        assert row["task"] == "crystal_system"
    assert "not JSON" in rows[-1]["reason"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == rows
    with (tmp_path / "a.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["material_id"] for row in table] == [row["material_id"] for row in rows]
    assert table[0]["prediction"] == table[0]["lower"] == ""
    assert float(table[1]["lower"]) == pytest.approx(rows[1]["lower"])


def test_rejects_of_a_dataset_are_rows_in_their_place(trained, tmp_path, here):
    documents = [document("a"), broken("x"), document("b", a=5.0), broken("y")]
    run(write_lines(tmp_path / "s.jsonl", documents), tmp_path / "d")
    predict(trained, str(tmp_path / "d"), tmp_path / "a.parquet")
    predict(trained, str(tmp_path / "s.jsonl"), tmp_path / "b.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert [row["material_id"] for row in rows] == ["a", "x", "b", "y"]
    assert rows == rows_of(tmp_path / "b.parquet")


def test_only_rejects(trained, tmp_path, here):
    source = write_lines(tmp_path / "s.jsonl", [broken("x")])
    assert predict(trained, str(source), tmp_path / "a.csv")["not predicted"] == 1


def test_a_dataset_whose_shards_interleave(tmp_path):
    """As several ranks leave it: each has every other block of the source."""
    folder = tmp_path / "d"
    run("prototypes:12", folder, SMALL.model_copy(update={"shard_structures": 6}))
    one, other = sorted((folder / "shards").glob("*.h5"))
    for path, indices in ((one, [0, 1, 4, 5, 8, 9]), (other, [2, 3, 6, 7, 10, 11])):
        with h5py.File(path, "r+") as file:
            file["source_index"][:] = indices
    manifest = json.loads((folder / "manifest.json").read_text())
    for row in manifest["shards"]:
        row["sha256"] = sha256_of(folder / row["file"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    entries = [entry for _, entry in features.of_dataset(folder, SMALL)]
    assert [entry.source_index for entry in entries] == list(range(12))
    stored = {e.id: e for path in (one, other) for e in read_shard(path)}
    for entry in entries:
        same = replace(stored[entry.id], formula="", labels={})
        assert entry.digest() == same.digest()


class _Bomb:
    """Ends whatever process unpacks it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_crystal_that_ends_its_process_is_an_item(tmp_path, monkeypatch):
    documents = [document(f"c-{i}", a=4.0 + 0.01 * i) for i in range(30)]
    source = write_lines(tmp_path / "s.jsonl", documents)
    real = features.open_source(str(source)).records

    class Source:
        def records(self):
            for record in real():
                yield replace(record, payload=_Bomb()) if record.index == 8 else record

    monkeypatch.setattr(features, "open_source", lambda *_, **__: Source())
    monkeypatch.setattr(features, "_BLOCK", 3)
    items = list(features.of_sources([str(source)], SMALL, 1))
    assert [id for id, _ in items] == [f"c-{i}" for i in range(30)]
    for number, (_, found) in enumerate(items):
        if number == 8:
            assert found == "guard: ended the process that featurized it"
        else:
            assert isinstance(found, Entry)


def test_a_source_is_read_no_further_than_needed(tmp_path, monkeypatch):
    """Memory is bounded because what waits is."""
    lines = [document(f"c-{i}", a=4.0 + 0.001 * i) for i in range(500)]
    source = open_source(str(write_lines(tmp_path / "s.jsonl", lines)))
    taken = 0

    class Source:
        def records(self):
            nonlocal taken
            for record in source.records():
                taken += 1
                yield record

    monkeypatch.setattr(features, "open_source", lambda *_, **__: Source())
    monkeypatch.setattr(features, "_BLOCK", 5)
    items = features.of_sources([str(tmp_path / "s.jsonl")], SMALL, 1)
    for _ in range(20):
        next(items)
    assert 20 <= taken <= 20 + 5 * 4
    items.close()


# --- crystals in memory --------------------------------------------------------------------------


def test_structures_crystals_and_paths(trained, tmp_path):
    salt = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    path = tmp_path / "salt.cif"
    salt.to(filename=str(path))
    source = write_lines(tmp_path / "s.jsonl", [document("a", a=4.1)])
    crystal = open_source(str(source)).parse(next(iter(open_source(str(source)).records())))
    rows = Predictor(trained)([salt, path, crystal, "nowhere.cif", 7, str(source)])
    ids = ["structure-0", "salt", "a", "nowhere.cif", "structure-4", "a"]
    assert [row["material_id"] for row in rows] == ids
    good = [row for row in rows if row["reason"] is None]
    assert len(good) == 4
    for row in good:
        assert probabilities(row) == pytest.approx(probabilities(rows[0]), abs=1e-5)
    assert "no file" in rows[3]["reason"]
    assert Predictor(trained)([]) == []


def test_dicts_and_what_stands_alone(trained, tmp_path):
    """A `Structure.as_dict()`, in memory or as a file, is the structure; so is a document."""
    salt = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    (tmp_path / "salt.json").write_text(json.dumps(salt.as_dict()))
    predictor = Predictor(trained)
    given = [salt, salt.as_dict(), document("a", a=4.1), tmp_path / "salt.json"]
    rows = predictor(given)
    assert [row["material_id"] for row in rows] == ["structure-0", "structure-1", "a", "salt-0"]
    for row, one in zip(rows, given, strict=True):
        assert row["reason"] is None
        assert probabilities(row) == pytest.approx(probabilities(rows[0]), abs=1e-5)
        [alone] = predictor(one)
        assert probabilities(alone) == pytest.approx(probabilities(row), abs=1e-5)
    [alone] = predictor(str(tmp_path / "salt.json"))
    assert probabilities(alone) == pytest.approx(probabilities(rows[0]), abs=1e-5)
    [(name, _)] = features.of_structures(str(tmp_path / "salt.json"), predictor.featurization)
    assert name == "salt-0"
    [row] = predictor({"lattice": {}, "sites": []})
    assert row["prediction"] is None
    assert "malformed structure dict" in row["reason"]


def test_an_invalid_crystal_is_a_reason(trained):
    crystal = open_source("prototypes:1").parse(next(iter(open_source("prototypes:1").records())))
    lattice = crystal.lattice.copy()
    lattice[0, 0] = np.nan
    [row] = Predictor(trained)([replace(crystal, lattice=lattice)])
    assert "must be finite" in row["reason"]
    assert row["prediction"] is None


def test_the_interval_holds_the_members_and_their_mean(trained, dataset):
    rows = Predictor(trained)([str(PROTOTYPES)])
    assert len(rows) == 140
    widths = []
    for row in rows:
        probability = row[f"probability_{row['prediction']}"]
        assert probability == max(probabilities(row).values())
        assert row["lower"] <= probability <= row["upper"]
        # Of two members, the mean is in the middle.
        assert probability == pytest.approx((row["lower"] + row["upper"]) / 2)
        widths.append(row["upper"] - row["lower"])
    assert max(widths) > 1e-3


def test_one_model_gives_no_interval(alone):
    with pytest.warns(UserWarning, match=r"has no domain\.safetensors"):
        [row] = Predictor(alone)(["prototypes:1"])
    assert row["prediction"] is not None
    assert row["lower"] is row["upper"] is row["out_of_distribution"] is None


def test_two_classes_have_one_probability(tmp_path):
    documents = [
        document(f"c-{i}", a=3.6 + 0.02 * i, elements=pair, k_vrh=40 + 3.0 * i)
        for i, pair in enumerate([("Cs", "Cl"), ("Na", "Br"), ("Mg", "O"), ("Li", "F")] * 8)
    ]
    for number, each in enumerate(documents):
        each["structure"]["sites"][0]["species"][0]["element"] = gemmi.Element(3 + number).name
    run(write_lines(tmp_path / "s.jsonl", documents), tmp_path / "d")
    train(tmp_path / "d", tmp_path / "run", tiny(task="bulk_modulus", epochs=1))
    predictor = Predictor(tmp_path / "run")
    assert [n for n in predictor.schema.names if n.startswith("probability")] == ["probability"]
    rows = predictor([tmp_path / "s.jsonl"])
    evaluated = {r["id"]: r["p1"] for r in rows_of(tmp_path / "run" / "predictions.parquet")}
    found = {row["material_id"]: row for row in rows}
    for id, p1 in evaluated.items():
        assert found[id]["probability"] == pytest.approx(p1, abs=1e-6)
        assert found[id]["prediction"] == ("stiff" if p1 > 0.5 else "soft")


def test_the_verb(trained, tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "s.jsonl", [document("a"), broken("x")])
    words = ["predict", trained, source, "--out", tmp_path / "a.csv", "--json"]
    assert command(monkeypatch, *words) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["crystals"], counts["predicted"]) == (2, 1)
    assert (tmp_path / "a.csv").read_text().count("\n") == 3
    assert command(monkeypatch, "predict", trained, "nowhere", "--out", tmp_path / "b.csv") == 2


def test_the_verb_takes_several_files(trained, dataset, tmp_path, monkeypatch, capsys):
    """Files and datasets in their order, the processes shared; an id of two crystals is said."""
    one = write_lines(tmp_path / "one.jsonl", [document("a"), document("b", a=5.0)])
    two = write_lines(tmp_path / "two.jsonl", [document("a", a=6.0)])
    salt = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    salt.to(filename=str(tmp_path / "salt.cif"))
    started = []
    pool = features._pool
    monkeypatch.setattr(features, "_pool", lambda *words: started.append(1) or pool(*words))
    out = tmp_path / "a.csv"
    words = ["predict", trained, one, two, tmp_path / "salt.cif", dataset, "--out", out, "--json"]
    assert command(monkeypatch, *words) == 0
    assert len(started) == 1
    said = capsys.readouterr()
    counts = json.loads(said.out)
    assert (counts["crystals"], counts["with the id of another"]) == (144, 1)
    assert "1 crystals have a material_id that another one before them has" in " ".join(
        said.err.split()
    )
    with out.open(newline="") as stream:
        ids = [row["material_id"] for row in csv.DictReader(stream)]
    assert ids[:4] == ["a", "b", "a", "salt"]
    before = out.read_bytes()
    words = ["predict", trained, one, tmp_path / "nowhere.cif", "--out", out]
    assert command(monkeypatch, *words) == 2
    assert out.read_bytes() == before


# --- out of distribution -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elastic():
    """4,000 elastic crystals of the Materials Project."""
    if not ELASTIC.exists():
        pytest.skip("needs ../shared/data, which is not here")
    source, config = open_source(str(ELASTIC)), FeaturizationConfig()
    crystals = [source.parse(r) for r in source.records() if r.index % 2 == 0]
    return crystals, config


def clouds_of(crystals, config):
    found = [entry for _, entry in features.of_structures(crystals, config)]
    return cloud_set([entry for entry in found if isinstance(entry, Entry)], config)


def scaled(crystals, volume):
    return [replace(c, lattice=c.lattice * volume ** (1 / 3)) for c in crystals]


def test_absurd_crystals_are_flagged_and_about_one_percent_of_others(elastic):
    crystals, config = elastic
    data = clouds_of(crystals, config)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data)))
    train, validation, test = order.split([len(data) - 1000, 500, 500])
    tensors = domain.fit(data, train, validation)
    sample = crystals[::40]
    assert domain.flags(clouds_of(scaled(sample, 10), config), tensors).mean() > 0.95
    assert domain.flags(clouds_of(scaled(sample, 1 / 3), config), tensors).mean() > 0.6
    helium = Structure(Lattice.cubic(4.2), ["He"] * 4, np.array(FCC))
    assert domain.flags(clouds_of([helium], config), tensors).all()
    # 5 of 500 are expected, with a spread of about 3 that the choice of the threshold adds to.
    assert domain.flags(data.subset(validation.numpy()), tensors).sum() <= 5
    assert domain.flags(data.subset(test.numpy()), tensors).sum() <= 15


FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]


def test_distances_do_not_depend_on_the_blocks_nor_on_rotation(monkeypatch):
    data = random_set(0, [9] * 60)
    rows = torch.arange(60)
    tensors = domain.fit(data, rows[:40], rows[40:])
    whole = domain.distances(data, tensors)
    monkeypatch.setattr(domain, "_BLOCK", 7)
    np.testing.assert_allclose(domain.distances(data, tensors), whole, rtol=1e-12)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    np.testing.assert_allclose(
        domain.distances(replace(data, q_P3=data.q_P3 @ turn), tensors), whole, atol=1e-3
    )
    shuffled = domain.distances(data.subset(rows.flip(0).numpy()), tensors)
    np.testing.assert_allclose(shuffled, whole[::-1], rtol=1e-12)


@pytest.mark.parametrize("lengths", [[0] * 12, [1] * 12, [0, 1, 40, 3] * 3])
@pytest.mark.parametrize("intensity", [0.0, 1.0, None])
def test_poor_clouds_have_finite_distances(lengths, intensity):
    data = random_set(1, lengths)
    if intensity is not None:
        data = replace(data, intensity_P=torch.full_like(data.intensity_P, intensity))
    rows = torch.arange(12)
    tensors = domain.fit(data, rows[:8], rows[8:])
    assert np.isfinite(domain.distances(data, tensors)).all()
    assert domain.flags(data, tensors).shape == (12,)


def test_what_is_kept_is_what_was_fitted(tmp_path):
    data = random_set(2, [9] * 30)
    rows = torch.arange(30)
    tensors = domain.write(tmp_path, data, rows[:20], rows[20:], {"content_hash": "0"})
    kept = domain.read(tmp_path, {"content_hash": "0"})
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)
    assert domain.read(tmp_path / "elsewhere", {}) is None
    with pytest.raises(UserError, match="content_hash = '0' there, '1' of the model"):
        domain.read(tmp_path, {"content_hash": "1"})


# --- the card ------------------------------------------------------------------------------------


def test_the_card_tells_what_the_files_hold(trained):
    text = card.write_card(trained)
    assert (trained / card.FILE).read_text(encoding="utf-8") == text
    metrics = json.loads((trained / "metrics.json").read_text())
    for metric in metrics["metrics"].values():
        assert f"{metric['value']:.3f}" in text
    assert "AFLOW prototypes: M. J. Mehl et al., Comput. Mater. Sci. 136, S1" in text
    assert "CC BY 4.0" not in text
    temperature = metrics["calibration"]["temperature"]
    assert f"A temperature of {temperature:.3f}, fitted on validation" in text
    assert "no prediction is scaled by it" in text
    assert "the mean of 2 models of different seeds; `lower` and `upper` are" in text
    assert metrics["class_counts"]
    assert all(f"\n| {side} |" in text for side in metrics["class_counts"])
    assert "miller:2" in text
    assert str(trained.parent) not in text
    assert json.loads((trained / "config.json").read_text())["dataset"] not in text


def test_metrics_and_card_tell_the_licence_that_the_manifest_has(
    trained, dataset, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"][0] |= {"kind": "jsonl", "path": "o.jsonl.gz", "source": "OPTIMADE"}
    manifest["sources"][0] |= {"provider": "OQMD", "licence": "CC-BY-NC-4.0"}
    path.write_text(json.dumps(manifest))
    words = ("evaluate", tmp_path / "run", "--dataset", tmp_path / "data")
    assert command(monkeypatch, *words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["attribution"] == "o.jsonl.gz (OPTIMADE, OQMD): licence CC-BY-NC-4.0."
    text = (tmp_path / "run" / card.FILE).read_text()
    assert "OPTIMADE, OQMD" in text
    assert "licence CC-BY-NC-4.0. Whoever passes on the model" in text


def test_the_card_tells_what_a_model_is_given(trained):
    recorded, metrics = (
        json.loads((trained / name).read_text()) for name in ("config.json", "metrics.json")
    )
    said = {}
    for model in ("harmonic", "solved", "composition_only", "lattice_only"):
        recorded["training"]["model"] = model
        said[model] = card.card(recorded, metrics).splitlines()[2]
    assert "neither elements nor a formula" in said["harmonic"]
    assert sum("neither" in line for line in said.values()) == 1
    assert "it knows the elements" in said["solved"]


def test_the_card_is_escaped(trained):
    recorded, metrics = (
        json.loads((trained / n).read_text()) for n in ("config.json", "metrics.json")
    )
    evil = "<script>alert(1)</script> [x](http://y) | # `z`\n# heading"
    recorded["provenance"]["commit"] = evil
    recorded["training"]["model"] = evil
    recorded["identity"]["content_hash"] = evil
    recorded["featurization"] = {evil: evil}
    metrics["question"] = metrics["task"] = evil
    metrics["metrics"] = {evil: {"value": None, "low": None, "high": None}}
    metrics["classes"] = [evil, "b"]
    metrics["confusion_matrix"] = [[1, 2], [3, 4]]
    metrics["class_counts"] = {evil: {evil: 1, "b": 2}}
    text = card.card(recorded, metrics)
    assert "alert" in text
    assert "<script" not in text.replace("\\<script", "")
    assert "](http" not in text.replace("\\](http", "").replace("\\]\\(http", "")
    assert "\n# heading" not in text
    columns = {line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"}
    assert columns <= {3, 4}


def test_the_card_tells_of_the_other_questions(trained):
    recorded, metrics = (
        json.loads((trained / n).read_text()) for n in ("config.json", "metrics.json")
    )
    names = ("structures", "metrics", "class_counts", "calibration")
    own = {name: metrics[name] for name in names} | {"question": "insulator (band gap > 0.001 eV)?"}
    own["metrics"] = {"auroc": {"value": 0.8125, "low": 0.5, "high": 0.75}}
    assert "It also answers" not in card.card(recorded, metrics)
    text = card.card(recorded, metrics | {"also": {"band_gap": own}})
    assert r"It also answers band\_gap: insulator \(band gap \> 0.001 eV\)? On" in text
    assert "| 0.812 | 0.500 … 0.750 |" in text
    assert text.count("fitted on validation") == 2


def test_a_run_without_results_has_no_card(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        card.write_card(tmp_path)
