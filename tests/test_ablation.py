"""The grid: what it refuses, and that every trial runs exactly once whatever happens."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from small import TINY, tiny
from tiny import ROOT

from ablation import claim, layout, perturbations
from ablation.claim import CLAIM, driving, read_claim
from ablation.grid import GridConfig, read_grid
from ablation.jobs import Job, Queue
from ablation.plan import fits_of, plan
from ablation.record import PREDICTIONS, RECORD, Record
from ablation.run import run_grid
from ablation.status import standing, status
from ablation.variants import CloudSource, Variants
from ablation.worker import Shared, Worker, _Kept
from cluster.errors import RunFailed, UserError
from cluster.terminal import duration
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest
from training.dataset import load
from training.ensemble import fit_members, load_members
from training.metrics import METRICS, score
from training.split import Parts

HASH = "0" * 64


def literal(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return json.dumps(value)


def toml(values):
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    lines = [f"{k} = {literal(v)}" for k, v in values.items() if k not in tables]
    for name, table in tables.items():
        dotted = {f"{name}.{k}": v for k, v in table.items() if isinstance(v, dict)}
        lines += [
            f"[{name}]",
            toml({k: v for k, v in table.items() if f"{name}.{k}" not in dotted}),
        ]
        lines += [toml(dotted)]
    return "\n".join(lines) + "\n"


def grid_file(folder, **changes):
    path = folder / "grid.toml"
    values = {"dataset": "dataset", "arms": ["none", "basis_only"], "seeds": [0, 1]}
    path.write_text(toml(values | {"training": TINY} | changes))
    return path


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sedes": [0]}, "sedes: unknown key"),
        ({"training": {"widht": 16}}, r"\[training\].*widht: unknown key"),
        ({"training": {"width": 17}}, "width = 17"),
        ({"training": {"seed": 3}}, r"training\.seed = 3.*\n.*seeds = "),
        ({"training": 3}, "training = 3"),
        ({"arms": ["none", "intensity_blurred"]}, "unknown arm intensity_blurred"),
        ({"arms": ["basis_only"]}, "reference arm none is missing"),
        ({"arms": []}, "reference arm none is missing"),
        ({"arms": ["none", "basis_only", "none"]}, "names something twice"),
        ({"seeds": [0, 1, 0]}, "names something twice"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [0, -1]}, "none below 0"),
        ({"seeds": [0.5]}, "seeds.0 = 0.5"),
        ({"processes": -1}, "processes = -1"),
        ({"retries": -1}, "retries = -1"),
        ({"tasks": ["hardness"], "training": {}}, "tasks.0 = 'hardness'"),
        ({"tasks": ["band_gap"]}, r"both tasks = \['band_gap'\] and training.task"),
        ({"models": ["pointnet", "pointnet"]}, "names something twice"),
        ({"modes": ["retest"]}, "modes.0 = 'retest'"),
        ({"modes": []}, r"modes = \[\]"),
        ({"arms": ["none", {"name": "jitter9"}]}, "unknown arm jitter9"),
        ({"arms": ["none", {"name": "basis_only", "dose": 3}]}, "arms.1.dose: unknown key"),
        ({"arms": ["none", {"name": "basis_only", "strengths": [1.0]}]}, "has no strength"),
        ({"arms": ["none", {"name": "basis_only", "strengths": "ladder"}]}, "hence no ladder"),
        ({"arms": ["none", {"name": "intensity_scaled", "strengths": [7.0]}]}, "must be 0 to 6"),
        ({"arms": ["none", {"name": "intensity_scaled", "strengths": [1, 1]}]}, "twice"),
        ({"arms": ["none", {"name": "intensity_scaled", "strengths": []}]}, "no strength given"),
        ({"exclude": [{"arms": "none"}]}, "exclude.0.arms: unknown key"),
        ({"exclude": [{}]}, "exclude.0 says nothing"),
        ({"exclude": [{"seed": 7}]}, "exclude.0: the grid has no seed 7"),
        ({"exclude": [{"model": "boosted"}]}, "exclude.0: the grid has no model boosted"),
        ({"training": TINY | {"boosted": {"trees": 3}}}, r"\[training.boosted\]: the grid has no"),
        ({"training": TINY | {"pointnet": {"trees": -3}}}, r"\[pointnet\]: trees = -3"),
        ({"training": TINY | {"pointnet": {"seed": 3}}}, r"training\.pointnet\.seed = 3"),
        ({"training": TINY | {"pointnet": {"model": "boosted"}}}, r"training\.pointnet\.model"),
        ({"training": TINY | {"neuralnet": {"trees": 3}}}, "neuralnet: unknown key"),
    ],
)
def test_wrong_grids_are_refused_by_name(tmp_path, changes, names):
    path = grid_file(tmp_path, **changes)
    with pytest.raises(UserError, match=names) as caught:
        read_grid(path)
    assert str(path) in caught.value.problem
    assert caught.value.remedy


def test_a_grid_that_is_absent_or_not_toml_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file\n.* full, paper, quick"):
        read_grid(tmp_path / "grid.toml")
    (tmp_path / "grid.toml").write_text("seeds = [")
    with pytest.raises(UserError, match="is not TOML"):
        read_grid(tmp_path / "grid.toml")
    with pytest.raises(UserError, match="is a folder"):
        read_grid(tmp_path)
    (tmp_path / "grid.toml").write_text("")
    with pytest.raises(UserError, match="dataset"):
        read_grid(tmp_path / "grid.toml")


def test_a_dataset_is_relative_to_the_grids_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert read_grid(grid_file(tmp_path)).dataset == str(tmp_path / "dataset")
    assert read_grid(grid_file(tmp_path, dataset="../x")).dataset == str(tmp_path.parent / "x")
    assert read_grid(grid_file(tmp_path, dataset="/data/x")).dataset == "/data/x"
    assert read_grid(grid_file(tmp_path), dataset="elsewhere").dataset == "elsewhere"
    assert read_grid(grid_file(tmp_path)).training == tiny()


# --- the plan ------------------------------------------------------------------------------------

SIX = [arm.name for arm in GridConfig(dataset="x").arms]


def test_trials_are_all_pairs_with_ids_of_their_own():
    grid = GridConfig(dataset="x", seeds=(3, 1), training=tiny())
    planned = plan(grid, HASH)
    assert [(t.training.seed, t.arm) for t in planned] == [(s, arm) for s in (3, 1) for arm in SIX]
    assert len({t.id for t in planned}) == len({t.fit.id for t in planned}) == 12
    assert [t.id for t in plan(grid, HASH)] == [t.id for t in planned]
    assert all(t.training == tiny(seed=t.training.seed) for t in planned)


def large_grid(**changes):
    values = {
        "dataset": "x",
        "tasks": ["bulk_modulus", "crystal_system"],
        "models": ["pointnet", "boosted"],
        "arms": ["none", "basis_only", {"name": "intensity_scaled", "strengths": "ladder"}],
        "modes": ["retrain", "test_only", "train_only"],
        "seeds": [0, 1],
        "overrides": {"boosted": {"trees": 7}, "bulk_modulus": {"threshold": 50.0}},
    }
    return GridConfig(**(values | changes))


def test_a_training_serves_several_trials():
    planned = plan(large_grid(), HASH)
    doses = perturbations.ARMS["intensity_scaled"].strength.ladder
    per_place = 1 + 3 * (1 + len(doses))  # the reference has one mode
    assert len(planned) == 2 * 2 * 2 * per_place
    assert len({t.id for t in planned}) == len(planned)
    assert len(fits_of(planned)) == 2 * 2 * 2 * (1 + 1 + len(doses))
    for trial in planned:
        assert (trial.fit.arm, trial.fit.strength) == (
            ("none", None) if trial.mode == "test_only" else (trial.arm, trial.strength)
        )
        assert trial.training.trees == (7 if trial.training.model == "boosted" else 3000)
        assert trial.training.threshold == {"bulk_modulus": 50.0}.get(trial.training.task)
    assert planned[0].arm == "none"
    scaled = {t.strength for t in planned if t.arm == "intensity_scaled"}
    assert scaled == set(doses)
    assert len(plan(large_grid(modes=["test_only"]), HASH)) == 2 * 2 * 2 * (2 + len(doses))


@pytest.mark.parametrize(
    ("name", "least", "most"), [("quick", 20, 100), ("paper", 250, 500), ("full", 2000, 9000)]
)
def test_the_grids_that_come_with_the_program(name, least, most):
    with pytest.raises(UserError, match="dataset: not given"):
        read_grid(Path(name))
    planned = plan(read_grid(Path(name), dataset="x"), HASH)
    assert least <= len(planned) <= most
    said = re.search(rf"`{name}` \(([\d,]+)", (ROOT / "docs/your-data.md").read_text("utf-8"))
    assert said is not None
    assert len(planned) == int(said[1].replace(",", ""))
    tasks = {trial.training.task for trial in planned}
    assert len(tasks) == (1 if name == "quick" else 5)
    arms = {trial.arm for trial in planned}
    if name == "full":
        poses = {arm.name for arm in perturbations.ARMS.values() if arm.pose}
        assert arms == set(perturbations.ARMS) - poses  # both models are invariant


def test_exclusions_leave_out_what_they_name():
    everything = {t.id for t in plan(large_grid(), HASH)}
    out = {"model": "boosted", "mode": ["test_only", "train_only"]}
    left = plan(large_grid(exclude=[out, {"arm": "basis_only", "seed": 1}]), HASH)
    gone = [t for t in plan(large_grid(), HASH) if t.id not in {t.id for t in left}]
    assert {t.id for t in left} < everything
    assert all(
        (t.training.model == "boosted" and t.mode != "retrain")
        or (t.arm == "basis_only" and t.training.seed == 1)
        for t in gone
    )
    assert not any(t.arm == "basis_only" and t.training.seed == 1 for t in left)
    with pytest.raises(UserError, match="but not its reference"):
        plan(large_grid(exclude=[{"arm": "none", "seed": 1}]), HASH)
    with pytest.raises(UserError, match="has no trial"):
        plan(large_grid(exclude=[{"seed": [0, 1]}]), HASH)


def test_a_name_alone_takes_the_default_strength():
    grid = large_grid(arms=["none", "intensity_scaled"])
    assert {t.strength for t in plan(grid, HASH)} == {None, 2.0}
    same = large_grid(arms=["none", {"name": "intensity_scaled", "strengths": [2.0]}])
    assert [t.id for t in plan(same, HASH)] == [t.id for t in plan(grid, HASH)]


CHANGES = {
    "task": "bulk_modulus",
    "model": "boosted",
    "members": 2,
    "width": 32,
    "trees": 9,
    "train_fraction": 0.5,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "warmup_fraction": 0.2,
    "weight_decay": 0.0,
    "validation_fraction": 0.3,
    "test_fraction": 0.3,
    "radiation": "neutron",
    "pose": "axis",
    "resamples": 200,
    "also": ("bulk_modulus",),
    "init": "run",
}


def test_ids_change_with_all_that_matters_and_nothing_else():
    def first(training, dataset_hash=HASH, dataset="x", processes=0):
        grid = GridConfig(dataset=dataset, processes=processes, training=training)
        return plan(grid, dataset_hash)[0].id

    base = first(tiny())
    others = set(tiny().deciding()) - CHANGES.keys()
    assert others <= {"seed", "threshold"}, others  # which are below, or of an arm
    for name, value in CHANGES.items():
        assert first(tiny(**{name: value})) != base, name
    assert first(tiny(workers=2, checkpoint_steps=7, checkpoint_seconds=5.0, restarts=1)) == base
    assert first(tiny(), dataset_hash="1" * 64) != base
    assert first(tiny(), dataset="y", processes=3) == base
    bulk = {"task": "bulk_modulus"}
    assert first(tiny(**bulk)) != first(tiny(**bulk, threshold=90.0))


# --- a worker ------------------------------------------------------------------------------------


def shared(clouds, name="base"):
    return Shared.of(name, clouds)


def of_arm(arm, mode="retrain", **changes):
    """The trial of one arm of a small grid."""
    modes = list(dict.fromkeys(["retrain", mode]))
    arms = list(dict.fromkeys(["none", arm]))
    grid = GridConfig(dataset="x", arms=arms, modes=modes, training=tiny(**changes))
    planned = plan(grid, HASH)
    return next(t for t in planned if t.arm == arm and t.mode == mode)


def trained(worker, clouds, *trials):
    return worker.train(trials[0].fit, list(trials), shared(clouds), shared(clouds))


def worker_in(folder, memory=1 << 30):
    return Worker(folder, torch.get_num_threads(), memory)


@pytest.mark.parametrize("model", ["pointnet", "harmonic", "powder"])
def test_a_worker_gives_what_a_training_gives(clouds, tmp_path, model):
    """Inputs and units that were kept change nothing: bit for bit a training of its own."""
    changes = {"model": model, "trees": 5, "epochs": 2}
    worker = worker_in(tmp_path)
    trial = of_arm("basis_only", **changes)
    (first,) = trained(worker, clouds, trial)
    other = of_arm("basis_only", **changes | {"task": "crystal_system", "threshold": None})
    assert first.row.keys() == {*METRICS, "seconds"}
    data = perturbations.perturb(clouds, "basis_only", None, 0)
    parts = Parts.of(data, trial.training)
    fit_members(tmp_path / "alone", data, trial.training, identity={})
    alone = load_members(tmp_path / "alone", trial.training)
    expected = alone.probabilities(data, parts.rows["test"]).mean(axis=0)
    np.testing.assert_allclose(first.probability_NC, expected, atol=2e-6)
    (again,) = trained(worker_in(tmp_path / "again"), clouds, trial)
    np.testing.assert_array_equal(again.probability_NC, first.probability_NC)
    seed_1 = replace(other, fit=replace(other.fit, id="s", training=tiny(**changes, seed=1)))
    (kept,) = trained(worker, clouds, seed_1)
    (fresh,) = trained(worker_in(tmp_path / "fresh"), clouds, seed_1)
    np.testing.assert_array_equal(kept.probability_NC, fresh.probability_NC)


def test_the_worker_trains_and_tests_on_the_right_clouds(clouds, tmp_path, monkeypatch):
    """Against an arm that empties all clouds: who has seen it?"""
    arm = perturbations.ARMS["basis_only"]
    empty = replace(
        arm, apply=lambda d, s, r: replace(d, intensity_P=d.intensity_P * 0, q_P3=d.q_P3 * 0)
    )
    monkeypatch.setitem(perturbations.ARMS, "basis_only", empty)
    worker = worker_in(tmp_path)
    (clean,) = trained(worker, clouds, of_arm("none"))
    both = of_arm("basis_only"), of_arm("basis_only", "train_only")
    retrain, train_only = trained(worker, clouds, *both)
    (test_only,) = worker.test([of_arm("basis_only", "test_only")], shared(clouds), shared(clouds))

    def constant(answer):
        return np.ptp(answer.probability_NC, axis=0).max() < 1e-5

    assert constant(retrain)
    assert constant(test_only)
    assert not constant(clean)
    assert not constant(train_only)  # a network of random weights, on clouds that differ
    reference = load_members(tmp_path / "fits" / of_arm("none").fit.id, tiny())
    rows = Parts.of(clouds, tiny()).rows["test"]
    expected = reference.probabilities(clouds, rows).mean(axis=0)
    np.testing.assert_allclose(clean.probability_NC, expected, atol=2e-6)


def test_tests_see_the_clouds_that_training_would_see(clouds, tmp_path):
    """A crystal's draws do not depend on the set: a subset is perturbed like the whole."""
    worker = worker_in(tmp_path)
    trained(worker, clouds, of_arm("none"))
    trial = of_arm("directions_random", "test_only")
    (answer,) = worker.test([trial], shared(clouds), shared(clouds))
    rows = Parts.of(clouds, tiny()).rows["test"]
    whole = perturbations.perturb(clouds, "directions_random", None, 0)
    model = load_members(worker.folder(trial.fit), tiny())
    expected = model.probabilities(whole, rows).mean(axis=0)
    np.testing.assert_allclose(answer.probability_NC, expected, atol=2e-6)


