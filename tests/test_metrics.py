"""Metrics against scikit-learn, against repeated rows, and intervals against a known truth."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from training.metrics import METRICS, confusion_matrix, evaluate, group_weights, score


def _oracle(labels, probabilities, weights):
    """Every metric but ECE with scikit-learn."""
    classes = probabilities.shape[1]
    present = np.unique(labels) if classes > 2 else [1]
    predicted = probabilities.argmax(axis=1)
    keywords = {"sample_weight": weights}
    rest = [(labels == c, probabilities[:, c]) for c in present]
    return {
        "auroc": np.mean([oracle.roc_auc_score(y, p, **keywords) for y, p in rest]),
        "average_precision": np.mean(
            [oracle.average_precision_score(y, p, **keywords) for y, p in rest]
        ),
        "balanced_accuracy": np.mean(
            [
                oracle.recall_score(labels == c, predicted == c, **keywords)
                for c in np.unique(labels)
            ]
        ),
        "f1": oracle.f1_score(
            labels, predicted, labels=present, average="macro", zero_division=0, **keywords
        ),
        "mcc": oracle.matthews_corrcoef(labels, predicted, **keywords),
    }


def _ece_by_hand(labels, probabilities, weights):
    """Guo et al. 2017, eq. 3, one crystal at a time."""
    gaps = [0.0] * 15
    for label, row, weight in zip(labels, probabilities.tolist(), weights, strict=True):
        confidence = max(row)
        (b,) = (b for b in range(15) if b / 15 < confidence <= (b + 1) / 15)
        gaps[b] += weight * ((row.index(confidence) == label) - confidence)
    return sum(abs(gap) for gap in gaps) / sum(weights)


def _example(random, number, classes, *, tied):
    """Every class occurs; `tied` probabilities take few values, exact in binary."""
    labels = np.concatenate([np.arange(classes), random.integers(classes, size=number - classes)])
    probabilities = random.dirichlet(np.ones(classes), size=number)
    probabilities[np.arange(number), labels] += 0.3
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if tied:
        steps = np.floor(probabilities * 4)
        steps[np.arange(number), probabilities.argmax(axis=1)] += 4 - steps.sum(axis=1)
        probabilities = steps / 4
    return labels, probabilities


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_scikit_learn_for_every_weighting(classes, tied, seed):
    random = np.random.default_rng(seed)
    labels, probabilities = _example(random, 120, classes, tied=tied)
    weights = random.integers(0, 4, size=(3, 120))
    weights[:, :classes] += 1  # every class keeps weight
    weights[0] = 1
    found = score(labels, probabilities, weights)
    assert list(found) == list(METRICS)
    for r, weight in enumerate(weights):
        for name, value in _oracle(labels, probabilities, weight).items():
            assert found[name][r] == pytest.approx(value, abs=1e-12), name
        assert found["ece"][r] == pytest.approx(
            _ece_by_hand(labels, probabilities, weight), abs=1e-12
        )
    if classes > 2:
        expected = oracle.roc_auc_score(
            labels, probabilities, multi_class="ovr", sample_weight=weights[1]
        )
        assert found["auroc"][1] == pytest.approx(expected, abs=1e-12)
    expected = oracle.balanced_accuracy_score(
        labels, probabilities.argmax(axis=1), sample_weight=weights[1]
    )
    assert found["balanced_accuracy"][1] == pytest.approx(expected, abs=1e-12)


def test_classes_that_no_label_names_do_not_enter_the_macro_means():
    random = np.random.default_rng(5)
    labels, probabilities = _example(random, 200, 5, tied=False)
    kept = labels < 3  # classes 3 and 4 are predicted at times, and never true
    labels, probabilities = labels[kept], probabilities[kept]
    found = score(labels, probabilities)
    assert set(probabilities.argmax(axis=1)) > {0, 1, 2}
    for name, value in _oracle(labels, probabilities, None).items():
        assert found[name][0] == pytest.approx(value, abs=1e-12), name


def test_fractional_weights_agree_with_scikit_learn():
    random = np.random.default_rng(6)
    for classes in (2, 4):
        labels, probabilities = _example(random, 150, classes, tied=True)
        weight = random.exponential(size=150)
        found = score(labels, probabilities, weight[None])
        for name, value in _oracle(labels, probabilities, weight).items():
            assert found[name][0] == pytest.approx(value, abs=1e-10), name


@st.composite
def _sets(draw):
    classes = draw(st.integers(2, 4))
    number = draw(st.integers(classes, 25))
    cells = st.lists(st.integers(0, 4), min_size=number * classes, max_size=number * classes)
    rows = np.array(draw(cells), dtype=float).reshape(number, classes)
    rows[rows.sum(axis=1) == 0] = 1
    rest = st.lists(st.integers(0, classes - 1), min_size=number, max_size=number)
    labels = np.array([*range(classes), *draw(rest)][:number])
    weights = np.array(draw(st.lists(st.integers(0, 3), min_size=number, max_size=number)))
    weights[:classes] += 1
    return labels, rows / rows.sum(axis=1, keepdims=True), weights


@settings(max_examples=100, deadline=None)
@given(_sets())
def test_a_weight_of_k_is_k_rows_and_the_order_of_rows_does_not_matter(example):
    labels, probabilities, weights = example
    weighted = score(labels, probabilities, weights[None])
    repeated = score(np.repeat(labels, weights), np.repeat(probabilities, weights, axis=0))
    back = score(labels[::-1], probabilities[::-1], weights[None, ::-1])
    for name, metric in METRICS.items():
        tolerance = 1e-13 if name in ("average_precision", "ece") else 0  # others: exact counts
        assert abs(weighted[name][0] - repeated[name][0]) <= tolerance, name
        assert abs(weighted[name][0] - back[name][0]) <= 1e-13, name
        assert metric.low - 1e-12 <= weighted[name][0] <= metric.high + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=4, max_size=60), st.integers(1, 5))
def test_binary_ranking_is_invariant_to_a_monotone_transform(scores, power):
    p = np.array(scores) / 50
    labels = np.arange(len(p)) % 2

    def both(p):
        found = score(labels, np.stack([1 - p, p], axis=1))
        return found["auroc"][0], found["average_precision"][0]

    assert both(p) == both(p**power / 2)
    # Reversed scores give the complement: ties must count ½ for that.
    assert both(1 - p)[0] == pytest.approx(1 - both(p)[0], abs=1e-12)


def test_auroc_is_the_share_of_pairs_in_order():
    labels, p = np.array([0, 1, 0, 1, 1, 0]), np.array([0.5, 0.5, 0.25, 0.75, 0.25, 0.0])
    pairs = [(a > b) + (a == b) / 2 for a in p[labels == 1] for b in p[labels == 0]]
    assert score(labels, np.stack([1 - p, p], axis=1))["auroc"][0] == pytest.approx(np.mean(pairs))


def test_ece_bins_are_closed_above_and_calibration_is_judged_on_the_predicted_class():
    # Confidence 0.9 throughout, 9 of 10 right: calibrated, although p1 is never near the rate of 1.
    p = np.where(np.arange(20) % 2 == 0, 0.1, 0.9)
    labels = (p > 0.5).astype(int)
    labels[[0, 1]] = 1 - labels[[0, 1]]
    assert score(labels, np.stack([1 - p, p], axis=1))["ece"][0] == pytest.approx(0, abs=1e-12)
    # 0.6 = 9/15 ends a bin, 0.61 starts the next: errors of opposite sign must not cancel.
    p, labels = np.array([0.6, 0.61]), np.array([1, 0])
    assert score(labels, np.stack([1 - p, p], axis=1))["ece"][0] == pytest.approx((0.4 + 0.61) / 2)
    p, labels = np.array([0.62, 0.61]), np.array([1, 0])  # one bin: they do cancel
    assert score(labels, np.stack([1 - p, p], axis=1))["ece"][0] == pytest.approx(0.23 / 2)


def test_blocks_of_weightings_do_not_show(monkeypatch):
    random = np.random.default_rng(7)
    labels, probabilities = _example(random, 50, 3, tied=True)
    weights = random.integers(0, 3, size=(11, 50))
    whole = score(labels, probabilities, weights)
    monkeypatch.setattr("training.metrics._BLOCK", 150)  # three weightings at a time
    for name, values in score(labels, probabilities, weights).items():
        np.testing.assert_allclose(values, whole[name], rtol=0, atol=1e-13)


def test_confusion_matrix_has_true_classes_in_rows():
    labels = np.array([0, 0, 1, 1, 1, 2])
    predicted = np.array([0, 2, 1, 1, 0, 0])
    matrix = confusion_matrix(labels, np.eye(3)[predicted])
    assert matrix.tolist() == [[1, 0, 1], [1, 2, 0], [1, 0, 0]]
    assert matrix.tolist() == oracle.confusion_matrix(labels, predicted).tolist()
    # Exactly ½ is class 0.
    halves = np.array([[0.5, 0.5], [0.49, 0.51]])
    assert confusion_matrix(np.array([1, 1]), halves).tolist() == [[0, 0], [1, 1]]


def test_degenerate_sets_give_nan_without_a_warning():
    p = np.array([0.2, 0.7, 0.9])
    two = np.stack([1 - p, p], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_class = evaluate(np.ones(3, dtype=int), two, ["a", "b", "c"], resamples=20)
        empty = evaluate(np.zeros(0, dtype=int), np.zeros((0, 2)), [], resamples=20)
        constant = score(np.array([0, 1, 1]), np.tile([0.9, 0.1], (3, 1)))
        one_group = evaluate(np.array([0, 1, 1]), two, ["a", "a", "a"], resamples=20)
        weighted = score(np.array([0, 1, 1]), two, np.array([[1, 1, 0], [0, 2, 1], [0, 0, 0]]))
    for name in METRICS:
        assert math.isnan(empty[name].value)
        assert math.isnan(one_class[name].value) == (name != "ece")
        assert not math.isnan(one_group[name].value)
        assert math.isnan(one_group[name].low)  # one group cannot be resampled
        undefined = [False, name != "ece", True]  # in the second, class 0 has no weight
        assert np.isnan(weighted[name]).tolist() == undefined
    assert constant["auroc"][0] == 0.5
    assert constant["mcc"][0] == 0
    assert constant["f1"][0] == 0


def test_resamples_without_a_class_are_left_out_of_the_interval():
    # The only crystal of class 0 is absent from about a third of the resamples.
    p = np.array([0.4, 0.3, 0.6, 0.8, 0.9])
    labels = np.array([0, 1, 1, 1, 1])
    found = evaluate(labels, np.stack([1 - p, p], axis=1), list("abcde"), resamples=300)["auroc"]
    assert found.value == 0.75
    assert 0 <= found.low < 0.75 < found.high == 1


@pytest.mark.parametrize(
    ("labels", "probabilities", "weights", "message"),
    [
        ([0, 1], [[0.5, 0.5]], None, r"labels_N has shape \(2,\)"),
        ([0, 1], [0.5, 0.5], None, r"probabilities_NC has shape \(2,\)"),
        ([0, 0], [[1.0], [1.0]], None, r"probabilities_NC has shape \(2, 1\)"),
        ([0, 2], [[0.5, 0.5]] * 2, None, r"labels_N\[1\] = 2"),
        ([-1, 1], [[0.5, 0.5]] * 2, None, r"labels_N\[0\] = -1"),
        ([0.0, 1.0], [[0.5, 0.5]] * 2, None, "labels_N has type float64"),
        ([0, 1], [[0.5, 0.5], [0.5, math.nan]], None, r"probabilities_NC\[1\] = .*finite"),
        ([0, 1], [[0.5, 0.5], [-math.inf, 1]], None, r"probabilities_NC\[1\] = .*finite"),
        ([0, 1], [[0.5, 0.5], [-3.0, 4.0]], None, r"probabilities_NC\[1\] = .*softmax"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.9]], None, r"probabilities_NC\[1\] = .*add to 1"),
        ([0, 1], [[0.5, 0.5]] * 2, [1, 1], r"weights_RN has shape \(2,\)"),
        ([0, 1], [[0.5, 0.5]] * 2, [[1, -1]], "weights_RN has negative"),
        ([0, 1], [[0.5, 0.5]] * 2, [[1, math.nan]], "weights_RN has negative or non-finite"),
    ],
)
def test_wrong_input_is_named(labels, probabilities, weights, message):
    with pytest.raises(ValueError, match=message):
        score(labels, probabilities, weights)


def test_evaluate_names_wrong_groups_and_resamples():
    with pytest.raises(ValueError, match="groups_N has 1 entries for 2 labels"):
        evaluate([0, 1], [[0.5, 0.5]] * 2, ["a"])
    with pytest.raises(ValueError, match="resamples = 0"):
        evaluate([0, 1], [[0.5, 0.5]] * 2, ["a", "b"], resamples=0)


def test_group_weights_draw_whole_groups_and_as_many_as_there_are():
    groups = ["b", "a", "c", "b", "b", "d"]
    weights = group_weights(groups, 4000, seed=3)
    assert weights.shape == (4000, 6)
    assert (weights[:, [0, 0]] == weights[:, [3, 4]]).all()
    assert (weights[:, [0, 1, 2, 5]].sum(axis=1) == 4).all()
    # Each group's count is binomial (4, ¼): mean 1, variance ¾, correlation −⅓.
    counts = weights[:, [0, 1, 2, 5]]
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.07)
    np.testing.assert_allclose(np.cov(counts.T), np.eye(4) - 0.25, atol=0.08)
    # The draw belongs to the names: the order of the crystals changes nothing, the seed does.
    order = [5, 2, 0, 1, 4, 3]
    again = group_weights([groups[i] for i in order], 4000, seed=3)
    assert (again == weights[:, order]).all()
    assert (group_weights(groups, 4000, seed=4) != weights).any()


def _correlated(random, groups, size, *, shared, own):
    """Labels and scores of `groups` groups of `size` crystals; group members share noise."""
    labels = np.repeat(random.integers(2, size=groups), size)
    noise = np.repeat(random.normal(size=groups), size) * shared
    noise += random.normal(size=groups * size) * own
    p = 1 / (1 + np.exp(-(1.5 * labels + noise)))
    names = np.repeat(np.arange(groups), size).astype(str).tolist()
    return labels, np.stack([1 - p, p], axis=1), names


def test_group_intervals_cover_the_truth_and_ungrouped_ones_do_not():
    # Scores are normal with means 0 and 1.5 and variance 1: AUROC = Φ(1.5/√2).
    truth = 0.5 * (1 + math.erf(1.5 / 2))
    random = np.random.default_rng(8)
    grouped, plain, simulations = 0, 0, 200
    for seed in range(simulations):
        shared = math.sqrt(0.9)
        labels, p, groups = _correlated(random, 40, 5, shared=shared, own=math.sqrt(0.1))
        by_group = evaluate(labels, p, groups, resamples=200, seed=seed)["auroc"]
        grouped += by_group.low <= truth <= by_group.high
        if seed % 2:
            continue
        alone = np.arange(len(labels)).astype(str).tolist()
        by_crystal = evaluate(labels, p, alone, resamples=200, seed=seed)["auroc"]
        plain += by_crystal.low <= truth <= by_crystal.high
    assert 0.88 <= grouped / simulations <= 0.99
    assert plain / (simulations / 2) < 0.80  # the variant that must fail


def test_evaluate_is_reproducible_and_holds_the_value_of_the_whole_set():
    random = np.random.default_rng(9)
    labels, p, groups = _correlated(random, 80, 2, shared=0.5, own=1.0)
    first = evaluate(labels, p, groups, resamples=200, seed=1)
    assert first == evaluate(labels, p, groups, resamples=200, seed=1)
    assert first != evaluate(labels, p, groups, resamples=200, seed=2)
    whole = score(labels, p)
    for name, interval in first.items():
        assert interval.value == whole[name][0]
        assert interval.low < interval.high
