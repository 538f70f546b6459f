"""Permutation, many comparisons, equivalence and power: against hand and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from ablation import significance
from ablation.significance import (
    MARGIN,
    Spread,
    by_group,
    contributions,
    equivalence,
    holm,
    permutation_p,
    seeds_needed,
    seeds_p,
    spread,
    verdict,
    visible,
)


@pytest.mark.parametrize("classes", [2, 4])
def test_contributions_add_up_to_the_metric(classes):
    random = np.random.default_rng(classes)
    labels = random.integers(classes, size=90)
    p = random.dirichlet(np.ones(classes), size=90) + np.eye(classes)[labels] * 0.4
    p = np.round(p / p.sum(axis=1, keepdims=True), 2 if classes == 2 else 15)  # with ties
    score = p[:, 1] if classes == 2 else p / p.sum(axis=1, keepdims=True)
    auroc = roc_auc_score(labels, score, multi_class="ovr", average="macro")
    assert contributions(labels, p, "auroc").sum() == pytest.approx(auroc, abs=1e-12)
    accuracy = balanced_accuracy_score(labels, p.argmax(axis=1))
    assert contributions(labels, p, "balanced_accuracy").sum() == pytest.approx(accuracy)
    assert np.isnan(contributions(np.zeros(90, dtype=int), p, "auroc")).all()


def test_flipping_a_sign_is_exchanging_the_answers_of_two_networks():
    # By brute force: exchange the answers of a group and compute the metric again.
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    ranks = [random.permutation(40) / 40 for _ in range(2)]  # one scale, as if exchangeable
    both = [np.stack([1 - x, x], axis=1) for x in ranks]
    groups = [f"g{i // 2}" for i in range(40)]
    exact, linear = {}, {}
    for name in ("balanced_accuracy", "auroc"):
        parts = by_group(np.stack([contributions(labels, p, name) for p in both]), groups)
        exact[name], linear[name] = [], []
        for _ in range(60):
            flip = random.integers(2, size=20).astype(bool)
            names = np.unique(groups)
            swapped = np.array([flip[np.flatnonzero(names == g)[0]] for g in groups])
            new = [np.where(swapped[:, None], both[1 - k], both[k]) for k in range(2)]
            values = [contributions(labels, p, name).sum() for p in new]
            exact[name].append(values[1] - values[0])
            linear[name].append(float(((parts[1] - parts[0]) * np.where(flip, -1, 1)).sum()))
    np.testing.assert_allclose(exact["balanced_accuracy"], linear["balanced_accuracy"], atol=1e-12)
    assert np.corrcoef(exact["auroc"], linear["auroc"])[0, 1] > 0.97


def test_spread_recovers_planted_variances():
    random = np.random.default_rng(1)
    found = []
    for _ in range(300):
        parts = 0.02 * random.normal(size=(1, 80)) + 0.3 / 80 * random.normal(size=(4, 1))
        found.append(spread(parts + 0.03 * random.normal(size=(4, 80))))
    seed, crystal, shared = (
        np.mean([getattr(f, name) for f in found]) for name in ("seed", "crystal", "shared")
    )
    assert seed == pytest.approx(0.3**2 + 80 * 0.03**2, rel=0.15)
    assert crystal == pytest.approx(80 * (0.02**2 + 0.03**2 / 4), rel=0.05)
    assert shared == pytest.approx(80 * 0.03**2 / 4, rel=0.05)
    one = spread(random.normal(size=(1, 10)))
    assert math.isnan(one.seed)
    assert one.pure == 1.0


def test_permutation_p_is_exact_for_one_seed_and_few_groups():
    parts = np.array([[0.3, 0.1, -0.2, 0.4, 0.25, 0.05]])
    flips = np.array(list(itertools.product((1, -1), repeat=6)))
    exact = (np.abs(flips @ parts[0]) >= parts.sum() - 1e-9).mean()
    assert permutation_p(parts) == pytest.approx(exact, abs=0.012)
    assert math.isnan(permutation_p(parts * math.nan))
    assert permutation_p(np.zeros((3, 6))) == 1.0


def test_without_doubt_about_crystals_the_p_is_students():
    # All seeds' differences come from one group of 1000, whose sign alone cannot be told.
    random = np.random.default_rng(2)
    for seeds in (3, 5):
        whole = 0.05 + 0.04 * random.normal(size=seeds)
        parts = whole[:, None] / 2000 * np.ones((1, 2000))
        expected = ttest_1samp(whole, 0).pvalue
        assert permutation_p(parts) == pytest.approx(expected, abs=0.02)


def test_seeds_p_counts_sign_flips():
    assert seeds_p(np.array([0.1, 0.2, 0.3])) == 2 / 8
    assert seeds_p(np.array([0.1, 0.2, -0.05])) == 4 / 8
    assert seeds_p(np.full(14, 0.1)) < 0.002
    assert seeds_p(np.array([0.1])) == 1.0


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 and never falling.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, math.nan, 0.7]), [1.0, math.nan, 1.0])
    assert len(holm([])) == 0


def test_holm_is_the_closed_test_of_bonferroni():
    # Oracle: a hypothesis is rejected when Bonferroni rejects every set that contains it.
    random = np.random.default_rng(3)
    for _ in range(50):
        p = random.uniform(size=5) ** 3
        sets = [s for r in range(1, 6) for s in itertools.combinations(range(5), r)]
        closed = [max(min(1, len(s) * p[list(s)].min()) for s in sets if k in s) for k in range(5)]
        np.testing.assert_allclose(holm(p), closed)


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    random = np.random.default_rng(4)
    draws = 0.004 + 0.008 * random.normal(size=200_000)
    p, low, high = equivalence(draws)
    assert p == pytest.approx(norm.sf((MARGIN - 0.004) / 0.008), rel=0.05)
    assert [low, high] == pytest.approx([0.004 - 1.645 * 0.008, 0.004 + 1.645 * 0.008], abs=2e-4)
    for centre in (0.0, 0.006, 0.008, 0.02, -0.03):
        p, low, high = equivalence(draws + centre)
        assert (p < 0.05) == (low > -MARGIN and high < MARGIN)
    assert math.isnan(equivalence(np.array([]))[0])


def test_verdicts():
    assert verdict(3, 0.01, 0.5) == "effect"
    assert verdict(3, 0.01, 0.01) == "small effect"
    assert verdict(3, 0.2, 0.01) == "no effect"
    assert verdict(3, 0.2, 0.2) == "undecided"
    assert verdict(3, math.nan, math.nan) == "undecided"
    assert verdict(1, 0.0, 0.0) == "one seed"


def test_seeds_needed_by_hand_and_when_no_number_is_enough():
    # Without doubt about crystals: the t test's textbook sample size, (t + t) s / √S ≤ 0.01.
    found = Spread(seed=0.01**2, crystal=0.0, shared=0.0)
    assert seeds_needed(found) == 10  # t₉: (2.262 + 0.883) / √10 = 0.995; with nine 1.065
    assert visible(found, 10) == pytest.approx(0.00995, abs=2e-5)
    assert seeds_needed(Spread(0.01**2, 0.004**2, 0.0)) is None  # 2.8 × 0.004 > 0.01
    assert seeds_needed(Spread(0.0, 0.003**2, 0.0)) == 2
    assert seeds_needed(Spread(math.nan, 0.001**2, 0.0)) is None
    assert math.isnan(visible(found, 1))


def test_a_study_of_the_needed_size_sees_the_difference(monkeypatch):
    monkeypatch.setattr(significance, "_FLIPS", 200)
    random = np.random.default_rng(5)
    found = Spread(seed=0.012**2 + 80 * 0.0006**2, crystal=0.002**2, shared=0.0)
    seeds = seeds_needed(found)
    called = 0
    for _ in range(200):
        parts = 0.01 / 80 + 0.002 / math.sqrt(80) * random.normal(size=(1, 80))
        parts = parts + 0.012 / 80 * random.normal(size=(seeds, 1))
        parts = parts + 0.0006 * random.normal(size=(seeds, 80))
        called += permutation_p(parts) < 0.05
    assert 0.7 <= called / 200 <= 0.92


@pytest.mark.parametrize(("seed", "crystal", "noise"), [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)])
def test_the_permutation_rarely_finds_what_is_not_there(monkeypatch, seed, crystal, noise):
    monkeypatch.setattr(significance, "_FLIPS", 200)
    random = np.random.default_rng((seed, crystal, noise))
    called, naive = 0, 0
    for _ in range(400):
        parts = crystal * random.normal(size=(1, 60)) + noise * random.normal(size=(3, 60))
        parts = parts + seed * random.normal(size=(3, 1)) * math.sqrt(1 / 60)
        called += permutation_p(parts) < 0.05
        naive += permutation_p(parts.mean(axis=0, keepdims=True)) < 0.05
    assert called / 400 <= 0.08
    if seed and not crystal:
        assert naive / 400 > 0.2  # the variant that must fail: crystals alone