def test_clouds_of_other_crystals_are_refused(clouds, tmp_path):
    fewer = shared(clouds.subset(np.arange(100)), "fewer")
    trial = of_arm("basis_only")
    with pytest.raises(UserError, match="fewer has 100 crystals"):
        worker_in(tmp_path).train(trial.fit, [trial], shared(clouds), fewer)


def test_a_variant_keeps_the_groups_and_labels_of_the_grid(clouds, tmp_path):
    other = replace(clouds, groups=np.array(["one"] * len(clouds)), labels={})
    trial = of_arm("basis_only")
    worker = worker_in(tmp_path)
    (found,) = worker.train(trial.fit, [trial], shared(clouds), shared(other, "variant"))
    (expected,) = trained(worker_in(tmp_path / "own"), clouds, trial)
    np.testing.assert_array_equal(found.probability_NC, expected.probability_NC)


def test_a_broken_arm_is_an_answer_with_a_traceback(clouds, tmp_path, monkeypatch):
    def broken(data, strength, draws):
        raise ZeroDivisionError("arm is broken")

    arm = perturbations.ARMS["basis_only"]
    monkeypatch.setitem(perturbations.ARMS, "basis_only", replace(arm, apply=broken))
    trial = of_arm("basis_only")
    found = worker_in(tmp_path).attempt(trial.fit, [trial], shared(clouds), shared(clouds))
    assert "Traceback" in found.traceback
    assert "arm is broken" in found.traceback
    assert not found.hopeless
    other = shared(clouds.subset(np.arange(9)), "other")
    assert worker_in(tmp_path).attempt(trial.fit, [trial], shared(clouds), other).hopeless


