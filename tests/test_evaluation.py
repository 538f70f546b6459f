"""Calibration, comparison, breakdown, ensembles, leakage, learning curve: against oracles."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import sampled
from sklearn import metrics as oracle
from small import random_set, tiny

from ablation.stats import effect_table
from cluster.errors import UserError
from training.breakdown import by_class, by_part
from training.calibration import TEMPERATURES, fit_temperature, log_loss, reliability, scaled
from training.comparison import delong, paired_bootstrap
from training.leakage import TOLERANCE, audit, nearest, radial_profiles, shared_groups
from training.metrics import METRICS, evaluate, score
from training.proportion import proportion
from training.rotations import random_rotations
from training.split import Parts, kept_of, split_of
from training.uncertainty import combine, doubt_and_error, risk_coverage


def _two(p):
    """Probability of class 1 → of both."""
    return np.stack([1 - p, p], axis=1)


def _alone(number):
    """Each crystal its own group."""
    return [f"g{i}" for i in range(number)]


def _drawn(random, probabilities_NC):
    """Labels that the probabilities speak the truth about."""
    return (random.random((len(probabilities_NC), 1)) > probabilities_NC.cumsum(axis=1)).sum(axis=1)


# Proportions.


def test_wilson_bounds_are_where_the_score_test_stops_rejecting():
    z = 1.959963984540054
    for hits, number in ((0, 9), (3, 9), (9, 9), (40, 200)):
        found = proportion(np.arange(number) < hits, _alone(number))
        assert found.value == hits / number
        assert (found.low == 0) == (hits == 0)
        for bound in {found.low, found.high} - {0.0, 1.0}:
            distance = abs(found.value - bound)
            assert distance == pytest.approx(z * math.sqrt(bound * (1 - bound) / number))
    assert proportion([True] * 5, list("aaaaa")).low == proportion([True], ["a"]).low
    assert math.isnan(proportion([], []).value)
    with pytest.raises(ValueError, match="groups_N has 1 entries for 2"):
        proportion([True, False], ["a"])


def test_an_interval_of_a_proportion_covers_it_also_when_groups_are_hit_together():
    random = np.random.default_rng(0)
    covered, naive, simulations = 0, 0, 400
    for _ in range(simulations):
        sizes = random.integers(1, 9, size=40)
        hits = np.repeat(random.random(40) < 0.3, sizes)
        groups = np.repeat(np.arange(40), sizes).astype(str).tolist()
        by_group, alone = proportion(hits, groups), proportion(hits, _alone(len(hits)))
        covered += by_group.low <= 0.3 <= by_group.high
        naive += alone.low <= 0.3 <= alone.high
    assert covered / simulations >= 0.92
    assert naive / simulations < 0.8  # the variant that must fail


# Calibration.


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_the_temperature_of_a_simulation_is_found(classes, truth):
    random = np.random.default_rng(classes)
    logits = 2 * truth * random.normal(size=(20_000, classes))
    labels = _drawn(random, scaled(logits, truth))
    assert fit_temperature(labels, logits) == pytest.approx(truth, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 30), st.floats(-2, 3))
def test_no_temperature_of_a_fine_grid_is_better_and_one_is_never(seed, classes, number, power):
    random = np.random.default_rng(seed)
    logits = 10**power * random.normal(size=(number, classes))
    labels = random.integers(classes, size=number)
    fitted = fit_temperature(labels, logits)
    loss = log_loss(labels, logits, fitted)
    assert TEMPERATURES[0] <= fitted <= TEMPERATURES[1]
    assert loss <= log_loss(labels, logits)
    grid = np.geomspace(*TEMPERATURES, 200)
    best = min(log_loss(labels, logits, t) for t in grid)
    assert loss <= best + 1e-12 * (1 + abs(best))


def test_temperatures_at_the_ends_and_of_logits_that_say_nothing():
    apart = np.array([[9.0, 0.0], [0.0, 9.0]])
    assert fit_temperature([0, 1], apart) == pytest.approx(TEMPERATURES[0])
    assert fit_temperature([1, 0], apart) == pytest.approx(TEMPERATURES[1])
    assert fit_temperature([0, 1, 1], np.full((3, 2), 4.0)) == 1.0
    big = np.array([[1e4, -1e4], [1e4, -1e4]])
    assert np.isfinite(log_loss([0, 1], big, 0.01))
    assert np.isfinite(scaled(big, 0.01)).all()


def test_log_loss_and_scaling_agree_with_scikit_learn_and_keep_the_order():
    random = np.random.default_rng(1)
    logits, labels = random.normal(size=(300, 3)), random.integers(3, size=300)
    for temperature in (0.5, 1.0, 4.0):
        probabilities = scaled(logits, temperature)
        expected = oracle.log_loss(labels, probabilities, labels=[0, 1, 2])
        assert log_loss(labels, logits, temperature) == pytest.approx(expected)
        assert (probabilities.argmax(axis=1) == logits.argmax(axis=1)).all()
    np.testing.assert_allclose(scaled(np.log(scaled(logits, 1.0)), 2.0), scaled(logits, 2.0))


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([], np.zeros((0, 2)), "labels_N is empty"),
        ([0], [[0.0]], r"shape \(1, 1\)"),
        ([0, 1], [[0.0, 1.0]], r"labels_N \(2,\)"),
        ([0], [[0.0, math.nan]], r"logits_NC\[0\] = .*finite"),
        ([2], [[0.0, 1.0]], "labels_N must be integers 0 … 1"),
        ([-1], [[0.0, 1.0]], "labels_N must be integers 0 … 1"),
        ([0.5], [[0.0, 1.0]], "labels_N must be integers 0 … 1"),
    ],
)
def test_fitting_names_wrong_input(labels, logits, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(labels, logits)
    with pytest.raises(ValueError, match="temperature = 0"):
        scaled([[0.0, 1.0]], 0)


@pytest.mark.parametrize("classes", [2, 5])
def test_reliability_adds_up_to_the_expected_calibration_error(classes):
    random = np.random.default_rng(2)
    probabilities = random.dirichlet(np.ones(classes), size=500)
    labels = random.integers(classes, size=500)
    table = reliability(labels, probabilities, _alone(500))
    assert sum(bin_.count for bin_ in table) == 500
    assert (table[0].low, table[-1].high) == (0.0, 1.0)
    filled = [bin_ for bin_ in table if bin_.count]
    error = sum(bin_.count * abs(bin_.accuracy.value - bin_.confidence) for bin_ in filled) / 500
    assert error == pytest.approx(score(labels, probabilities)["ece"][0], abs=1e-12)
    for bin_ in filled:
        assert bin_.low < bin_.confidence <= bin_.high + 1e-12
        assert bin_.accuracy.low <= bin_.accuracy.value <= bin_.accuracy.high
    assert all(
        math.isnan(b.confidence) and math.isnan(b.accuracy.low) for b in table if not b.count
    )
    edge = reliability([0, 0], [[0.6, 0.4], [0.61, 0.39]], ["a", "b"])  # 0.6 = 9/15 ends a bin
    assert [number for number, bin_ in enumerate(edge) if bin_.count] == [8, 9]
    with pytest.raises(ValueError, match="groups_N has 1 entries"):
        reliability(labels, probabilities, ["a"])
    with pytest.raises(ValueError, match="softmax"):
        reliability(labels, 3 * probabilities, _alone(500))


def test_reliability_shows_an_overconfident_network_and_a_temperature_cures_it():
    random = np.random.default_rng(3)
    logits = 1.5 * random.normal(size=(8000, 3))
    labels, sure = _drawn(random, scaled(logits, 1.0)), 4 * logits

    def share_of_bins_that_cover(probabilities):
        table = [b for b in reliability(labels, probabilities, _alone(8000)) if b.count > 20]
        return np.mean([b.accuracy.low <= b.confidence <= b.accuracy.high for b in table])

    half = slice(0, 4000)  # fitted here, judged on all
    cured = scaled(sure, fit_temperature(labels[half], sure[half]))
    assert share_of_bins_that_cover(cured) >= 0.8
    assert share_of_bins_that_cover(scaled(sure, 1.0)) <= 0.2
    assert score(labels, cured)["ece"][0] < 0.25 * score(labels, scaled(sure, 1.0))["ece"][0]


# Comparison.


def _delong_by_hand(labels, first, second):
    """Difference and its variance from all pairs (DeLong et al. 1988, eqs. 4 to 6)."""
    own = []
    for score_N in (first, second):
        x, y = score_N[labels == 1], score_N[labels == 0]
        own.append((x[:, None] > y) + (x[:, None] == y) / 2)
    psi = own[0] - own[1]
    variance = psi.mean(axis=1).var(ddof=1) / len(psi) + psi.mean(axis=0).var(ddof=1) / len(psi[0])
    return psi.mean(), variance


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 40), st.integers(2, 50))
def test_delong_is_the_sum_over_all_pairs(seed, number, steps):
    random = np.random.default_rng(seed)
    labels = np.array([0, 0, 1, 1, *random.integers(2, size=number)])
    first, second = random.integers(steps, size=(2, len(labels))) / steps
    found = delong(labels, _two(first), _two(second), _alone(len(labels)))
    difference, variance = _delong_by_hand(labels, first, second)
    assert found.value == pytest.approx(oracle.roc_auc_score(labels, first))
    assert found.reference == pytest.approx(oracle.roc_auc_score(labels, second))
    assert found.difference.value == pytest.approx(difference, abs=1e-12)
    half = (found.difference.high - found.difference.low) / 2
    assert half == pytest.approx(1.959963984540054 * math.sqrt(variance), abs=1e-9)
    # Other way round, and through a monotone transform, it is the same test.
    back = delong(labels, _two(second), _two(first), _alone(len(labels)))
    assert back.difference.value == -found.difference.value
    assert back.p == found.p
    again = delong(labels, _two(first**3 / 2), _two(second), _alone(len(labels)))
    assert again.p == pytest.approx(found.p, abs=1e-12)
    # p is below 5 % exactly where the interval leaves 0 out.
    outside = not found.difference.low <= 0 <= found.difference.high
    assert outside == (found.p < 0.05) or abs(found.p - 0.05) < 1e-9 or variance < 1e-20


def _rivals(random, groups, size, *, gain=0.0, mixed=False):
    """Labels, and two models that share hard groups and have errors by group too.

    The crystals of a group are of one class unless `mixed`.
    """
    labels = np.repeat(random.integers(2, size=groups), size)
    if mixed:
        labels = random.integers(2, size=groups * size)
    hard = random.normal(size=groups)
    p = [
        1 / (1 + np.exp(-(skill * labels + np.repeat(hard + own, size) + noise)))
        for skill, own, noise in zip(
            (1.5 + gain, 1.5),
            0.7 * random.normal(size=(2, groups)),
            0.2 * random.normal(size=(2, groups * size)),
            strict=True,
        )
    ]
    return labels, _two(p[0]), _two(p[1]), np.repeat(np.arange(groups), size).astype(str).tolist()


def test_delong_rejects_as_often_as_it_says_and_only_if_told_of_groups():
    random = np.random.default_rng(4)
    grouped, naive, found, simulations = 0, 0, 0, 200
    for _ in range(simulations):
        labels, first, second, groups = _rivals(random, 60, 4)
        grouped += delong(labels, first, second, groups).p < 0.05
        naive += delong(labels, first, second, _alone(240)).p < 0.05
        labels, first, second, groups = _rivals(random, 60, 4, gain=1.0)
        found += delong(labels, first, second, groups).p < 0.05
    assert 0.02 <= grouped / simulations <= 0.09
    assert naive / simulations > 0.2  # the variant that must fail
    assert found / simulations > 0.6


def test_delong_and_the_bootstrap_agree_on_the_same_crystals():
    random = np.random.default_rng(5)
    for gain, mixed in itertools.product((0.0, 0.5), (False, True)):
        example = _rivals(random, 60, 8, gain=gain, mixed=mixed)
        by_parts, by_draws = delong(*example), paired_bootstrap(*example)["auroc"]
        assert by_parts.difference.value == by_draws.difference.value
        widths = [c.difference.high - c.difference.low for c in (by_parts, by_draws)]
        assert widths[0] == pytest.approx(widths[1], rel=0.1)
        assert by_parts.p == pytest.approx(by_draws.p, abs=0.1)


def test_the_bootstrap_is_that_of_an_ablation_with_one_seed():
    random = np.random.default_rng(6)
    labels, first, second, groups = _rivals(random, 40, 2)
    tables = [
        pa.table(
            {
                "trial": [arm] * 80,
                "model": ["pointnet"] * 80,
                "arm": [arm] * 80,
                "strength": pa.nulls(80, pa.float64()),
                "mode": ["retrain"] * 80,
                "seed": [0] * 80,
                "id": [f"{i:03d}" for i in range(80)],
                "group": groups,
                "label": labels,
                "p0": p[:, 0],
                "p1": p[:, 1],
            }
        )
        for arm, p in (("none", second), ("arm", first))
    ]
    expected = effect_table(sampled(pa.concat_tables(tables), resamples=200, seed=7)).to_pylist()
    found = paired_bootstrap(labels, first, second, groups, resamples=200, seed=7)
    assert list(found) == list(METRICS)
    for row in expected:
        c = found[row["metric"]]
        assert (c.value, c.reference) == (row["value"], row["none"])
        interval = (c.difference.value, c.difference.low, c.difference.high)
        assert interval == (row["difference"], row["low"], row["high"])


def test_the_p_of_the_bootstrap_goes_with_its_interval_and_is_never_zero():
    random = np.random.default_rng(7)
    for gain in (-2.0, 0.0, 0.3, 0.6, 3.0):
        for c in paired_bootstrap(*_rivals(random, 60, 2, gain=gain), resamples=400).values():
            assert 2 / 401 <= c.p <= 1
            outside = not c.difference.low <= 0 <= c.difference.high
            assert outside == (c.p < 0.05) or abs(c.p - 0.05) < 0.02
    assert c.p > 0  # ece, of the largest gain
    labels, first, second, groups = _rivals(random, 60, 2, gain=3.0)
    assert paired_bootstrap(labels, first, second, groups, resamples=400)["auroc"].p == 2 / 401


def test_equal_models_and_sets_that_cannot_be_compared():
    random = np.random.default_rng(8)
    labels, first, _, groups = _rivals(random, 20, 2)
    same = [delong(labels, first, first, groups)]
    same += paired_bootstrap(labels, first, first, groups, resamples=50).values()
    for c in same:
        assert (c.difference.value, c.difference.low, c.difference.high, c.p) == (0, 0, 0, 1)
    right, wrong = _two(labels * 0.8 + 0.1), _two(0.9 - labels * 0.8)
    assert delong(labels, right, wrong, groups).p == 0
    lonely = delong([0, 0, 1], _two(np.array([0.1, 0.2, 0.3])), _two(np.ones(3)), list("abc"))
    assert lonely.difference.value == 0.5
    assert math.isnan(lonely.p)
    assert math.isnan(lonely.difference.low)
    none = delong([1, 1], _two(np.ones(2)), _two(np.ones(2)), list("ab"))
    assert math.isnan(none.value)
    assert math.isnan(none.p)
    one_group = paired_bootstrap(labels, first, wrong, ["a"] * 40, resamples=20)["auroc"]
    assert math.isnan(one_group.p)
    assert math.isnan(one_group.difference.low)


def test_comparison_names_wrong_input():
    three = np.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match="two classes: compare more with paired_bootstrap"):
        delong([0, 1], three, three, ["a", "b"])
    with pytest.raises(ValueError, match="groups_N has 1 entries for 2 labels"):
        delong([0, 1], three[:, :2] * 1.5, three[:, :2] * 1.5, ["a"])
    with pytest.raises(ValueError, match="groups_N has 1 entries for 2 labels"):
        paired_bootstrap([0, 1], three, three, ["a"])
    with pytest.raises(ValueError, match=r"\(2, 3\) and reference_NC \(2, 2\)"):
        paired_bootstrap([0, 1], three, three[:, :2] * 1.5, ["a", "b"])


# Breakdown.


def test_a_part_scores_what_it_scores_alone():
    random = np.random.default_rng(9)
    labels, p, _, groups = _rivals(random, 80, 2)
    parts = np.where(np.arange(160) < 120, "cubic", "hexagonal")
    parts[:2] = "triclinic"  # one group, one class
    found = by_part(labels, p, parts, groups, resamples=50, seed=1)
    assert list(found) == ["cubic", "hexagonal", "triclinic"]
    for name, part in found.items():
        rows = parts == name
        own = np.array(groups)[rows].tolist()
        expected = evaluate(labels[rows], p[rows], own, resamples=50, seed=1)
        assert repr(part.metrics) == repr(expected)
        assert part.structures == rows.sum() == sum(part.class_counts)
        assert part.groups == len(set(own))
    assert found["cubic"].class_counts == np.bincount(labels[2:120], minlength=2).tolist()
    assert math.isnan(found["triclinic"].metrics["auroc"].value)
    with pytest.raises(ValueError, match="parts_N has 1 and groups_N 160 entries for 160"):
        by_part(labels, p, ["a"], groups)


@pytest.mark.parametrize("classes", [2, 5])
def test_classes_agree_with_scikit_learn_and_average_to_the_metrics(classes):
    random = np.random.default_rng(10)
    probabilities = random.dirichlet(np.ones(classes), size=400)
    labels = _drawn(random, probabilities)
    predicted = probabilities.argmax(axis=1)
    groups = (np.arange(400) // 2).astype(str).tolist()
    found = by_class(labels, probabilities, groups, resamples=100)
    precision, recall, f1, _ = oracle.precision_recall_fscore_support(labels, predicted)
    for c, row in enumerate(found):
        ranks = labels == c, probabilities[:, c]
        expected = {
            "recall": recall[c],
            "precision": precision[c],
            "f1": f1[c],
            "auroc": oracle.roc_auc_score(*ranks),
            "average_precision": oracle.average_precision_score(*ranks),
        }
        assert {name: interval.value for name, interval in row.items()} == pytest.approx(expected)
        assert all(interval.low < interval.value < interval.high for interval in row.values())
    whole = score(labels, probabilities)
    recalls = np.mean([row["recall"].value for row in found])
    assert recalls == pytest.approx(whole["balanced_accuracy"][0])


def test_a_class_that_is_never_true_or_never_predicted_is_undefined():
    never_true = by_class([0, 0, 1, 1], np.eye(3)[[0, 2, 1, 1]], list("abcd"), resamples=20)[2]
    assert all(math.isnan(never_true[name].value) for name in ("recall", "f1", "auroc"))
    assert never_true["precision"].value == 0
    never_predicted = by_class([0, 1, 2], np.eye(3)[[0, 1, 1]], list("abc"), resamples=20)[2]
    assert math.isnan(never_predicted["precision"].value)
    assert never_predicted["recall"].value == never_predicted["f1"].value == 0


# Ensembles.


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4))
def test_doubts_are_bounded_and_what_their_definitions_say(seed, members, classes):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.full(classes, 0.3), size=(members, 9))
    found = combine(p)
    np.testing.assert_allclose(found.probabilities_NC.sum(axis=1), 1)
    for n in range(9):
        mean = [sum(p[m, n, c] for m in range(members)) / members for c in range(classes)]
        total = -sum(x * math.log(x) for x in mean if x)
        assert found.entropy_N[n] == pytest.approx(total)
        own = p[:, n, int(np.argmax(mean))]
        expected = np.std(own, ddof=1) if members > 1 else 0
        assert found.spread_N[n] == pytest.approx(expected, abs=1e-12)
    assert (found.entropy_N <= math.log(classes) + 1e-12).all()


def test_members_that_agree_have_no_doubt_of_their_own():
    p = np.random.default_rng(11).dirichlet(np.ones(3), size=20)
    found = combine(np.stack([p, p, p]))
    np.testing.assert_allclose(found.spread_N, 0, atol=1e-15)
    against = combine([[[1.0, 0.0]], [[0.0, 1.0]]])  # each sure, of the opposite
    assert against.entropy_N[0] == pytest.approx(math.log(2))
    for wrong in (np.zeros((0, 2, 2)), p, np.full((1, 1, 2), 0.9), np.full((1, 1, 2), math.nan)):
        with pytest.raises(ValueError, match="probabilities_MNC"):
            combine(wrong)


def test_risk_and_coverage_are_the_mean_over_all_orders_of_equals():
    wrong = np.array([1, 0, 0, 1, 0])
    doubt = np.array([0.5, 0.5, 0.1, 0.5, 0.9])
    risks = []
    for order in itertools.permutations(range(5)):
        sure_first = sorted(order, key=lambda i: doubt[i])  # stable
        risks.append(wrong[sure_first].cumsum() / np.arange(1, 6))
    coverage, risk = risk_coverage(wrong, doubt)
    np.testing.assert_allclose(coverage, np.arange(1, 6) / 5)
    np.testing.assert_allclose(risk, np.mean(risks, axis=0))
    found = doubt_and_error(wrong, doubt, _alone(5), resamples=20)
    assert found.area.value == pytest.approx(risk.mean())
    assert found.least_area == pytest.approx((1 / 4 + 2 / 5) / 5)


def _ensemble(random, number):
    """Five members whose errors are larger on some crystals; labels; groups of two."""
    groups = np.repeat(np.arange(number // 2), 2).astype(str).tolist()
    truth = 2 * random.normal(size=number)
    labels = (truth > 0).astype(int)
    noise = np.repeat(random.uniform(0.2, 3, size=number // 2), 2)
    logits = truth + noise * (0.7 * random.normal(size=number) + random.normal(size=(5, number)))
    p = 1 / (1 + np.exp(-logits))
    return labels, np.stack([1 - p, p], axis=2), groups


def test_doubt_goes_with_error_and_shuffled_doubt_does_not():
    random = np.random.default_rng(12)
    labels, members, groups = _ensemble(random, 1000)
    found = combine(members)
    wrong = found.probabilities_NC.argmax(axis=1) != labels
    for doubt in (found.spread_N, found.entropy_N):
        good = doubt_and_error(wrong, doubt, groups, quantiles=5, resamples=200)
        rates = [quantile.error.value for quantile in good.quantiles]
        assert rates[0] < rates[-1] / 3
        assert [quantile.count for quantile in good.quantiles] == [200] * 5
        assert good.auroc.low > 0.6
        assert good.auroc.value == pytest.approx(oracle.roc_auc_score(wrong, doubt))
        assert good.least_area < good.area.low < good.area.value < good.area.high
        assert good.area.high < good.error.low
        assert good.error.value == wrong.mean()
        shuffled = doubt_and_error(wrong, random.permutation(doubt), groups, resamples=200)
        assert shuffled.auroc.low < 0.5 < shuffled.auroc.high
        assert shuffled.area.low < wrong.mean() < shuffled.area.high


def test_equal_doubts_share_a_quantile_and_degenerate_sets_give_nan():
    doubt = np.array([0.0] * 7 + [1.0] * 3)
    found = doubt_and_error(np.arange(10) > 7, doubt, _alone(10), resamples=20)
    assert [(q.low, q.high, q.count) for q in found.quantiles] == [(0, 0, 7), (1, 1, 3)]
    right = doubt_and_error([False] * 4, np.arange(4.0), _alone(4), resamples=20)
    assert math.isnan(right.auroc.value)
    assert right.area.value == right.least_area == 0
    nothing = doubt_and_error([], [], [], resamples=5)
    assert nothing.quantiles == []
    assert math.isnan(nothing.area.value)
    with pytest.raises(ValueError, match="have 1, 2 and 2 entries"):
        doubt_and_error([True], [0.1, 0.2], ["a", "b"])
    with pytest.raises(ValueError, match="finite"):
        doubt_and_error([True], [math.nan], ["a"])


# Leakage.


def _strained(data, strain):
    """All lengths in direct space 1 + `strain` times as long."""
    return replace(data, q_P3=data.q_P3 / (1 + strain), lattice_N33=data.lattice_N33 * (1 + strain))


def _joined(first, second):
    """Two sets as one; the second's ids and groups get a dash."""
    tensors = ("hkl_P3", "q_P3", "intensity_P", "multiplicity_P", "lattice_N33")
    names = {
        name: np.concatenate([getattr(first, name), [f"{x}-" for x in getattr(second, name)]])
        for name in ("ids", "groups")
    }
    return replace(
        first,
        **names,
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in tensors},
        crystal_systems=np.concatenate([first.crystal_systems, second.crystal_systems]),
        labels={},
        offsets=torch.cat([first.offsets, first.offsets[-1] + second.offsets[1:]]),
    )


