"""Questions, split, clouds in memory, and rotations."""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_set, tiny
from tiny import SMALL, run

from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from featurization.shards import read_shard, write_shard
from training.dataset import CloudBatch, load
from training.rotations import random_rotations
from training.split import SPLITS, Parts, split_of
from training.tasks import TASKS, UNKNOWN, task_of

# --- questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label", "threshold", "unit", "below", "above"),
    [
        ("bulk_modulus", "bulk_modulus", 85.0, "GPa", "soft", "stiff"),
        ("shear_modulus", "shear_modulus", 34.0, "GPa", "soft", "stiff"),
        ("band_gap", "band_gap", 0.001, "eV", "metal", "insulator"),
        ("stability", "energy_above_hull", 0.02, "eV/atom", "stable", "unstable"),
    ],
)
def test_thresholds_units_and_directions(name, label, threshold, unit, below, above):
    task = task_of(name)
    assert (task.label, task.threshold, task.unit) == (label, threshold, unit)
    values = np.array([threshold - 1e-9, threshold, threshold + 1e-9, np.nan, np.inf])
    target = task.target(values)
    assert [task.classes[c] for c in target[:3]] == [below, below, above]  # `>` is strict
    assert target[3:].tolist() == [UNKNOWN, UNKNOWN]
    assert f"{threshold:g} {unit}" in task.question


def test_the_positive_class_is_the_one_that_is_asked_for():
    asked_for = {
        "bulk_modulus": "stiff",
        "shear_modulus": "stiff",
        "band_gap": "insulator",
        "stability": "stable",
    }
    assert {n: TASKS[n].classes[1] for n in asked_for} == asked_for
    assert task_of("band_gap").target(np.array([0.0, 1.1])).tolist() == [0, 1]
    assert task_of("stability").target(np.array([0.0, 0.3])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "ways"),
    [
        ([], "it has no labels\n  remedy: choose task crystal_system, which needs none"),
        (["band_gap"], "it has band_gap\n  remedy: choose another task: band_gap, crystal_system"),
        (["target"], "xtal featurize SOURCE OUT --label bulk_modulus"),
    ],
)
def test_a_label_that_is_not_there_is_refused_with_the_ways_out(clouds, labels, ways):
    others = replace(clouds, labels={name: np.ones(len(clouds.ids)) for name in labels})
    with pytest.raises(UserError, match="no label bulk_modulus, which") as refused:
        Parts.of(others, tiny(task="bulk_modulus"))
    assert ways in str(refused.value)
    assert ("--label" in str(refused.value)) == (labels == ["target"])


def test_crystal_systems_are_seven_classes_and_have_no_threshold():
    task = task_of("crystal_system")
    assert len(task.classes) == 7
    assert task.target(np.array(task.classes[::-1])).tolist() == [6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"threshold = 3\.0: crystal_system has no threshold"):
        task_of("crystal_system", 3.0)


def test_another_threshold_moves_the_cut_and_nothing_else():
    assert task_of("bulk_modulus", 100.0) == replace(task_of("bulk_modulus"), threshold=100.0)
    assert task_of("bulk_modulus", 0.0).target(np.array([-1.0, 1.0])).tolist() == [0, 1]


# --- split -------------------------------------------------------------------------------------

# Frozen: a change here makes all earlier results incomparable.
FROZEN = {
    "test": ["Li3N", "AB_cF8_225_a_b", "Cu2O", "ZnS"],
    "train": ["Al2O3", "C", "MgO", "H2O", "Å"],
    "validation": ["NaCl", "O2Si", "Fe", "GaAs", "Ti", "Ag"],
}


def test_the_split_is_the_one_of_all_earlier_results():
    for side, groups in FROZEN.items():
        assert split_of(groups, 0.25, 0.2).tolist() == [side] * len(groups)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=8), min_size=1, max_size=40),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
    st.randoms(),
)
def test_no_group_parts_and_the_test_side_ignores_all_else(groups, v1, v2, test, random):
    first = split_of(groups, v1, test)
    sides: dict[str, set[str]] = {}
    for group, side in zip(groups, first.tolist(), strict=True):
        sides.setdefault(group, set()).add(side)
    assert all(len(s) == 1 for s in sides.values())
    assert ((first == "test") == (split_of(groups, v2, test) == "test")).all()
    order = random.sample(range(len(groups)), len(groups))
    assert (split_of([groups[i] for i in order], v1, test) == first[order]).all()
    longer = split_of([*groups, "one more", "another"], v1, test)
    assert (longer[: len(groups)] == first).all()