def test_a_worker_perturbs_once_for_all_seeds_only_what_draws_nothing(
    clouds, tmp_path, monkeypatch
):
    seen = []
    for name in ("basis_only", "directions_random"):
        arm = perturbations.ARMS[name]

        def watching(data, strength, draws, name=name, arm=arm):
            seen.append(name)
            return arm.apply(data, strength, draws)

        monkeypatch.setitem(perturbations.ARMS, name, replace(arm, apply=watching))
    worker = worker_in(tmp_path)
    for seed in (0, 1, 2):
        for name in ("basis_only", "directions_random"):
            trial = of_arm(name, model="majority", trees=1)
            own = replace(trial.fit, id=f"{name}{seed}", training=tiny(model="majority", seed=seed))
            trained(worker, clouds, replace(trial, fit=own))
    assert seen.count("basis_only") == 1
    assert seen.count("directions_random") == 3


def test_what_is_kept_fits_into_memory():
    kept = _Kept(10)
    for name in range(5):
        kept.put((name,), np.zeros(4, dtype=np.uint8))
    assert [kept.get((name,)) is not None for name in range(5)] == [False] * 3 + [True] * 2
    kept.get((3,))
    kept.put((5,), np.zeros(4, dtype=np.uint8))
    assert kept.get((4,)) is None
    assert kept.get((3,)) is not None
    kept.put((6,), np.zeros(99, dtype=np.uint8))
    assert kept.get((6,)) is not None  # the last, whatever its size