def _turned(data, seed):
    """Another setting of each crystal: turned, half of them mirrored, other mates, other order."""
    generator = torch.Generator().manual_seed(seed)
    rotations = random_rotations(len(data), generator)
    rotations[::2] *= -1
    q_P3 = torch.einsum("pij,pj->pi", rotations[data.crystal_P], data.q_P3)
    q_P3 *= torch.where(torch.rand(len(q_P3), 1, generator=generator) < 0.5, -1.0, 1.0)
    order = torch.argsort(data.crystal_P + torch.rand(len(q_P3), generator=generator))
    return replace(
        data,
        q_P3=q_P3[order],
        hkl_P3=data.hkl_P3[order],
        intensity_P=data.intensity_P[order],
        multiplicity_P=data.multiplicity_P[order],
    )


@pytest.mark.parametrize("scale_free", [False, True])
def test_a_profile_knows_nothing_of_the_setting(scale_free):
    data = random_set(13, [40, 63, 20, 1, 50])
    both = radial_profiles(_joined(data, _turned(data, 1)), scale_free=scale_free)
    np.testing.assert_allclose(both[:5], both[5:], atol=2e-3 * both.max())
    found = nearest(both[5:], both[:5])
    assert found.row_N[[0, 1, 2, 4]].tolist() == [0, 1, 2, 4]
    assert (found.distance_N[[0, 1, 2, 4]] < 2e-3).all()
    assert found.distance_N[3] == np.inf  # of a single point, at the origin
    # What must fail: a profile along one axis does know the setting.
    flat = replace(data, q_P3=data.q_P3 * torch.tensor([1.0, 0.0, 0.0]))
    turned = _turned(data, 1)
    turned = replace(turned, q_P3=turned.q_P3 * torch.tensor([1.0, 0.0, 0.0]))
    broken = radial_profiles(_joined(flat, turned), scale_free=scale_free)
    assert (nearest(broken[5:], broken[:5]).distance_N > 0.1).all()


