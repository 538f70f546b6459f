"""Trees on invariants, ensembles of models, and what a run folder holds of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from crystals import real_crystals
from small import random_set, tiny

from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from featurization.worker import entry_of
from training import checkpoint, domain
from training.config import FEATURES, TrainingConfig
from training.dataset import cloud_set, load
from training.ensemble import fit_members, load_members, load_run
from training.evaluate import evaluate_run
from training.loop import MODEL
from training.models import descriptors
from training.models.boosted import Boosted
from training.models.descriptors import invariants
from training.models.steady import BITS, steady
from training.rotations import random_rotations
from training.split import Parts
from training.train import train

IDENTITY = {"content_hash": "0" * 64}
SIZES = [60, 1, 3, 17, 40, 0]


def turned(data, seed, *, reflected=False, dtype=torch.float32):
    """The clouds, each in another orientation, the points of each in another order."""
    generator = torch.Generator().manual_seed(seed)
    rotation_N33 = random_rotations(len(data), generator) * (-1.0 if reflected else 1.0)
    if reflected:
        rotation_N33 = rotation_N33 @ torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    by_key = torch.rand(len(data.q_P3), generator=generator).argsort()
    order = by_key[data.crystal_P[by_key].argsort(stable=True)]
    q = torch.einsum("pij,pj->pi", rotation_N33[data.crystal_P].to(dtype), data.q_P3.to(dtype))
    return replace(
        data,
        q_P3=q[order],
        intensity_P=data.intensity_P[order],
        multiplicity_P=data.multiplicity_P[order],
    )


@pytest.mark.parametrize("reflected", [False, True])
def test_invariants_do_not_change_with_orientation_or_order(reflected):
    data = random_set(1, SIZES)
    one, other = invariants(data), invariants(turned(data, 2, reflected=reflected))
    assert np.isfinite(one).all()
    assert (np.abs(one - other).max(axis=0) <= 1e-3 * np.ptp(one, axis=0)).all()
    # The smallest singular values stand on the floor in both.
    assert np.abs(one - other)[:, -27:].max() < 0.05


def test_a_coordinate_among_the_invariants_is_found_out():
    data = random_set(1, SIZES)

    def broken(data):
        q = data.q_P3.numpy() * data.intensity_P.numpy()[:, None]
        sums = np.stack([np.bincount(data.crystal_P, q[:, a], len(data)) for a in range(3)], 1)
        return np.concatenate([invariants(data), sums], axis=1)

    change = np.abs(broken(data) - broken(turned(data, 2)))
    assert change.max() > 0.1


def test_the_stored_half_may_be_either():
    data = random_set(3, SIZES)
    sign = torch.where(torch.rand(len(data.q_P3), 1) < 0.5, -1.0, 1.0)
    assert np.allclose(
        invariants(data), invariants(replace(data, q_P3=data.q_P3 * sign)), atol=1e-5
    )


def test_nothing_but_points_is_seen():
    data = random_set(4, SIZES)
    nonsense = replace(
        data,
        ids=data.ids[::-1],
        groups=np.array(["Fe"] * len(data)),
        crystal_systems=data.crystal_systems[::-1],
        labels={},
        hkl_P3=data.hkl_P3 * 0,
        lattice_N33=data.lattice_N33 * 7,
    )
    assert np.array_equal(invariants(data), invariants(nonsense))


@pytest.fixture(scope="module")
def sphere(tmp_path_factory):
    """In a sphere: a cube of Miller indices is not symmetric under all of the Laue group."""
    folder = tmp_path_factory.mktemp("boosted") / "sphere"
    config = FeaturizationConfig(selection="sphere:0.8")
    featurize("prototypes:140", folder, config, OneProcess())
    return load(folder)


def test_probabilities_of_symmetric_crystals_do_not_change_with_orientation(sphere, tmp_path):
    """Trees may cut anywhere, also between two roundings of what symmetry makes zero."""
    config = tiny(model="boosted", trees=200)
    fit_members(tmp_path, sphere, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    rows = Parts.of(sphere, config).rows["test"]
    as_stored = trained.probabilities(sphere, rows)
    for seed in range(4):
        other = trained.probabilities(turned(sphere, seed, reflected=seed % 2 == 1), rows)
        assert np.abs(other - as_stored).max() < 1e-3


def part_moved(data, tmp_path, model):
    """Of crystals turned and reordered, the share whose probability moves by more than 1e-4.

    Trees see training crystals again, too: at their numbers they cut. The question is one that a
    pattern can answer, so that there are many trees: strong intensities beyond
    0.3 1/Å.
    """
    far_P = data.intensity_P * (data.q_P3.norm(dim=1) > 0.3)
    strong = np.bincount(data.crystal_P.numpy(), far_P.numpy(), len(data))
    data = replace(data, labels={"bulk_modulus": 85 * strong / np.median(strong)})
    config = tiny(model=model, task="bulk_modulus", trees=600)
    fit_members(tmp_path, data, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    as_stored = trained.probabilities(data)
    moved = [
        np.abs(trained.probabilities(turned(data, seed)) - as_stored).max(axis=(0, 2))
        for seed in range(2)
    ]
    return float((np.stack(moved) > 1e-4).mean())


@pytest.mark.parametrize("model", ["boosted", "powder"])
def test_trees_answer_alike_however_a_crystal_is_turned(model, tmp_path):
    sizes = np.random.default_rng(0).integers(30, 90, 200).tolist()
    assert part_moved(random_set(5, sizes), tmp_path, model) <= 0.005


@pytest.mark.parametrize("model", ["boosted", "powder"])
def test_trees_answer_alike_of_real_crystals(model, tmp_path):
    config = FeaturizationConfig(selection="sphere:1")
    crystals = [replace(crystal, id=f"c{n}") for n, (crystal, _) in enumerate(real_crystals(25))]
    data = cloud_set([entry_of(each, n, config) for n, each in enumerate(crystals)], config)
    assert part_moved(replace(data, groups=data.ids), tmp_path, model) <= 0.005


def test_a_column_is_rounded_with_its_kind():
    columns = np.array([[1000.0, 0.1234567, np.nan], [0.0, 0.0, 0.0], [-2.5e-9, 1e-9, 0.0]])
    found = steady(columns)
    assert np.isnan(found[0, 2])
    assert found[0, 0] == 1000
    assert abs(found[0, 1] - columns[0, 1]) < 1000 * 2.0 ** -(BITS + 5)
    assert (found[1] == 0).all()
    assert np.allclose(found[2], columns[2], rtol=2.0**-BITS, atol=0)
    noise = 1 + 1e-7 * np.random.default_rng(0).normal(size=(500, 40))
    numbers = np.random.default_rng(1).lognormal(0, 3, (500, 40))
    assert (steady(numbers) != steady(numbers * noise)).mean() < 0.002
    assert steady(columns[:0]).shape == (0, 3)


def test_singular_values_count_what_the_crystal_system_allows(sphere):
    """Laue groups have 0, 1, 1, 1, 2, 3, 5 invariants of degree 2, cubic to triclinic."""
    expected = {
        "cubic": 0,
        "hexagonal": 1,
        "trigonal": 1,
        "tetragonal": 1,
        "orthorhombic": 2,
        "monoclinic": 3,
        "triclinic": 5,
    }
    found = (invariants(sphere)[:, -27:-22] > -4).sum(axis=1)
    allowed = np.array([expected[str(system)] for system in sphere.crystal_systems])
    assert (found <= allowed).all()
    assert (found == allowed).mean() > 0.9  # the rest are higher by accident


def test_a_boosted_run_is_whole_and_comes_back(dataset, tmp_path):
    config = tiny(model="boosted", trees=30, members=2)
    run = tmp_path / "run"
    answer = train(dataset, run, config)
    chance = 1 / 7
    assert answer["metrics"]["balanced_accuracy"]["value"] > 3 * chance
    assert sorted(p.parent.name for p in run.rglob(MODEL)) == ["member-0", "member-1"]
    before = {p: p.read_bytes() for p in run.rglob(MODEL)}
    assert train(dataset, run, config, resume=True)["metrics"] == answer["metrics"]
    assert before == {p: p.read_bytes() for p in run.rglob(MODEL)}
    with pytest.raises(UserError, match="trees = 30 there, 31 now"):
        train(dataset, run, tiny(model="boosted", trees=31, members=2), resume=True)
    with pytest.raises(UserError, match="holds a training already"):
        train(dataset, run, config)
    (run / "member-1" / MODEL).unlink()
    with pytest.raises(UserError, match="has not finished"):
        load_run(run)
    assert train(dataset, run, config, resume=True)["metrics"] == answer["metrics"]
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["featurization"]["selection"]


@pytest.mark.parametrize("model", ["boosted", "harmonic"])
@pytest.mark.parametrize("theirs", [None, FEATURES + 1])
def test_a_model_of_other_features_is_refused(dataset, tmp_path, model, theirs):
    config = tiny(model=model, trees=5, epochs=1)
    run = tmp_path / "run"
    train(dataset, run, config)
    assert json.loads((run / "config.json").read_text())["identity"]["features"] == FEATURES
    for path in run.rglob("*.safetensors"):
        if path.name != domain.FILE:
            tensors, state = checkpoint.read(path)
            state["identity"]["features"] = theirs
            checkpoint.save(path, tensors, state)
    message = f"other features: version {theirs} there, {FEATURES} now"
    with pytest.raises(UserError, match=message):
        load_run(run)
    if model == "harmonic":
        with pytest.raises(UserError, match=message):
            train(dataset, tmp_path / "new", tiny(model=model, init=str(run)))
    with pytest.raises(
        UserError, match=f"another training: features = {theirs} there, {FEATURES} now"
    ):
        train(dataset, run, config, resume=True)


def test_members_differ_and_their_mean_answers(clouds, tmp_path):
    config = tiny(model="pointnet", epochs=1, members=2)
    fit_members(tmp_path, clouds, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    rows = Parts.of(clouds, config).rows["test"]
    probabilities = trained.probabilities(clouds, rows)
    assert probabilities.shape == (2, len(rows), 7)
    assert np.allclose(probabilities.sum(axis=-1), 1)
    assert not np.allclose(probabilities[0], probabilities[1])
    seeds = [checkpoint.read(tmp_path / f"member-{k}" / MODEL)[1]["config"]["seed"] for k in (0, 1)]
    assert seeds == [0, 1]
    again = load_members(tmp_path, config).probabilities(clouds, rows)
    assert np.array_equal(again, probabilities)


def test_majority_gives_the_frequencies(clouds, tmp_path):
    config = tiny(model="majority", trees=5)
    fit_members(tmp_path, clouds, config, identity=IDENTITY)
    trained = load_members(tmp_path, config)
    answer = trained.probabilities(clouds)[0]
    assert np.ptp(answer, axis=0).max() == 0
    assert descriptors.nothing(clouds).shape == (len(clouds), 1)


def test_two_classes_and_bytes_of_trees():
    random = np.random.default_rng(0)
    description = random.normal(size=(300, 5)).astype(np.float32)
    target = (description[:, 0] > 0).astype(np.int64)
    config = TrainingConfig(task="bulk_modulus", model="boosted", trees=60)
    rows = np.arange(300)
    model = Boosted.fitted(description, target, rows[:200], rows[200:], config)
    logits = model.logits(description)
    assert ((logits[:, 1] > logits[:, 0]) == (target == 1)).mean() > 0.97
    again = Boosted.from_tensors(2, model.tensors())
    assert np.array_equal(again.logits(description), logits)
    assert model.logits(description[:0]).shape == (0, 2)
    assert model.rounds == again.rounds <= 60


def test_trees_do_not_share_a_batch():
    with pytest.raises(ValueError, match="boosted trains in one process"):
        TrainingConfig(model="boosted", workers=2)


def test_an_evaluation_compares_with_another_run_and_counts_near_duplicates(dataset, tmp_path):
    config = tiny(model="boosted", trees=20, members=2)
    own, other = tmp_path / "own", tmp_path / "other"
    train(dataset, own, config)
    train(dataset, other, tiny(model="majority", trees=2))
    answer = evaluate_run(own, against=other, leaks=True)
    auroc = answer["against"]["bootstrap"]["auroc"]
    assert auroc["value"] == pytest.approx(answer["metrics"]["auroc"]["value"])
    assert auroc["reference"] == 0.5
    assert auroc["difference"]["low"] > 0
    assert "delong" not in answer["against"]  # of two classes only
    itself = evaluate_run(own, against=own)["against"]["bootstrap"]
    assert all(pair["difference"]["value"] == 0 for pair in itself.values())
    test = answer["leakage"]["splits"]["test"]
    parts = answer["leakage"]["by_novelty"]
    assert test["structures"] == sum(part["structures"] for part in parts.values())
    assert answer["leakage"]["shared_groups"] == []
    assert set(answer["by_class"]) == set(answer["classes"])
    bins = answer["calibration"]["reliability"]
    assert sum(each["count"] for each in bins) == answer["structures"]
    assert answer["doubt"]["spread"]["error"]["value"] == pytest.approx(
        1 - np.trace(answer["confusion_matrix"]) / answer["structures"]
    )
    json.dumps(answer, allow_nan=False)
    moved = tmp_path / "moved"
    train(dataset, moved, tiny(model="majority", trees=2, test_fraction=0.3))
    with pytest.raises(UserError, match="tested on other crystals"):
        evaluate_run(own, against=moved)
    with pytest.raises(UserError, match="no such file"):
        evaluate_run(own, against=tmp_path)
