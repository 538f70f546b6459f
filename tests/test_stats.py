"""Tables of an ablation: planted effects, planted nulls, pairing, and tables that do not fit."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from simulated import plain, predictions, sampled

from ablation import stats
from ablation.significance import MARGIN, equivalence
from training.metrics import METRICS, evaluate, group_weights, score


def metric_table(predictions, **options):
    return stats.metric_table(sampled(predictions, **options))


def effect_table(predictions, **options):
    return stats.effect_table(sampled(predictions, **options))


def _simulated(random, skills, *, seeds=3, crystals=150, between=0.0, paired_between=0.0):
    """One binary task: arm → skill; half of the groups have two crystals.

    Hard crystals are hard for all trials; each training adds noise of its own, and, by `between`,
    a skill of its own, by `paired_between` one that all arms of this seed share.
    """
    group = np.minimum(np.arange(crystals), np.arange(crystals) % (2 * crystals // 3))
    labels = random.integers(2, size=crystals)
    hard = random.normal(size=crystals) + 0.7 * random.normal(size=crystals)[group]
    tables = []
    for seed in range(seeds):
        common = paired_between * random.normal()
        for arm, skill in skills.items():
            gain = skill + common + between * random.normal()
            logit = gain * (2 * labels - 1) + hard + 0.3 * random.normal(size=crystals)
            p = 1 / (1 + np.exp(-logit))
            tables.append(_table(f"{arm}-{seed}", arm, seed, group, labels, [1 - p, p]))
    return pa.concat_tables(tables)


def _table(trial, arm, seed, group, labels, columns):
    number = len(labels)
    return pa.table(
        {
            "trial": [trial] * number,
            "model": ["pointnet"] * number,
            "arm": [arm] * number,
            "strength": pa.nulls(number, pa.float64()),
            "mode": ["retrain"] * number,
            "seed": [seed] * number,
            "id": [f"mp-{i}" for i in range(number)],
            "group": [f"g{g}" for g in group],
            "label": labels,
            **{f"p{c}": column for c, column in enumerate(columns)},
        }
    )


def _row(table, arm, metric="auroc"):
    (row,) = (r for r in table.to_pylist() if r["arm"] == arm and r["metric"] == metric)
    return row


def _trial(predictions, name):
    """Labels, probabilities and groups of one trial, as they stand in the table."""
    rows = predictions.filter(pc.equal(predictions["trial"], name))
    names = [name for name in rows.column_names if name[0] == "p" and name[1:].isdigit()]
    probabilities = np.stack([rows[name].to_numpy() for name in names], axis=1)
    return rows["label"].to_numpy(), probabilities, rows["group"].to_pylist()


def test_tables_have_the_columns_the_report_reads_in_the_order_of_appearance():
    random = np.random.default_rng(0)
    predictions = _simulated(random, {"none": 1.5, "z": 1.0, "a": 0.5}, seeds=2)
    table = metric_table(predictions, resamples=20)
    keys = ["model", "arm", "strength", "mode", "metric"]
    assert table.column_names == [*keys, "value", "low", "high"]
    assert table["arm"].to_pylist() == [a for a in ("none", "z", "a") for _ in METRICS]
    assert table["metric"].to_pylist() == list(METRICS) * 3
    effects = effect_table(predictions, resamples=20)
    assert effects.column_names[:13] == [
        *(*keys, "none", "value", "difference", "low", "high", "low90", "high90", "seeds")
    ]
    assert effects["arm"].to_pylist() == [a for a in ("z", "a") for _ in METRICS]
    assert pa.types.is_integer(effects.schema.field("seeds").type)
    only = predictions.filter(pc.equal(predictions["arm"], "none"))
    assert effect_table(only, resamples=20).num_rows == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_one_seed_is_the_group_bootstrap_of_the_crystals(classes):
    random = np.random.default_rng(1)
    labels = random.integers(classes, size=120)
    tables = []
    for arm in ("none", "radial"):
        p = random.dirichlet(np.ones(classes), size=120) + np.eye(classes)[labels] * 0.2
        p /= p.sum(axis=1, keepdims=True)
        tables.append(_table(arm, arm, 7, np.arange(120) // 2, labels, p.T))
    predictions = pa.concat_tables(tables)
    table = metric_table(predictions, resamples=50, seed=3)
    effects = effect_table(predictions, resamples=50, seed=3)
    samples = {}
    for arm in ("none", "radial"):
        labels, p, groups = _trial(predictions, arm)
        alone = evaluate(labels, p, groups, resamples=50, seed=3)
        for name, interval in alone.items():
            row = _row(table, arm, name)
            expected = [interval.value, interval.low, interval.high]
            assert [row["value"], row["low"], row["high"]] == pytest.approx(expected, abs=1e-12)
        samples[arm] = score(labels, p, group_weights(groups, 50, 3))
    for name in METRICS:
        row = _row(effects, "radial", name)
        difference = samples["radial"][name] - samples["none"][name]
        assert [row["low"], row["high"]] == pytest.approx(
            np.nanpercentile(difference, (2.5, 97.5)), abs=1e-12
        )
        assert row["difference"] == pytest.approx(row["value"] - row["none"], abs=1e-12)
        assert row["seeds"] == 1


def test_the_interval_is_crystals_and_trainings_written_out():
    random = np.random.default_rng(22)
    predictions = _simulated(random, {"none": 1.2, "radial": 1.0}, crystals=80)
    trials = {a: [_trial(predictions, f"{a}-{s}") for s in range(3)] for a in ("none", "radial")}
    labels, _, groups = trials["none"][0]
    members = {g: np.flatnonzero(np.array(groups) == g) for g in set(groups)}
    counts = [np.ones(80, dtype=int)]  # the whole set, then 1000 draws of groups
    for _ in range(1000):
        names = random.choice(sorted(members), size=len(members))
        rows = np.concatenate([members[name] for name in names])
        counts.append(np.bincount(rows, minlength=80))
    none, radial = (
        np.stack([score(labels, p, np.stack(counts))["auroc"] for _, p, _ in trials[arm]])
        for arm in ("none", "radial")
    )
    mean, *draws = (radial - none).mean(axis=0)
    # What three trainings do not agree on counts once: a third of the variance of one training's
    # deviation from their mean, unbiased.
    apart = ((radial - none)[:, 1:] - draws).var(axis=1).sum() / 2
    draws = mean + math.sqrt(1 - apart / 3 / np.var(draws)) * (np.array(draws) - mean)
    error = math.sqrt(sum(((radial - none)[:, 0] - mean) ** 2) / 2 / 3)
    # Student's t by its definition: a normal variate over the root of χ² by its 2 degrees.
    normals = random.normal(size=(3, 1000, 50))
    noise = error * normals[0] / np.sqrt((normals[1:] ** 2).mean(axis=0))
    row = _row(effect_table(predictions, resamples=1000), "radial")
    assert row["difference"] == pytest.approx(mean, abs=1e-12)
    low, high = np.percentile(draws[:, None] + noise, (2.5, 97.5))
    assert [row["low"], row["high"]] == pytest.approx([low, high], abs=0.04 * (high - low))
    # Variants that must fail: crystals alone, trainings alone.
    for part in (draws, mean + noise):
        low, high = np.percentile(part, (2.5, 97.5))
        assert row["high"] - row["low"] > 1.15 * (high - low)


# 97.5 percentiles of Student's t with S − 1 degrees of freedom, from his table.
@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_without_doubt_about_the_crystals_the_interval_is_students(seeds, t):
    # Two groups with the same crystals: every resample has the same metrics as the whole set.
    random = np.random.default_rng(12)
    labels = np.tile(random.integers(2, size=100), 2)
    tables = []
    for seed in range(seeds):
        for arm in ("none", "arm"):
            logit = labels + np.tile(random.normal(size=100), 2)
            p = 1 / (1 + np.exp(-logit))
            name = f"{arm}-{seed}"
            tables.append(_table(name, arm, seed, np.arange(200) // 100, labels, [1 - p, p]))
    predictions = pa.concat_tables(tables)
    whole = {
        a: [score(*_trial(predictions, f"{a}-{s}")[:2])["auroc"][0] for s in range(seeds)]
        for a in ("none", "arm")
    }
    found = (
        (_row(metric_table(predictions), "arm"), whole["arm"]),
        (_row(effect_table(predictions), "arm"), np.subtract(whole["arm"], whole["none"])),
    )
    for row, values in found:
        half = t * np.std(values, ddof=1) / math.sqrt(seeds)
        assert 0 < half < 0.4  # not cut at the metric's limits
        for end in (np.mean(values) - row["low"], row["high"] - np.mean(values)):
            # ± 7 %: the normal's 1.96 and ddof=0 (0.71, 0.82, 0.89 of the width) must fail.
            assert end == pytest.approx(half, rel=0.07)


@pytest.mark.parametrize(("seeds", "skill"), [(2, 1.0), (3, 1.5)])
def test_a_planted_effect_is_found_and_has_the_planted_sign(seeds, skill):
    random = np.random.default_rng(3)
    skills = {"none": skill, "worse": skill - 1, "better": skill + 1}
    predictions = _simulated(random, skills, seeds=seeds, crystals=300)
    effects = effect_table(predictions, resamples=300)
    worse, better = _row(effects, "worse"), _row(effects, "better")
    assert worse["low"] <= worse["difference"] <= worse["high"] < 0
    assert 0 < better["low"] <= better["difference"] <= better["high"]
    whole = [score(*_trial(predictions, f"worse-{s}")[:2])["auroc"][0] for s in range(seeds)]
    assert worse["value"] == pytest.approx(np.mean(whole), abs=1e-12)
    assert worse["none"] == pytest.approx(_row(metric_table(predictions), "none")["value"])


@pytest.mark.parametrize("between", [0.0, 0.3])
def test_a_planted_null_is_rarely_called_an_effect(between, monkeypatch):
    # Arms of equal merit with one, two and three pairs; trainings differ by noise on single
    # crystals, and with `between` some are better than others throughout.
    monkeypatch.setattr("ablation.stats.METRICS", {"auroc": METRICS["auroc"]})  # it is faster
    monkeypatch.setattr("ablation.stats.TESTED", ("auroc",))
    monkeypatch.setattr("ablation.significance._FLIPS", 100)
    random = np.random.default_rng(4)
    names = {"one": 1, "two": 2, "three": 3}
    dropped = pa.array([f"{arm}-{s}" for arm, seeds in names.items() for s in range(seeds, 3)])
    called, simulations = dict.fromkeys(names, 0), 120
    for seed in range(simulations):
        predictions = _simulated(
            random, dict.fromkeys(("none", *names), 1.0), crystals=80, between=between
        )
        kept = predictions.filter(pc.invert(pc.is_in(predictions["trial"], dropped)))
        effects = effect_table(kept, resamples=100, seed=seed)
        for arm, seeds in names.items():
            row = _row(effects, arm)
            assert row["seeds"] == seeds
            called[arm] += not row["low"] <= 0 <= row["high"]
    rate = {arm: number / simulations for arm, number in called.items()}
    assert max(rate["two"], rate["three"]) <= 0.1
    if between:
        assert rate["one"] >= 0.4  # the variant that must fail: crystals only
    else:
        assert 0.005 <= rate["one"] <= 0.12


def test_impossible_values_are_not_in_an_interval():
    # One training succeeds and one does the contrary: two values say next to nothing.
    random = np.random.default_rng(13)
    labels = random.integers(2, size=60)
    p = np.clip(labels * 0.6 + 0.2 + 0.2 * random.normal(size=60), 0.01, 0.99)
    values = {"none-0": p, "none-1": p, "a-0": p, "a-1": 1 - p}
    predictions = pa.concat_tables(
        _table(name, name[:-2], int(name[-1]), range(60), labels, [1 - p, p])
        for name, p in values.items()
    )
    for name, metric in METRICS.items():
        row = _row(metric_table(predictions, resamples=50), "a", name)
        assert [row["low"], row["high"]] == [metric.low, metric.high]
        row = _row(effect_table(predictions, resamples=50), "a", name)
        assert [row["low"], row["high"]] == [metric.low - metric.high, metric.high - metric.low]


def test_pairing_narrows_the_interval():
    random = np.random.default_rng(6)
    predictions = _simulated(random, {"none": 1.2, "arm": 1.1}, crystals=300)
    paired = _row(effect_table(predictions, resamples=400), "arm")
    table = metric_table(predictions, resamples=400)
    none, arm = _row(table, "none"), _row(table, "arm")
    unpaired = math.hypot(none["high"] - none["low"], arm["high"] - arm["low"])
    assert paired["high"] - paired["low"] < 0.6 * unpaired


def test_seeds_are_paired_by_number():
    # A seed helps or hurts all arms alike; with the seeds of one arm exchanged nothing cancels.
    random = np.random.default_rng(7)
    predictions = _simulated(random, {"none": 1.2, "arm": 1.1}, seeds=5, paired_between=0.6)
    seeds, arms = predictions["seed"].to_pylist(), predictions["arm"].to_pylist()
    moved = [(s + 1) % 5 if a == "arm" else s for s, a in zip(seeds, arms, strict=True)]
    index = predictions.column_names.index("seed")
    broken = predictions.set_column(index, "seed", pa.array(moved))
    width = {}
    for name, table in (("right", predictions), ("broken", broken)):
        row = _row(effect_table(table, resamples=300), "arm")
        width[name] = row["high"] - row["low"]
    assert width["right"] < 0.6 * width["broken"]


def test_the_order_of_rows_does_not_matter():
    random = np.random.default_rng(8)
    predictions = _simulated(random, {"none": 1.0, "a": 0.5, "b": 0.7}, seeds=2, crystals=60)
    order = random.permutation(predictions.num_rows)
    # The first appearance of each arm decides the order of the rows of the result.
    keep = [0, *sorted(set(order.tolist()) - {0}, key=order.tolist().index)]
    mixed = predictions.take(keep).select(predictions.column_names[::-1])
    for make in (metric_table, effect_table):
        expected = make(predictions, resamples=40).sort_by([("arm", "ascending")]).to_pylist()
        found = make(mixed, resamples=40).sort_by([("arm", "ascending")]).to_pylist()
        assert sorted(map(str, found)) == sorted(map(str, expected))


def test_an_arm_says_the_same_whatever_else_was_run():
    random = np.random.default_rng(9)
    predictions = _simulated(random, {"none": 1.0, "a": 0.5, "b": 0.7}, seeds=2, crystals=60)
    fewer = predictions.filter(pc.not_equal(predictions["arm"], "a"))
    for make in (metric_table, effect_table):
        of_b = []
        for table in (predictions, fewer):
            rows = [r for r in make(table, resamples=40).to_pylist() if r["arm"] == "b"]
            of_family = {"p_holm", "p_equivalence_holm", "verdict"}
            of_b.append([{k: v for k, v in r.items() if k not in of_family} for r in rows])
        assert of_b[0] == of_b[1]


def test_only_seeds_in_both_arms_are_paired():
    random = np.random.default_rng(10)
    predictions = _simulated(random, {"none": 1.0, "a": 0.5, "b": 0.7}, seeds=3, crystals=60)
    missing = pa.array(["none-0", "a-2", "b-1", "b-2"])
    kept = predictions.filter(pc.invert(pc.is_in(predictions["trial"], missing)))
    effects = effect_table(kept, resamples=40)
    assert set(effects["arm"].to_pylist()) == {"a"}  # b and none have no seed in common
    row = _row(effects, "a")
    assert row["seeds"] == 1
    both = [score(*_trial(kept, f"{arm}-1")[:2])["auroc"][0] for arm in ("none", "a")]
    assert [row["none"], row["value"]] == pytest.approx(both, abs=1e-12)
    assert set(metric_table(kept, resamples=40)["arm"].to_pylist()) == {"none", "a", "b"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_class_gives_nan_and_no_exception(seeds):
    labels, halves = np.zeros(6, dtype=np.int64), np.full((2, 6), 0.5)
    arms = [
        _table(f"{a}-{s}", a, s, np.arange(6), labels, halves)
        for a in ("none", "a")
        for s in range(seeds)
    ]
    row = _row(effect_table(pa.concat_tables(arms), resamples=20), "a")
    assert all(math.isnan(row[name]) for name in ("none", "value", "difference", "low", "high"))
    assert _row(effect_table(pa.concat_tables(arms), resamples=20), "a", "ece")["difference"] == 0


def test_verdicts_of_a_planted_effect_and_a_planted_null():
    random = np.random.default_rng(20)
    conditions = plain({"none": 2.0, "loss": 1.2, "twin": 2.0})
    conditions |= {("pointnet", "jitter", dose, "test_only"): 2.0 - dose for dose in (0.0, 1.0)}
    table = predictions(random, conditions, crystals=600, seeds=range(4))
    rows = [r for r in effect_table(table, resamples=200).to_pylist() if r["metric"] == "auroc"]
    found = {(r["arm"], r["strength"], r["mode"]): r for r in rows}
    assert found["loss", None, "retrain"]["verdict"] == "effect"
    assert found["twin", None, "retrain"]["verdict"] == "no effect"
    assert found["jitter", 0.0, "test_only"]["verdict"] == "no effect"
    assert found["jitter", 1.0, "test_only"]["verdict"] == "effect"
    for row in rows:
        assert row["low"] < row["low90"] <= row["high90"] < row["high"]
        assert row["equivalent_within"] == max(-row["low90"], row["high90"])
        assert row["p"] <= row["p_holm"] <= 4 * row["p"] + 1e-12
        assert row["p_seeds"] >= 1 / 8
    assert found["loss", None, "retrain"]["visible"] < 0.05


def test_each_model_is_compared_with_its_own_reference():
    random = np.random.default_rng(21)
    conditions = plain({"none": 2.0, "a": 1.0}) | plain({"none": 0.5, "a": 1.0}, "harmonic")
    table = predictions(random, conditions | plain({"a": 1.0}, "powder"), crystals=200)
    rows = [r for r in effect_table(table, resamples=40).to_pylist() if r["metric"] == "auroc"]
    signs = {row["model"]: row["difference"] > 0 for row in rows}
    assert signs == {"pointnet": False, "harmonic": True}  # powder has no reference


def test_the_equivalence_test_keeps_its_size():
    # The true change is the margin: it may be called none in 5 % of the cases. In each, the whole
    # set's values of three seeds, and resamples that scatter as the choice of crystals does.
    random = np.random.default_rng(23)
    called, naive = 0, 0
    for number in range(400):
        whole = -MARGIN + 0.004 * random.normal() + 0.003 * random.normal(size=(3, 1))
        drawn = whole + 0.004 * random.normal(size=300)
        _, draws = stats.spread_out(np.concatenate([whole, drawn], axis=1), number)
        called += equivalence(draws)[0] < 0.05
        naive += abs(whole.mean()) < MARGIN  # the variant that must fail: no test at all
    assert 0.005 <= called / 400 <= 0.08
    assert naive / 400 > 0.4
