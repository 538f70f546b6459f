"""A model's folder is bound together: what was changed or damaged in it is refused by name."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import tiny
from tiny import command, document, run, write_lines

from cluster.errors import RunFailed, UserError
from featurization.manifest import read_manifest
from training import checkpoint, domain, split, tasks
from training.config import TrainingConfig
from training.dataset import load
from training.ensemble import load_run
from training.evaluate import evaluate_run
from training.features import of_dataset
from training.identity import featurization_of, identity_of
from training.loop import MODEL
from training.predict import Predictor, predict
from training.split import Parts
from training.train import train

BULK = {"task": "bulk_modulus", "epochs": 1, "trees": 5}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a dataset of two moduli, a source, and runs of several models on them."""
    folder = tmp_path_factory.mktemp("made")
    documents = [
        document(f"c-{i}", a=3.6 + 0.02 * i, k_vrh=40 + 3.0 * i, g_vrh=10 + 2.0 * i)
        for i in range(32)
    ]
    for number, each in enumerate(documents):
        each["structure"]["sites"][0]["species"][0]["element"] = gemmi.Element(3 + number).name
    run(write_lines(folder / "s.jsonl", documents), folder / "d")
    for model in ("harmonic", "attention", "boosted"):
        train(folder / "d", folder / model, tiny(model=model, **BULK))
    train(folder / "d", folder / "blend", tiny(model="blend", **BULK))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A function: the name of a run → a copy of it."""
    return lambda name: shutil.copytree(made / name, tmp_path / name)


def rewritten(folder, *path, value):
    """Set a value of config.json."""
    said = json.loads((folder / "config.json").read_text())
    inner = said
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(said))


def refused(folder, message):
    """Both who predict and who evaluate are told; the metrics that are there stay."""
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(UserError, match=message):
        Predictor(folder)
    with pytest.raises(UserError, match=message):
        evaluate_run(folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_a_folder_that_nobody_touched_is_read(made, copy, tmp_path):
    for name in ("harmonic", "boosted", "blend"):
        counts = predict(copy(name), str(made / "s.jsonl"), tmp_path / "a.csv")
        assert counts["predicted"] == 32


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("training", "task"), "shear_modulus", "task = 'bulk_modulus' there, 'shear_modulus'"),
        (("training", "threshold"), 10.0, "threshold = None there, 10.0 asked for"),
        (("training", "seed"), 5, "seed = 0 there, 5 asked for"),
        (("training", "pose"), "axis", "pose = None there, 'axis' asked for"),
        (("training", "test_fraction"), 0.3, "test_fraction = 0.2 there, 0.3 asked for"),
        (("featurization", "selection"), "miller:1", "featurization.selection = 'miller:1'"),
        (("featurization", "radiation"), "neutron", "featurization.radiation = 'neutron'"),
        (("identity", "split"), "0", "split = '[0-9a-f]{64}' there, '0' asked for"),
        (("identity", "content_hash"), "0", "content_hash = '.*' there, '0' asked for"),
        (("identity", "init"), "0", "init = None there, '0' asked for"),
    ],
)
def test_a_changed_config_is_refused(copy, path, value, message):
    folder = copy("harmonic")
    rewritten(folder, *path, value=value)
    refused(folder, message)


@pytest.mark.parametrize("other", ["attention", "boosted"])
def test_weights_of_another_model_are_refused(made, copy, other):
    folder = copy("harmonic")
    shutil.copy(made / other / MODEL, folder / MODEL)
    refused(folder, f"model = '{other}' there, 'harmonic' asked for")


def test_members_in_each_others_place_are_refused(copy):
    folder = copy("blend")
    (folder / "member-0").rename(folder / "other")
    (folder / "member-1").rename(folder / "member-0")
    (folder / "other").rename(folder / "member-1")
    refused(folder, "model = 'harmonic' there, 'boosted' asked for")


@pytest.mark.parametrize("name", ["harmonic", "boosted"])
def test_damaged_weights_are_refused(made, copy, name, monkeypatch, capsys, tmp_path):
    folder = copy(name)
    whole = (folder / MODEL).read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole) - 64, 20).tolist():
        broken = whole[:place] + random.bytes(64) + whole[place + 64 :]
        (folder / MODEL).write_bytes(broken)
        with pytest.raises(UserError, match=r"is damaged|is no checkpoint|older layout"):
            Predictor(folder)
    words = ["predict", folder, made / "s.jsonl", "--out", tmp_path / "a.csv"]
    assert command(monkeypatch, *words) == 2
    assert "remedy:" in capsys.readouterr().err
    assert command(monkeypatch, "evaluate", folder) == 2
    assert not (tmp_path / "a.csv").exists()


def test_a_part_of_an_ensemble_is_not_the_ensemble(made, tmp_path):
    train(made / "d", tmp_path / "run", tiny(model="blend", members=2, **BULK))
    rewritten(tmp_path / "run", "training", "members", value=1)
    refused(tmp_path / "run", "members = 1, but there is .*member-2")


def test_a_damaged_config_is_refused(copy):
    folder = copy("harmonic")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-9])
    refused(folder, "config.json is damaged")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "config.json is damaged")
    for name in ("featurization", "training", "identity"):
        (folder / "config.json").write_text(json.dumps(json.loads(text) | {name: [1]}))
        refused(folder, rf"config.json is damaged: {name} = \[1\]")
    (folder / "config.json").write_text(json.dumps(json.loads(text) | {"dataset": 5}))
    refused(folder, "config.json is damaged: dataset = 5, not a path")


def test_a_folder_in_place_of_weights_is_refused(copy):
    folder = copy("harmonic")
    (folder / MODEL).unlink()
    (folder / MODEL).mkdir()
    refused(folder, "is a folder")


def test_an_older_layout_is_refused_by_that_name(copy, tmp_path):
    folder = copy("harmonic")
    tensors, state = checkpoint.read(folder / MODEL)
    save_file(tensors, folder / MODEL, {"state": json.dumps(state)})
    refused(folder, "is of an older layout, without a checksum")
    said = json.loads((folder / "config.json").read_text())
    del said["identity"]
    (folder / "config.json").write_text(json.dumps(said))
    refused(folder, "is of an older layout: it has no identity")


def test_a_damaged_or_foreign_domain_is_refused(made, copy, tmp_path, capsys, monkeypatch):
    folder = copy("harmonic")
    content = bytearray((folder / domain.FILE).read_bytes())
    content[-5] ^= 1
    (folder / domain.FILE).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        Predictor(folder)
    train(made / "d", tmp_path / "other", tiny(model="boosted", **BULK | {"task": "shear_modulus"}))
    shutil.copy(tmp_path / "other" / domain.FILE, folder / domain.FILE)
    with pytest.raises(UserError, match=r"is of another training: questions\.bulk_modulus = None"):
        Predictor(folder)
    (folder / domain.FILE).unlink()
    words = ["predict", folder, made / "s.jsonl", "--out", tmp_path / "a.csv"]
    assert command(monkeypatch, *words) == 0
    assert "warning" in (said := capsys.readouterr().err)
    assert "out_of_distribution stays empty" in " ".join(said.split())


def test_another_version_of_a_question_is_refused(copy, monkeypatch):
    changed = replace(tasks.TASKS["bulk_modulus"], threshold=100.0)
    folder = copy("harmonic")
    monkeypatch.setitem(tasks.TASKS, "bulk_modulus", changed)
    refused(folder, r"questions.bulk_modulus.threshold = 85.0 there, 100.0 asked for")


def test_another_version_of_the_split_is_refused(copy, monkeypatch):
    folder = copy("harmonic")
    monkeypatch.setattr(split, "_SALT", b"crystal-genome split 3:")
    with pytest.raises(UserError, match="trained with another split of the same crystals"):
        evaluate_run(folder)


def test_the_folder_tells_thresholds_classes_and_split(made):
    said = json.loads((made / "harmonic" / "config.json").read_text())
    question = said["identity"]["questions"]["bulk_modulus"]
    assert question["threshold"] == 85.0
    assert question["classes"] == ["soft", "stiff"]
    # The split by its definition, from the table of predictions and the ids alone.
    data, config = load(made / "d"), TrainingConfig(**said["training"])
    sides = split.split_of(list(data.groups), config.validation_fraction, config.test_fraction)
    lines = sorted(f"{id}\0{side}\n" for id, side in zip(data.ids, sides, strict=True))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert said["identity"]["split"] == digest
    parts = Parts.of(data, config)
    assert identity_of(read_manifest(made / "d"), data.ids, parts, config) == said["identity"]
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = data.subset(order)
    assert Parts.of(shuffled, config).digest(shuffled.ids) == digest


def test_an_answer_that_is_no_number_is_a_row_with_a_reason(made, copy, tmp_path):
    """Weights whose checksum is right, and which are not."""
    folder = copy("harmonic")
    tensors, state = checkpoint.read(folder / MODEL)
    name = next(n for n in tensors if n.endswith("weight"))
    checkpoint.save(folder / MODEL, tensors | {name: tensors[name] * torch.nan}, state)
    counts = predict(folder, str(made / "s.jsonl"), tmp_path / "a.jsonl")
    assert (counts["predicted"], counts["not predicted"]) == (0, 32)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(row["reason"] == "model: its answer is not a finite number" for row in rows)
    assert all(row["prediction"] is None and row["probability"] is None for row in rows)
    with pytest.raises(RunFailed, match="are not finite numbers"):
        evaluate_run(folder)


def test_a_run_to_begin_with_is_compared_too(made, copy, tmp_path):
    folder = copy("harmonic")
    rewritten(folder, "training", "task", value="shear_modulus")
    config = tiny(model="harmonic", init=str(folder), **BULK)
    with pytest.raises(UserError, match="task = 'bulk_modulus' there, 'shear_modulus' asked for"):
        train(made / "d", tmp_path / "new", config)


# --- the dataset that is predicted ---------------------------------------------------------------


def damage_points(shard):
    content = bytearray(shard.read_bytes())
    entries = load(shard.parents[1])
    place = content.index(entries.q_P3.numpy()[:9].tobytes()[:64])
    content[place : place + 360] = np.ones(90, dtype=np.float32).tobytes()
    shard.write_bytes(content)


def damage_structure(shard):
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = np.random.default_rng(0).bytes(4000)
    shard.write_bytes(content[: max(len(content), middle + 4000)])


def cut(shard):
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [damage_points, damage_structure, cut, lambda s: s.unlink()])
def test_a_damaged_dataset_is_not_predicted(made, tmp_path, harm):
    folder = shutil.copytree(made / "d", tmp_path / "d")
    assert predict(made / "boosted", str(folder), tmp_path / "a.csv")["predicted"] == 32
    (tmp_path / "a.csv").unlink()
    harm(next((folder / "shards").glob("*.h5")))
    remedy = re.escape(f"xtal verify {folder} --repair")
    with pytest.raises(UserError, match=f"is (missing or )?damaged.*\n.*{remedy}"):
        predict(made / "boosted", str(folder), tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_the_settings_of_a_run_are_those_of_its_dataset(made):
    _, said = load_run(made / "boosted")
    config = featurization_of(made / "boosted", said)
    assert [id for id, _ in of_dataset(made / "d", config)] == [f"c-{i}" for i in range(32)]