def test_larger_fractions_only_add_groups():
    names = [f"group {i}" for i in range(2000)]
    small, large = split_of(names, 0.1, 0.1), split_of(names, 0.2, 0.3)
    for side in ("test", "validation"):
        assert set(np.flatnonzero(small == side)) < set(np.flatnonzero(large == side))


def test_fractions_are_about_right():
    counts = Counter(split_of([f"group {i}" for i in range(20_000)], 0.1, 0.2).tolist())
    for side, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        sigma = math.sqrt(share * (1 - share) / 20_000)
        assert abs(counts[side] / 20_000 - share) < 5 * sigma


def test_parts_hold_each_known_crystal_once_whatever_the_seed(clouds):
    parts = Parts.of(clouds, tiny(seed=0))
    rows = torch.cat([parts.rows[s] for s in SPLITS]).tolist()
    assert sorted(rows) == list(range(len(clouds)))
    other = Parts.of(clouds, tiny(seed=7))
    assert all(torch.equal(parts.rows[s], other.rows[s]) for s in SPLITS)
    counts = parts.class_counts(task_of("crystal_system").classes)
    assert sum(n for side in counts.values() for n in side.values()) == len(clouds)


def test_crystals_without_the_label_are_left_out():
    data = random_set(0, [2] * 60)
    values = data.labels["bulk_modulus"].copy()
    values[::3] = np.nan
    data = replace(data, labels={"bulk_modulus": values})
    parts = Parts.of(data, tiny(task="bulk_modulus"))
    rows = torch.cat([parts.rows[s] for s in SPLITS])
    assert sorted(rows.tolist()) == [i for i in range(60) if i % 3]
    assert (parts.target_N[::3] == UNKNOWN).all()


def test_missing_labels_and_classes_are_named():
    data = random_set(0, [2] * 60)
    with pytest.raises(UserError, match=r"no label shear_modulus.*it has bulk_modulus"):
        Parts.of(data, tiny(task="shear_modulus"))
    with pytest.raises(UserError, match=r"train: \d+ crystals, none of class stiff"):
        Parts.of(data, tiny(task="bulk_modulus", threshold=1e4))
    with pytest.raises(UserError, match="1 crystals, none of class monoclinic"):
        Parts.of(data.subset(np.arange(2)), tiny(task="crystal_system"))


# --- clouds in memory ----------------------------------------------------------------------------


def test_loading_does_not_depend_on_the_shards(clouds, tmp_path):
    config = FeaturizationConfig(selection="miller:2", shard_structures=17)
    manifest = featurize("prototypes:140", tmp_path / "other", config, OneProcess())
    assert len(manifest["shards"]) == 9
    other = load(tmp_path / "other")
    assert_equal(other, clouds)
    assert clouds.ids.tolist() == sorted(clouds.ids.tolist())


def test_loading_gives_what_the_shards_hold(clouds, dataset):
    entries = {e.id: e for path in (dataset / "shards").iterdir() for e in read_shard(path)}
    assert sorted(entries) == clouds.ids.tolist()
    for i, id_ in enumerate(clouds.ids):
        entry, points = entries[str(id_)], slice(clouds.offsets[i], clouds.offsets[i + 1])
        assert entry.group == clouds.groups[i]
        assert entry.symmetry.crystal_system == clouds.crystal_systems[i]
        assert np.array_equal(entry.cloud.hkl, clouds.hkl_P3[points])
        assert np.array_equal(entry.cloud.q, clouds.q_P3[points])
        assert np.array_equal(entry.cloud.intensity, clouds.intensity_P[points])
        assert np.array_equal(entry.cloud.multiplicity, clouds.multiplicity_P[points])
        assert np.allclose(entry.lattice, clouds.lattice_N33[i], atol=1e-6)
        assert (clouds.crystal_P[points] == i).all()