# --- clouds that are featurized anew -------------------------------------------------------------


def test_an_arm_of_featurization_gets_clouds_of_the_same_crystals(dataset, clouds, tmp_path):
    variants = Variants(dataset, tmp_path)
    source = variants.of("point_atoms", None, None)
    assert source.folder.parent == tmp_path / "datasets"
    assert source == Variants(dataset, tmp_path).of("point_atoms", None, None)
    variants.featurize(source, ranks=1)
    data = load(source.folder, source.radiation)
    assert data.ids.tolist() == clouds.ids.tolist()
    torch.testing.assert_close(data.q_P3, clouds.q_P3)
    assert not torch.allclose(data.intensity_P, clouds.intensity_P)
    made = (source.folder / "manifest.json").stat().st_mtime_ns
    variants.featurize(source, ranks=2)  # nothing is left to do
    assert (source.folder / "manifest.json").stat().st_mtime_ns == made
    trial = of_arm("point_atoms", model="majority", trees=1)
    (answer,) = worker_in(tmp_path).train(
        trial.fit, [trial], shared(clouds), shared(data, source.name)
    )
    assert len(answer.probability_NC) == len(Parts.of(clouds, tiny()).rows["test"])


def test_arms_on_clouds_start_from_the_grids_own(dataset, tmp_path):
    variants = Variants(dataset, tmp_path)
    assert variants.of("jitter", 0.1, None) == variants.base(None)
    assert variants.of("radiation_xray", None, None) == variants.base(None)
    neutron = variants.of("radiation_neutron", None, "xray")
    assert neutron.radiation == "neutron"
    assert neutron.folder != dataset


