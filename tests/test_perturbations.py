"""The six oldest arms, on any small clouds; `test_arms` has the laws of all."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_set

from ablation.perturbations import perturb

SETS = st.builds(
    random_set,
    st.integers(0, 99),
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    origin=st.booleans(),
)
RANDOM = ("intensity_shuffled", "intensity_scaled", "directions_random")
TENSORS = ("offsets", "hkl_P3", "q_P3", "intensity_P", "multiplicity_P", "lattice_N33")


def copied(data):
    return {name: getattr(data, name).clone() for name in TENSORS}


def same(data, tensors, names=TENSORS):
    return [n for n in names if not torch.equal(getattr(data, n), tensors[n])] == []


@settings(deadline=None)
@given(SETS, st.integers(0, 9))
def test_none_is_the_identity(data, seed):
    assert perturb(data, "none", None, seed) is data


@settings(deadline=None)
@given(SETS)
def test_binary_keeps_presence_and_nothing_else_of_the_intensity(data):
    found = perturb(data, "intensity_binary", None, 0)
    assert set(found.intensity_P.tolist()) <= {0.0, 1.0}
    assert torch.equal(found.intensity_P == 0, data.intensity_P == 0)
    assert same(found, copied(data), [n for n in TENSORS if n != "intensity_P"])


@settings(deadline=None)
@given(SETS, st.integers(0, 99))
def test_shuffled_keeps_each_crystals_intensities_and_its_origin(data, seed):
    found = perturb(data, "intensity_shuffled", None, seed)
    for i in range(len(data)):
        part = slice(data.offsets[i], data.offsets[i + 1])
        before, after = data.intensity_P[part], found.intensity_P[part]
        assert Counter(after.tolist()) == Counter(before.tolist())
        origin = data.multiplicity_P[part] == 1
        assert torch.equal(after[origin], before[origin])
    assert same(found, copied(data), [n for n in TENSORS if n != "intensity_P"])


def test_shuffled_is_uniform_over_permutations():
    # 3 movable points in each of 6000 crystals: 6 orders, each with probability 1/6.
    data = random_set(0, [3] * 6000, origin=False)
    ranked = replace(data, intensity_P=torch.arange(1.0, 4.0).repeat(6000))
    found = perturb(ranked, "intensity_shuffled", None, 5)
    orders = Counter(map(tuple, found.intensity_P.reshape(-1, 3).tolist()))
    assert len(orders) == 6
    sigma = math.sqrt(6000 * (1 / 6) * (5 / 6))
    assert all(abs(n - 1000) < 5 * sigma for n in orders.values())


def test_shuffled_ends_the_decay_with_q():
    data = random_set(3, [40] * 60, origin=False)
    q = data.q_P3.norm(dim=1)
    falling = replace(data, intensity_P=torch.exp(-8 * q**2))

    def correlation(one):
        return np.corrcoef(q, one.intensity_P)[0, 1]

    assert correlation(falling) < -0.8
    found = perturb(falling, "intensity_shuffled", None, 0)
    # Inside a crystal nothing is left; between crystals of unlike size something may be.
    inside = [
        np.corrcoef(a, b)[0, 1]
        for a, b in zip(q.split(40), found.intensity_P.split(40), strict=True)
    ]
    assert abs(np.mean(inside)) < 5 / math.sqrt(60 * 40)


@settings(deadline=None)
@given(SETS, st.integers(0, 99))
def test_scaled_keeps_ratios_and_absences(data, seed):
    found = perturb(data, "intensity_scaled", None, seed)
    present = data.intensity_P > 0
    assert torch.equal(found.intensity_P > 0, present)
    factor = (found.intensity_P.double() / data.intensity_P.double())[present]
    assert ((factor > 0.01 * (1 - 1e-6)) & (factor < 100 * (1 + 1e-6))).all()
    crystal = data.crystal_P[present]
    for i in crystal.unique():
        one = factor[crystal == i]
        assert float(one.max() / one.min()) == pytest.approx(1, abs=1e-6)
    assert same(found, copied(data), [n for n in TENSORS if n != "intensity_P"])


def test_scaled_is_log_uniform():
    data = random_set(1, [1] * 8000)
    factor = perturb(data, "intensity_scaled", None, 3).intensity_P / data.intensity_P
    u = ((factor.double().log10() + 2) / 4).sort()[0]
    gap = float((u - (torch.arange(8000) + 0.5) / 8000).abs().max()) * math.sqrt(8000)
    assert gap < 1.95  # Kolmogorov: p = 0.001
    assert u[0] < 0.01
    assert u[-1] > 0.99


@settings(deadline=None)
@given(SETS, st.integers(0, 99))
def test_random_directions_keep_length_intensity_and_friedel(data, seed):
    found = perturb(data, "directions_random", None, seed)
    before, after = data.q_P3.double().norm(dim=1), found.q_P3.double().norm(dim=1)
    assert torch.allclose(after, before, rtol=1e-6, atol=0)
    assert same(found, copied(data), [n for n in TENSORS if n != "q_P3"])
    batch = found.batch(torch.arange(len(found)))
    for q, intensity in zip(
        batch.q_P3.split(batch.lengths_B.tolist()),
        batch.intensity_P.split(batch.lengths_B.tolist()),
        strict=True,
    ):
        rows = zip((q + 0.0).tolist(), intensity.tolist(), strict=True)
        mates = zip((-q + 0.0).tolist(), intensity.tolist(), strict=True)
        assert Counter((*v, i) for v, i in rows) == Counter((*v, i) for v, i in mates)


def test_random_directions_are_uniform_on_the_sphere(clouds):
    keep = clouds.multiplicity_P == 2
    found = perturb(clouds, "directions_random", None, 0).q_P3[keep].double()
    direction = found / found.norm(dim=1, keepdim=True)
    n = len(direction)
    # Archimedes: each Cartesian component of a uniform direction is uniform in [−1, 1].
    for axis in range(3):
        u = ((direction[:, axis] + 1) / 2).sort()[0]
        assert float((u - (torch.arange(n) + 0.5) / n).abs().max()) * math.sqrt(n) < 1.95
    azimuth = (torch.atan2(direction[:, 1], direction[:, 0]) / (2 * math.pi) % 1).sort()[0]
    assert float((azimuth - (torch.arange(n) + 0.5) / n).abs().max()) * math.sqrt(n) < 1.95
    # And independent of where the point was: the mean of (a·b)² is 1/3 with variance 4/45.
    was = clouds.q_P3[keep].double()
    cosine = (direction * was).sum(1) / was.norm(dim=1)
    assert abs(float((cosine**2).mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


@settings(deadline=None)
@given(SETS)
def test_basis_only_is_the_three_reciprocal_vectors(data):
    found = perturb(data, "basis_only", None, 0)
    assert found.offsets.tolist() == [3 * i for i in range(len(data) + 1)]
    assert (found.multiplicity_P == 2).all()
    stored = {
        (i, *hkl): value
        for i, hkl, value in zip(
            data.crystal_P.tolist(), data.hkl_P3.tolist(), data.intensity_P.tolist(), strict=True
        )
    }
    for i in range(len(data)):
        part = slice(3 * i, 3 * i + 3)
        reciprocal = np.linalg.inv(data.lattice_N33[i].double().numpy()).T
        assert np.allclose(found.q_P3[part], reciprocal, rtol=1e-6, atol=1e-8)
        assert found.hkl_P3[part].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        # 0 where the reflection is absent, and where it is not stored at all.
        expected = [stored.get((i, *hkl), 0.0) for hkl in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
        assert found.intensity_P[part].tolist() == expected


def test_basis_only_finds_the_reflections_of_real_clouds(clouds):
    found = perturb(clouds, "basis_only", None, 0)
    at = {(1, 0, 0): 0, (0, 1, 0): 1, (0, 0, 1): 2}
    seen = 0
    crystals = clouds.crystal_P.tolist()
    for p, hkl in enumerate(clouds.hkl_P3.tolist()):
        if tuple(hkl) in at:
            row = 3 * crystals[p] + at[tuple(hkl)]
            assert torch.allclose(found.q_P3[row], clouds.q_P3[p], rtol=1e-5, atol=1e-7)
            assert found.intensity_P[row] == clouds.intensity_P[p]
            seen += 1
    assert seen == 3 * len(clouds)  # the half that shards store holds all three
    assert (found.intensity_P > 0).float().mean() > 0.3