@pytest.mark.parametrize("damage", ["removed", "cut short", "a column is missing", "a bit"])
def test_a_damaged_shard_is_named_with_the_remedy(damage, dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    shard = min((folder / "shards").iterdir())
    if damage == "removed":
        shard.unlink()
    elif damage == "cut short":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "a bit":
        with h5py.File(shard) as file:  # of a coordinate, which HDF5 takes for a good one
            place = file["q"].id.get_offset()
        content = bytearray(shard.read_bytes())
        content[place + 1] ^= 1
        shard.write_bytes(content)
    else:
        with h5py.File(shard, "a") as file:
            del file["lattice"]
    with pytest.raises(UserError, match=f"{shard} is.* damaged.*\n.*verify.*--repair"):
        load(folder)


def test_one_of_several_radiations(tmp_path):
    both = SMALL.model_copy(update={"also_radiation": ("neutron",)})
    run("prototypes:20", tmp_path / "both", both)
    alone = SMALL.model_copy(update={"radiation": "neutron"})
    run("prototypes:20", tmp_path / "alone", alone)
    neutron = load(tmp_path / "both", "neutron")
    assert_equal(neutron, load(tmp_path / "alone"))
    assert_equal(load(tmp_path / "both"), load(tmp_path / "both", "xray"))
    assert not torch.equal(neutron.intensity_P, load(tmp_path / "both").intensity_P)
    with pytest.raises(UserError, match="no intensities of radiation electron"):
        load(tmp_path / "both", "electron")


def test_a_label_that_one_shard_does_not_know_is_nan_there(dataset, tmp_path):
    entries = read_shard(dataset / "shards" / "shard-000-0001-00000-00000.h5")[:6]
    config = FeaturizationConfig(selection="miller:2")
    with_label = [replace(e, labels={"band_gap": float(i)}) for i, e in enumerate(entries[:3])]
    rows = [
        write_shard(tmp_path / "shards" / "a.h5", entries[3:], config),
        write_shard(tmp_path / "shards" / "b.h5", with_label, config),
    ]
    with h5py.File(tmp_path / "shards" / "a.h5") as file:
        assert "band_gap" not in file["labels"]
    place = {"part": 0, "records": [], "present": 0}
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["shards"] = [row | place for row in rows]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data = load(tmp_path)
    known = {str(id_): v for id_, v in zip(data.ids, data.labels["band_gap"], strict=True)}
    assert [known[e.id] for e in entries[:3]] == [0.0, 1.0, 2.0]
    assert all(math.isnan(known[e.id]) for e in entries[3:])


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.booleans(), st.data())
def test_a_batch_has_both_mates_of_every_pair(lengths, origin, draw):
    data = random_set(1, lengths, origin=origin)
    number = len(lengths)
    rows = draw.draw(st.lists(st.integers(0, number - 1), max_size=9))
    batch = data.batch(torch.tensor(rows, dtype=torch.int64))
    expected_q, expected_i, expected_n = reference_batch(data, rows)
    assert batch.lengths_B.tolist() == expected_n
    assert batch.q_P3.tolist() == expected_q
    assert batch.intensity_P.tolist() == expected_i


def reference_batch(data, rows):
    """One crystal and one point at a time."""
    q_all, i_all, lengths = [], [], []
    for row in rows:
        before = len(q_all)
        for p in range(int(data.offsets[row]), int(data.offsets[row + 1])):
            q, intensity = data.q_P3[p], float(data.intensity_P[p])
            q_all.append(q.tolist())
            i_all.append(intensity)
            if int(data.multiplicity_P[p]) == 2:
                q_all.append((-q).tolist())
                i_all.append(intensity)
        lengths.append(len(q_all) - before)
    return q_all, i_all, lengths


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.data())
def test_a_subset_is_the_same_crystals(lengths, draw):
    data = random_set(2, lengths)
    rows = draw.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6, unique=True))
    part = data.subset(np.array(rows, dtype=np.int64))
    assert part.ids.tolist() == data.ids[rows].tolist()
    assert part.labels["bulk_modulus"].tolist() == data.labels["bulk_modulus"][rows].tolist()
    new, old = part.batch(torch.arange(len(rows))), data.batch(torch.tensor(rows).long())
    assert torch.equal(new.q_P3, old.q_P3)
    assert torch.equal(new.intensity_P, old.intensity_P)
    assert torch.equal(new.lengths_B, old.lengths_B)
    mask = np.isin(np.arange(len(lengths)), rows)
    assert_equal(data.subset(mask), data.subset(np.flatnonzero(mask)))