def test_a_source_that_is_not_what_it_was_is_refused(dataset, tmp_path):
    moved = tmp_path / "dataset"
    moved.mkdir()
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["sources"][0]["spec"] = "prototypes:141"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    variants = Variants(moved, tmp_path / "out")
    with pytest.raises(UserError, match="prototypes:141 of"):
        variants.featurize(variants.of("point_atoms", None, None), 1)


# --- the queue -----------------------------------------------------------------------------------


def test_a_worker_stays_with_its_clouds_and_tests_wait_for_their_model():
    planned = plan(large_grid(seeds=[0]), HASH)
    source = CloudSource(Path("x"), None, FeaturizationConfig())
    jobs = []
    for fit in fits_of(planned).values():
        own = tuple(t for t in planned if t.fit.id == fit.id and t.mode != "test_only")
        jobs.append(Job(fit, own, source, (fit.arm, fit.strength, 0)))
    tests = [t for t in planned if t.mode == "test_only" and t.arm == "basis_only"]
    jobs.append(Job(None, tuple(tests), source, ("basis_only", None, 0)))
    queue = Queue(jobs, set())
    first, second = queue.take(None), queue.take(None)
    assert first.group[0] == "none"
    assert second.group[0] == "basis_only"  # quiet clouds before busy ones
    taken = [first, second]
    while (job := queue.take(("none", None, 0))) is not None:
        taken.append(job)
    assert [job.group[0] for job in taken[2:5]] == ["none"] * 3
    assert len(queue) == 1  # the tests
    for job in taken[:3]:
        queue.trained.add(job.fit.id)
    assert queue.take(None) is None
    failed = next(
        job.fit for job in taken if job.group[0] == "none" and job.fit.id not in queue.trained
    )
    gone = queue.without(failed)
    assert [t.fit.id for t in gone] == [failed.id]
    rest = [t.fit.id for job in [queue.take(None)] if job for t in job.trials]
    assert failed.id not in rest