def test_a_stored_pair_counts_as_both_of_its_mates():
    data = random_set(20, [30, 30])
    first, second = (data.subset(np.array([i])) for i in range(2))
    whole = second.batch(torch.tensor([0]))
    number = len(whole.intensity_P)
    full = replace(
        second,
        q_P3=whole.q_P3,
        intensity_P=whole.intensity_P,
        multiplicity_P=torch.ones(number, dtype=torch.int64),
        hkl_P3=torch.zeros(number, 3, dtype=torch.int16),
        offsets=torch.tensor([0, number]),
    )
    profiles = radial_profiles(_joined(_joined(first, second), full))
    np.testing.assert_allclose(profiles[2], profiles[1], rtol=1e-5, atol=1e-7)
    assert nearest(profiles[1:2], profiles[:1]).distance_N[0] > 0.1


def test_distance_is_strain_over_its_scale_and_follows_the_intensity():
    """Against the overlap of two Gaussians of variance 2 `WIDTH`²: R² = 2 − 2 exp(−δ²/8σ²)."""
    data = random_set(14, [3])
    # The origin, and one peak, which damping hardly strengthens when it moves.
    q_P3 = data.q_P3 / data.q_P3[1].norm() * 0.2
    data = replace(data, intensity_P=torch.tensor([9.0, 1.0, 0.0]), q_P3=q_P3)
    for strain in (0.0005, 0.001, 0.003, 0.02, 0.05):
        profiles = radial_profiles(_joined(data, _strained(data, strain)))
        delta = math.log1p(strain)
        expected = math.sqrt(2 - 2 * math.exp(-(delta**2) / (8 * 0.02**2)))
        found = nearest(profiles[1:], profiles[:1])
        # The grid smears a peak by up to a quarter of `WIDTH`.
        assert found.distance_N[0] == pytest.approx(expected, rel=0.1)
        assert found.near_N[0] == (strain < 0.002)
    brighter = replace(data, intensity_P=data.intensity_P * 1.21)
    profiles = radial_profiles(_joined(data, brighter))
    assert nearest(profiles[1:], profiles[:1]).distance_N[0] == pytest.approx(1 - 1 / 1.1, rel=1e-3)
    profiles = radial_profiles(_joined(data, brighter), scale_free=True)
    assert nearest(profiles[1:], profiles[:1]).distance_N[0] < 1e-3


