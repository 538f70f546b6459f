"""The declared contrast and the view of single crystals, on grids with planted effects."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from simulated import plain, predictions, sampled

from ablation.catalogue import Catalogue
from ablation.contrast import SIDES, contrast, contrast_table, declared, sentence
from ablation.crystals import crystal_table, loss_table
from ablation.perturbations import ARMS
from ablation.trials import Condition, read_trials

ALIKE = {"none": 1.5, "directions_random": 1.0, "intensity_binary": 1.0, "intensity_shuffled": 1.0}


def judged(table, **options):
    row = contrast(sampled(table, resamples=100, **options), "pointnet", "auroc")
    return contrast_table({"task": row}).to_pylist()


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"directions_random": 0.2}, "supported"),
        ({"intensity_binary": 0.2, "intensity_shuffled": 0.3}, "contradicted"),
        ({}, "undecided"),
    ],
)
def test_a_planted_contrast_is_found_and_a_planted_null_is_not(changes, verdict):
    table = predictions(np.random.default_rng(0), plain(ALIKE | changes), crystals=300)
    (row,) = judged(table)
    assert row["verdict"] == verdict
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["difference"] == pytest.approx(row["symmetry"] - row["intensity"], abs=1e-9)
    assert (row["symmetry_arms"], row["intensity_arms"]) == tuple(map(", ".join, SIDES.values()))
    words = sentence(row)
    assert words.startswith(f"{verdict}: AUROC changes by −0.")
    assert f"{row['difference']:+.3f}".replace("-", "−") in words


def test_the_contrast_rarely_decides_what_is_not_there(monkeypatch):
    monkeypatch.setattr("ablation.significance._FLIPS", 200)
    monkeypatch.setattr("ablation.stats.METRICS", {"auroc": None})
    random = np.random.default_rng(1)
    decided = 0
    for _ in range(100):
        table = predictions(random, plain(ALIKE), crystals=60, between=0.2)
        samples = sampled(table, resamples=20)
        monkeypatch.setattr(samples, "_weights_RN", np.ones((21, 60)))  # p needs no resamples
        row = contrast(samples, "pointnet", "auroc")
        decided += row["p"] < 0.05
    assert decided <= 10


def test_declared_arms_exist_and_have_no_strength():
    assert not set(SIDES["symmetry"]) & set(SIDES["intensity"])
    for arm in (*SIDES["symmetry"], *SIDES["intensity"]):
        assert ARMS[arm].strength is None


def test_other_arms_strengths_modes_and_models_are_on_neither_side():
    conditions = plain(ALIKE | {"basis_only": 0.1})
    conditions |= {("pointnet", "directions_random", None, "test_only"): 0.1}
    conditions |= {("pointnet", "intensity_binary", 0.5, "retrain"): 0.1}
    conditions |= plain({"directions_random": 0.1}, "harmonic")
    random = np.random.default_rng(2)
    table = predictions(random, conditions, crystals=60)
    sides = declared(sampled(table, resamples=5), "pointnet")
    assert sides == {
        side: [Condition("pointnet", arm) for arm in arms] for side, arms in SIDES.items()
    }
    only = table.filter(pc.is_in(table["arm"].cast(pa.string()), pa.array(list(ALIKE))))
    only = only.filter(pc.equal(only["model"].cast(pa.string()), "pointnet"))
    only = only.filter(pc.equal(only["mode"].cast(pa.string()), "retrain"))
    only = only.filter(pc.is_null(only["strength"]))
    assert judged(table) == judged(only)


def test_a_side_without_trials_or_seeds_gives_no_test():
    random = np.random.default_rng(3)
    table = predictions(random, plain({"none": 1.0, "directions_random": 1.0}), crystals=40)
    assert judged(table) == []
    table = predictions(random, plain(ALIKE), crystals=40, seeds=(0, 1))
    trial = table["trial"].cast(pa.string())
    gone = pa.array(["pointnet-none-None-retrain-0", "pointnet-directions_random-None-retrain-1"])
    assert judged(table.filter(pc.invert(pc.is_in(trial, gone)))) == []


def test_one_seed_is_undecided_and_says_why():
    table = predictions(
        np.random.default_rng(4), plain(ALIKE | {"directions_random": 0.0}), seeds=(7,)
    )
    (row,) = judged(table)
    assert row["p"] < 0.05
    assert row["verdict"] == "undecided"
    assert "One seed" in sentence(row)


def test_tasks_are_corrected_together():
    row = {"model": "m", "metric": "auroc", "seeds": 3, "difference": -0.1}
    found = contrast_table({"a": row | {"p": 0.02}, "b": row | {"p": 0.03}, "c": None}).to_pylist()
    assert [r["p_holm"] for r in found] == [0.04, 0.04]
    found = contrast_table({"a": row | {"p": 0.03}, "b": row | {"p": 0.04}}).to_pylist()
    assert [r["verdict"] for r in found] == ["undecided"] * 2


# Crystals --------------------------------------------------------------------------------------


def by_hand(rights):
    """Predictions of eight crystals: (arm, seed) → which of them are right."""
    tables = []
    for (arm, seed), right in rights.items():
        label = np.arange(8) % 2
        p1 = np.where(np.array(right) == (label == 1), 0.9, 0.1)
        tables.append(
            pa.table(
                {
                    "trial": [f"{arm}-{seed}"] * 8,
                    "model": ["m"] * 8,
                    "arm": [arm] * 8,
                    "strength": pa.nulls(8, pa.float64()),
                    "mode": ["retrain"] * 8,
                    "seed": [seed] * 8,
                    "id": [f"c{i}" for i in range(8)],
                    "group": [f"g{i // 2}" for i in range(8)],
                    "label": label,
                    "p0": 1 - p1,
                    "p1": p1,
                }
            )
        )
    return pa.concat_tables(tables)


RIGHTS = {
    ("none", 0): [True] * 6 + [False] * 2,
    ("none", 1): [True] * 5 + [False] * 3,
    ("directions_random", 0): [False, True, True, True, True, True, True, False],
    ("directions_random", 1): [False, False, True, True, True, True, False, False],
    ("directions_random", 2): [False] * 8,  # no reference with this seed
}


def test_lost_and_gained_crystals_by_hand():
    table = crystal_table(read_trials(by_hand(RIGHTS)), "m", "task", ("no", "yes"), None)
    found = table.to_pydict()
    assert found["right"] == [1, 1, 1, 1, 1, 0.5, 0, 0]
    assert found["symmetry_lost"] == [1, 0.5, 0, 0, 0, 0, 0, 0]
    assert found["symmetry_gained"] == [0, 0, 0, 0, 0, 0.5, 0.5, 0]
    assert found["by_chance"] == [0, 0, 0, 0, 0, 0.5, 0, 0]
    assert found["p_true"][:6] == pytest.approx([0.9] * 5 + [0.5])
    assert found["class"] == ["no", "yes"] * 4
    assert found["intensity_lost"] == found["formula"] == found["space_group"] == [None] * 8


def test_losses_by_system_and_space_group():
    nothing = np.full(8, np.nan)
    catalogue = Catalogue(
        ids=np.array([f"c{i}" for i in range(8)]),
        groups=np.array(["g"] * 8),
        formulas=np.array([f"Si{i}" for i in range(8)]),
        crystal_systems=np.array(["cubic"] * 2 + ["trigonal"] * 6),
        bravais=np.array(["cP"] * 8),
        numbers=np.array([221, 225, 166, 166, 166, 166, 148, 148]),
        volumes=nothing,
        forward=nothing,
        radiation="xray",
    )
    crystals = crystal_table(read_trials(by_hand(RIGHTS)), "m", "task", ("no", "yes"), catalogue)
    assert crystals["formula"].to_pylist() == [f"Si{i}" for i in range(8)]
    rows = {(r["by"], r["part"]): r for r in loss_table(crystals).to_pylist()}
    assert rows["all", "all"]["symmetry_lost"] == pytest.approx(1.5 / 8)
    assert rows["crystal_system", "cubic"]["symmetry_lost"] == 0.75
    assert rows["crystal_system", "trigonal"]["symmetry_lost"] == 0
    assert rows["crystal_system", "trigonal"]["symmetry_lost_high"] > 0.3  # three groups only
    assert rows["space_group", "221"]["crystals"] == 1
    assert list(rows)[:3] == [
        ("all", "all"),
        ("crystal_system", "trigonal"),
        ("crystal_system", "cubic"),
    ]
    assert all(math.isnan(r["intensity_lost"]) for r in rows.values())


def test_without_a_reference_there_are_no_crystals():
    table = by_hand({("directions_random", 0): [True] * 8})
    found = crystal_table(read_trials(table), "m", "task", ("no", "yes"), None)
    assert found.num_rows == 0
    assert loss_table(found).num_rows == 0


def test_one_seed_has_no_chance():
    table = by_hand({k: v for k, v in RIGHTS.items() if k[1] == 0})
    found = crystal_table(read_trials(table), "m", "task", ("no", "yes"), None)
    assert found["by_chance"].to_pylist() == [None] * 8