# --- the record ----------------------------------------------------------------------------------


def row_of(trial, status="done"):
    return {"trial": trial, "status": status, "seconds": 1.0}


def test_the_record_gives_back_what_it_was_given(tmp_path):
    record = Record(tmp_path)
    random = np.random.default_rng(0)
    given = {name: random.random((7, 3), dtype=np.float32) for name in "abc"}
    for name, values in given.items():
        record.add(row_of(name), values)
    record.add(row_of("d", "failed"))
    for found in (record, Record(tmp_path)):
        for name, values in given.items():
            np.testing.assert_array_equal(found.probabilities(name), values)
            assert found.is_done(name)
        assert not found.is_done("d")
        assert not found.is_done("e")
    assert sorted(p.name for p in tmp_path.iterdir()) == [PREDICTIONS, RECORD]


def test_a_record_cut_anywhere_loses_only_what_was_cut(tmp_path):
    whole = Record(tmp_path)
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    for name in ("a", "b"):
        whole.add(row_of(name), values)
    lines = (tmp_path / RECORD).read_bytes()
    first = lines.index(b"\n") + 1
    for cut in range(first, len(lines)):
        (tmp_path / RECORD).write_bytes(lines[:cut])
        assert set(Record(tmp_path).rows) == {"a"}
        record = Record.mended(tmp_path)
        left = {"a"} if cut < len(lines) - 1 else {"a", "b"}  # only its end was missing
        assert set(record.rows) == left
        record.add(row_of("c"), values)
        again = Record(tmp_path)
        assert set(again.rows) == left | {"c"}, cut
        np.testing.assert_array_equal(again.probabilities("c"), values)


def test_damaged_predictions_are_a_trial_to_do_again(tmp_path):
    record = Record(tmp_path)
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    for name in ("a", "b"):
        record.add(row_of(name), values)
    content = bytearray((tmp_path / PREDICTIONS).read_bytes())
    content[3] ^= 1
    (tmp_path / PREDICTIONS).write_bytes(content)
    assert [Record(tmp_path).is_done(name) for name in ("a", "b")] == [False, True]
    (tmp_path / PREDICTIONS).write_bytes(content[:-1])
    assert [Record(tmp_path).is_done(name) for name in ("a", "b")] == [False, False]
    (tmp_path / PREDICTIONS).unlink()
    assert not Record(tmp_path).is_done("b")


# --- one driver a folder -------------------------------------------------------------------------