@pytest.mark.parametrize("block", [2**25, 64])
def test_nearest_is_the_least_over_all_pairs(block, monkeypatch):
    random = np.random.default_rng(15)
    a, b = random.random((30, 8)), random.random((50, 8))
    a[3], b[7] = 0.0, 0.0
    monkeypatch.setattr("training.leakage._BLOCK", block)
    found = nearest(a.astype(np.float32), b.astype(np.float32), tolerance=0.4)
    for i, x in enumerate(a):
        apart = [
            np.linalg.norm(x - y) / max(np.linalg.norm(x), np.linalg.norm(y))
            if x.any() and y.any()
            else math.inf
            for y in b
        ]
        assert found.distance_N[i] == pytest.approx(min(apart), abs=1e-3)
        assert found.within_N[i] == sum(d <= 0.4 for d in apart)
        assert found.row_N[i] == (-1 if i == 3 else int(np.argmin(apart)))
    assert not found.near_N[3]
    none = nearest(a.astype(np.float32), b[:0].astype(np.float32))
    assert (none.distance_N == np.inf).all()
    assert not none.near_N.any()


def test_blocks_of_crystals_do_not_show(monkeypatch):
    data = random_set(16, [40, 63, 20, 33])
    whole = radial_profiles(data)
    monkeypatch.setattr("training.portions._BLOCK_POINTS", 100)
    np.testing.assert_allclose(radial_profiles(data), whole, rtol=1e-6)