def test_one_crystal_of_one_point():
    data = random_set(3, [1])
    batch = data.batch(torch.tensor([0]))
    assert batch.q_P3.tolist() == [[0.0, 0.0, 0.0]]
    assert batch.lengths_B.tolist() == [1]
    assert random_set(3, [1], origin=False).batch(torch.tensor([0])).lengths_B.tolist() == [2]


def assert_equal(one, other):
    for name in ("ids", "groups", "crystal_systems"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    for name in ("offsets", "hkl_P3", "q_P3", "intensity_P", "multiplicity_P", "lattice_N33"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.labels.keys() == other.labels.keys()
    for name, values in one.labels.items():
        assert np.array_equal(values, other.labels[name], equal_nan=True)


# --- rotations -----------------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_rotations_are_proper_and_orthogonal():
    turns = random_rotations(5000, generator(0))
    assert turns.dtype == torch.float32
    eye = torch.eye(3, dtype=torch.float64)
    turns = turns.double()
    assert (turns @ turns.mT - eye).abs().max() < 1e-6
    assert (torch.linalg.det(turns) - 1).abs().max() < 1e-6  # never a reflection


def uniform_statistic(turns):
    """The largest distance between distributions, in units of 1/√n, over five marginals.

    On SO(3) with its Haar measure the rotation angle θ has the density (1 − cos θ)/π, and every
    matrix element is uniform in [−1, 1].
    """
    n = len(turns)
    cos = ((turns.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)
    theta = cos.acos()
    uniforms = [(theta - theta.sin()) / math.pi]
    uniforms += [(turns[:, i, j] + 1) / 2 for i, j in ((0, 0), (0, 1), (1, 2), (2, 2))]
    ranks = torch.arange(n) / n
    return max(
        float(torch.maximum((u.sort()[0] - ranks).abs(), (u.sort()[0] - ranks - 1 / n).abs()).max())
        for u in uniforms
    ) * math.sqrt(n)


def test_rotations_are_uniform():
    turns = random_rotations(20_000, generator(1)).double()
    assert abs(float(turns.diagonal(dim1=1, dim2=2).sum(1).mean())) < 5 / math.sqrt(20_000)
    assert uniform_statistic(turns) < 1.95  # Kolmogorov: p = 0.001 each


def test_the_statistic_finds_euler_angles_that_are_not_uniform():
    angles = torch.rand(20_000, 3, generator=generator(2), dtype=torch.float64) * 2 * math.pi
    c, s = angles.cos(), angles.sin()
    zero, one = torch.zeros(20_000).double(), torch.ones(20_000).double()

    def about_z(k):
        rows = [c[:, k], -s[:, k], zero, s[:, k], c[:, k], zero, zero, zero, one]
        return torch.stack(rows, 1).reshape(-1, 3, 3)

    rows = [one, zero, zero, zero, c[:, 1], -s[:, 1], zero, s[:, 1], c[:, 1]]
    wrong = about_z(0) @ torch.stack(rows, 1).reshape(-1, 3, 3) @ about_z(2)
    assert uniform_statistic(wrong) > 10


def test_each_cloud_of_a_batch_turns_by_its_own_rotation():
    data = random_set(4, [5, 1, 8])
    batch = data.batch(torch.tensor([2, 0, 1]))
    turns = random_rotations(3, generator(3))
    turned = batch.rotated(turns)
    assert torch.equal(turned.intensity_P, batch.intensity_P)
    parts = zip(
        batch.q_P3.split(batch.lengths_B.tolist()),
        turned.q_P3.split(batch.lengths_B.tolist()),
        turns,
        strict=True,
    )
    for before, after, turn in parts:
        assert torch.allclose(after, (turn @ before.T).T, atol=1e-6)
    assert isinstance(turned, CloudBatch)
    assert torch.equal(random_rotations(3, generator(3)), turns)