def test_a_folder_has_one_driver(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with driving(out) as held:
        held.check()
        assert read_claim(out)["pid"] == os.getpid()
        monkeypatch.setattr("cluster.files.time.sleep", lambda seconds: None)
        with pytest.raises(UserError, match="another job is at work"), driving(out):
            pass
    assert read_claim(out) is None


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has no locks, and drivers that give signs of life 20 times a second."""

    def no_locks(descriptor, how):
        raise OSError("no locks")

    monkeypatch.setattr("cluster.files.fcntl.flock", no_locks)
    monkeypatch.setattr(claim, "_BEAT", 0.05)
    monkeypatch.setattr(claim, "_SILENCE", 1.5)
    monkeypatch.setattr(claim, "_is_dead", lambda there: False)  # one of another machine


def test_without_locks_a_living_driver_keeps_others_out(tmp_path, without_locks):
    with driving(tmp_path) as held:
        with (
            pytest.raises(UserError, match="another driver is at work"),
            driving(tmp_path),
        ):
            pass
        held.check()


def test_without_locks_a_silent_driver_loses_its_folder_and_sees_it(tmp_path, without_locks):
    with driving(tmp_path) as old:
        old._ended.set()  # it hangs
        old._beats.join()
        with driving(tmp_path) as new:
            new.check()
            with pytest.raises(RunFailed, match="another driver has taken over"):
                old.check()
    assert read_claim(tmp_path) is None


def test_what_a_dead_driver_left_keeps_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_SILENCE", 1e9)
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / CLAIM).write_text(json.dumps({"token": "old", **claim._here(), "pid": child.pid}))
    with driving(tmp_path) as held:  # it would wait for years
        held.check()


# --- the folder ----------------------------------------------------------------------------------


def finished_by_hand(grid, out):
    """A grid whose trials all have results, without Ray: in this process."""
    manifest = read_manifest(Path(grid.dataset))
    clouds = load(Path(grid.dataset))
    out.mkdir()
    layout.begin(out, grid, manifest, clouds)
    planned = plan(grid, manifest["content_hash"])
    record, worker = Record(out), worker_in(out)
    for fit in fits_of(planned).values():
        own = [t for t in planned if t.fit.id == fit.id and t.mode != "test_only"]
        answers = trained(worker, clouds, *own)
        tests = [t for t in planned if t.fit.id == fit.id and t.mode == "test_only"]
        for trial in tests:
            answers += worker.test([trial], shared(clouds), shared(clouds))
        for answer in answers:
            row = answer.trial.identity | {"status": "done", "commit": "abc"} | answer.row
            record.add(row, answer.probability_NC)
    return planned


def test_a_folder_belongs_to_one_grid(dataset, tmp_path, monkeypatch):
    grid = GridConfig(dataset=str(dataset), arms=("none",), seeds=(0, 1), training=tiny(epochs=1))
    out = tmp_path / "out"
    finished_by_hand(grid, out)
    described = json.loads((out / "grid.json").read_text())
    assert described["attribution"] == read_manifest(dataset)["attribution"]
    (out / "grid.json").rename(tmp_path / "grid.json")
    with pytest.raises(UserError, match="is not empty and holds no grid"):
        run_grid(grid, out)
    (tmp_path / "grid.json").rename(out / "grid.json")
    monkeypatch.setattr("ablation.run.ray_for", None)  # from here on, a trial would fail
    record = (out / RECORD).read_bytes()
    assert run_grid(grid, str(out)) == {"done": 2, "failed": 0, "skipped": 2}

    def with_training(**changes):
        return grid.model_copy(update={"training": tiny(epochs=1, **changes)})

    for changes in ({"width": 32}, {"task": "bulk_modulus", "threshold": 5.0}):
        with pytest.raises(UserError, match=r"width|no label"):
            run_grid(with_training(**changes), out)
    free = with_training(workers=2, checkpoint_steps=3)
    assert run_grid(free, out) == {"done": 2, "failed": 0, "skipped": 2}
    assert (out / RECORD).read_bytes() == record
    with pytest.raises(TypeError):  # it has grown, and starts to work
        run_grid(grid.model_copy(update={"seeds": (0, 1, 2)}), out)
    with pytest.raises(UserError, match="is a file"):
        run_grid(grid, out / "grid.json")

    manifest = json.loads((dataset / "manifest.json").read_text()) | {"content_hash": "f" * 64}
    moved = tmp_path / "dataset"
    moved.mkdir()
    (moved / "shards").symlink_to(dataset / "shards")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another grid: dataset_summary: content_hash"):
        run_grid(grid.model_copy(update={"dataset": str(moved)}), out)


def test_tables_are_made_of_what_is_finished(dataset, clouds, tmp_path):
    grid = GridConfig(
        dataset=str(dataset),
        models=("majority", "powder"),
        arms=("none", {"name": "intensity_scaled", "strengths": [0.5, 1.0]}),
        modes=("retrain", "test_only"),
        seeds=(0, 3),
        training=tiny(trees=3),
    )
    out = tmp_path / "out"
    planned = finished_by_hand(grid, out)
    assert layout.write_tables(out) == len(planned) == 2 * 2 * 5
    results = pq.read_table(out / "results.parquet")
    assert results.column_names == [
        "trial", "task", "model", "arm", "strength", "mode", "seed", "status", "auroc",
        "average_precision", "balanced_accuracy", "f1", "mcc", "ece", "seconds", "commit",
    ]  # fmt: skip
    rows = results.to_pylist()
    assert [row["trial"] for row in rows] == [t.id for t in planned]
    assert [row["strength"] for row in rows] == [t.strength for t in planned]
    assert {row["status"] for row in rows} == {"done"}
    predictions = pq.read_table(out / "predictions-crystal_system.parquet")
    columns = ["trial", "model", "arm", "strength", "mode", "seed", "id", "group", "label"]
    assert predictions.column_names == [*columns, *(f"p{c}" for c in range(7))]
    test = Parts.of(clouds, grid.training).rows["test"]
    assert predictions.num_rows == len(planned) * len(test)
    row = rows[-1]
    own = predictions.filter(pc.equal(predictions["trial"], row["trial"]))
    assert own["id"].to_pylist() == clouds.ids[test].tolist()
    values = np.stack([own[f"p{c}"].to_numpy() for c in range(7)], axis=1).astype(np.float64)
    assert score(own["label"].to_numpy(), values)["auroc"][0] == row["auroc"]
    document = json.loads((out / "grid.json").read_text())
    assert document["trials"] == len(planned)
    assert document["models"] == ["majority", "powder"]
    assert document["arms"][1]["name"] == "intensity_scaled"
    assert document["arms"][1]["strength"] == "decades"
    counts = document["tasks"]["crystal_system"]["class_counts"]
    assert sum(counts["test"].values()) == len(test)

    # Half of it is there: tables, and the account, are of that half.
    lines = (out / RECORD).read_bytes().splitlines(keepends=True)
    (out / RECORD).write_bytes(b"".join(lines[:9]))
    assert layout.write_tables(out) == 9
    assert pq.read_table(out / "results.parquet").num_rows == 9
    assert pq.read_table(out / "predictions-crystal_system.parquet").num_rows == 9 * len(test)
    found = status(out)
    assert (found["done"], found["failed"], found["missing"]) == (9, 0, len(planned) - 9)


# --- how far is it? ------------------------------------------------------------------------------


def test_the_standing_counts_every_trial_once():
    planned = plan(large_grid(), HASH)
    rows = {t.id: {"status": "done", "seconds": 2.0} for t in planned[:10]}
    rows[planned[10].id] = {"status": "failed"}
    found = standing(planned, rows, {"a job": 0.5}, processes=4)
    assert (found.total.planned, found.total.done, found.total.failed) == (len(planned), 10, 1)
    assert found.share == 11.5
    for name in ("planned", "done", "failed"):
        every = (getattr(c, name) for arms in found.by_task.values() for c in arms.values())
        assert sum(every) == getattr(found.total, name)
    assert found.seconds_left == pytest.approx(2.0 * (len(planned) - 11) / 4)
    assert standing(planned, rows, {}, processes=0).seconds_left is None
    assert standing(planned, {}, {}, processes=4).seconds_left is None


def test_durations_read_well():
    shown = [duration(seconds) for seconds in (None, 3.2, 600, 9000)]
    assert shown == ["unknown", "3 s", "10 min", "2.5 h"]


def test_the_status_of_no_grid_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no grid"):
        status(tmp_path)
    (tmp_path / "grid.json").write_text("{}")
    with pytest.raises(UserError, match="is not of a grid: KeyError: 'grid'"):
        status(tmp_path)
    (tmp_path / "grid.json").write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match=r"is not of a grid: .* can't decode byte") as caught:
        status(tmp_path)
    assert len(str(caught.value)) < 500