def test_an_audit_finds_the_duplicates_that_were_planted_and_no_others():
    known = random_set(17, [63] * 40)
    near, grown = known.subset(np.arange(8)), known.subset(np.arange(10, 15))
    held = _joined(_strained(_turned(near, 2), 0.0005), _strained(_turned(grown, 3), 0.04))
    held = _joined(held, random_set(18, [63] * 20))
    data = _joined(known, held)
    rows = {"train": np.arange(40), "validation": np.arange(40, 46), "test": np.arange(46, 73)}
    summary, table = audit(data, rows)
    assert json.loads(json.dumps(summary)) == {
        "shared_groups": [],
        "tolerance": TOLERANCE,
        "splits": {
            "validation": {"structures": 6, "near": 6, "isostructural": 6},
            "test": {"structures": 27, "near": 2, "isostructural": 7},
        },
    }
    assert table["id"].to_pylist() == data.ids[40:].tolist()
    assert table["split"].to_pylist() == ["validation"] * 6 + ["test"] * 27
    assert table["near_id"].to_pylist()[:8] == known.ids[:8].tolist()
    assert table["near_count"].to_pylist() == [1] * 8 + [0] * 25
    assert table["isostructural_id"].to_pylist()[8:13] == known.ids[10:15].tolist()
    assert table["isostructural_group"].to_pylist()[8:13] == known.groups[10:15].tolist()
    assert max(table["isostructural_distance"].to_pylist()[:13]) < TOLERANCE
    # A split by crystal, not by group, is found out.
    leaky = replace(data, groups=np.array(["a", "b"] * 36 + ["c"]))
    assert audit(leaky, rows)[0]["shared_groups"] == ["a", "b"]


def test_an_audit_of_a_split_whose_training_is_empty_finds_nothing():
    data = random_set(19, [10, 1])
    empty = {"train": np.zeros(0, np.int64), "test": np.arange(2)}
    summary, table = audit(data, empty)
    assert summary["splits"]["test"] == {"structures": 2, "near": 0, "isostructural": 0}
    assert table["near_id"].to_pylist() == [None, None]
    dark = replace(data, q_P3=torch.zeros_like(data.q_P3))
    assert radial_profiles(dark).shape == (2, 1)


# NumPy drops a NUL at the end of a text; no formula has one.
WRITTEN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(WRITTEN, min_size=1, max_size=60))
def test_a_split_by_group_shares_none_and_one_by_crystal_does(groups):
    assert shared_groups(groups, split_of(groups, 0.3, 0.3).tolist()) == []
    sides = ["train", "test"] * len(groups)
    assert shared_groups(np.repeat(groups, 2).tolist(), sides) == sorted(set(groups))


# Learning curve.


def test_parts_are_nested_whole_groups_of_about_the_size_asked_for():
    groups = [f"formula {i // 2}" for i in range(8000)]
    sides = split_of(groups, 0.1, 0.1)
    training = [g for g, s in zip(groups, sides, strict=True) if s == "train"]
    smaller = np.zeros(len(training), dtype=bool)
    for fraction in (0.1, 0.2, 0.4, 0.7, 1.0):
        kept = kept_of(training, fraction)
        assert (kept | ~smaller).all()
        # Also of the training groups alone: the split's own hash would keep none of the first 10 %.
        assert kept.mean() == pytest.approx(fraction, abs=0.025)
        again = kept_of(training[::-1], fraction)
        assert (again[::-1] == kept).all()
        smaller = kept
    assert smaller.all()
    for wrong in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction = "):
            kept_of(groups, wrong)


def test_a_learning_curve_leaves_validation_and_test_alone(clouds):
    parts = Parts.of(clouds, tiny())
    groups = clouds.groups.tolist()
    part = Parts.of(clouds, tiny(train_fraction=0.7))
    for side in ("validation", "test"):
        assert part.rows[side].equal(parts.rows[side])
    assert part.target_N.equal(parts.target_N)
    own, every = set(part.rows["train"].tolist()), set(parts.rows["train"].tolist())
    assert own < every
    assert not {groups[i] for i in own} & {groups[i] for i in every - own}
    with pytest.raises(UserError, match=r"train: .*none of class .*\n  remedy: .*fraction"):
        Parts.of(clouds, tiny(train_fraction=0.01))
