"""The set transformer: its choice of points, its invariances, and that it can learn."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_set
from torch import Tensor

from ablation.perturbations import ARMS, perturb
from training.dataset import CloudSet
from training.models import attention
from training.models.attention import POINTS, Attention, strongest
from training.models.spherical import harmonics

LENGTHS = [3, 1, 17, 40, 2, 120]
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-8}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def typed(data: CloudSet, dtype: torch.dtype) -> CloudSet:
    return replace(data, q_P3=data.q_P3.to(dtype), intensity_P=data.intensity_P.to(dtype))


def network(dtype: torch.dtype = torch.float32, classes: int = 3) -> Attention:
    """Of random weights, large enough that every part of the input shows in the answer."""
    torch.manual_seed(0)
    model = Attention(classes, 16)
    model.scale_to(random_set(0, LENGTHS))
    with torch.no_grad():
        for layer in model.layers:
            layer.project.weight.mul_(2)
            layer.merge.weight.mul_(2)
    return model.to(dtype).eval()


def answers(model: Attention, data: CloudSet) -> Tensor:
    with torch.no_grad():
        return model(model.prepare(data).batch(torch.arange(len(data))))


def cubic(number: int, seed: int = 0) -> CloudSet:
    """Primitive cubic crystals in which every orbit of m-3m has one intensity up to rounding."""
    data = random_set(seed, [number] * 4)
    length = torch.tensor([4.0, 4.1, 5.0, 6.3])[data.crystal_P]
    orbit = data.hkl_P3.long().abs().sort(dim=1).values @ torch.tensor([1, 10, 100])
    random = np.random.default_rng(seed)
    of_orbit = torch.from_numpy(random.lognormal(-2, 1.5, (4, 1000)).astype(np.float32))
    noise = 1 + 1e-6 * torch.from_numpy(random.normal(size=len(orbit)).astype(np.float32))
    return replace(
        data,
        q_P3=data.hkl_P3 / length[:, None],
        intensity_P=of_orbit[data.crystal_P, orbit] * noise,
    )


def turned(data: CloudSet, seed: int) -> CloudSet:
    """Each crystal by its own orthogonal matrix, every second one a reflection, too."""
    random = np.random.default_rng(seed).normal(size=(len(data), 3, 3))
    matrices = torch.linalg.qr(torch.from_numpy(random)).Q
    matrices[:, 0] *= (torch.arange(len(data)) % 2 * 2 - 1)[:, None] * matrices.det()[:, None]
    q_P3 = torch.einsum("pij,pj->pi", matrices[data.crystal_P], data.q_P3.double())
    return replace(data, q_P3=q_P3.to(data.q_P3.dtype))


def reordered(data: CloudSet, seed: int) -> CloudSet:
    """The points of each crystal in another order."""
    key = torch.rand(len(data.q_P3), generator=torch.Generator().manual_seed(seed))
    order = torch.argsort(data.crystal_P + key.double())
    return replace(
        data,
        hkl_P3=data.hkl_P3[order],
        q_P3=data.q_P3[order],
        intensity_P=data.intensity_P[order],
        multiplicity_P=data.multiplicity_P[order],
    )


def mated(data: CloudSet, seed: int) -> CloudSet:
    """Some points replaced by their Friedel mates."""
    random = torch.rand(len(data.q_P3), 1, generator=torch.Generator().manual_seed(seed))
    return replace(data, q_P3=torch.where(random < 0.5, -data.q_P3, data.q_P3))


CHANGES: dict[str, Callable[[CloudSet, int], CloudSet]] = {
    "turned": turned,
    "reordered": reordered,
    "mated": mated,
}


def largest_change(dtype: torch.dtype, change: str, data: CloudSet, seed: int = 1) -> float:
    model, data = network(dtype), typed(data, dtype)
    return float((answers(model, CHANGES[change](data, seed)) - answers(model, data)).abs().max())


@DTYPES
@pytest.mark.parametrize("change", list(CHANGES))
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1000))
def test_invariance(change: str, dtype: torch.dtype, seed: int) -> None:
    for data in (random_set(seed, LENGTHS), cubic(100, seed)):
        assert largest_change(dtype, change, data, seed) < TOLERANCE[dtype]


def coordinates(direction_P3: Tensor) -> Tensor:
    """Even, but of no degree: q → −q changes nothing, a rotation does."""
    square = direction_P3.square()
    return torch.cat([torch.ones_like(square[:, :1]), square.repeat(1, 9)], dim=1)


def odd(direction_P3: Tensor) -> Tensor:
    """P_1 in the place of P_2: invariant to rotation, not to which mate is stored."""
    values = harmonics(direction_P3).clone()
    values[:, 1:6] = 0
    values[:, 1:4] = direction_P3
    return values


@DTYPES
@pytest.mark.parametrize(("broken", "change"), [(coordinates, "turned"), (odd, "mated")])
def test_a_broken_variant_is_found(
    broken: Callable[[Tensor], Tensor],
    change: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "harmonics", broken)
    assert largest_change(dtype, change, random_set(0, LENGTHS)) > 10 * TOLERANCE[dtype]


def test_directions_count() -> None:
    data = random_set(0, LENGTHS)
    model = network()
    other = perturb(data, "directions_random", None, 0)
    assert (answers(model, data) - answers(model, other)).abs().max() > 0.01


def chosen_slowly(data: CloudSet, n: int, limit: int) -> list[tuple[float, ...]]:
    """The rule of `strongest` for crystal n, spelled out."""
    mine = slice(int(data.offsets[n]), int(data.offsets[n + 1]))
    q, intensity = data.q_P3[mine].double().numpy(), data.intensity_P[mine].double().numpy()
    square = (q**2).sum(axis=1)
    single = data.multiplicity_P[mine].numpy() == 1
    second = [
        any(
            (q[i] == -q[j]).all() and abs(intensity[i] - intensity[j]) <= 1e-4 * intensity[j]
            for j in range(i)
        )
        for i in range(len(q))
    ]
    away = np.flatnonzero((square > 0) & ~(single & np.array(second, dtype=bool)))
    key = np.log(np.maximum(intensity[away], 1e-12)) - np.log(square[away])
    ranked = away[np.argsort(-key, kind="stable")]
    values = np.sort(key)[::-1]
    length = min(limit, len(ranked))
    while 0 < length < len(ranked) and values[length - 1] - values[length] <= 1e-4:
        length -= 1
    rows = [*np.flatnonzero(square == 0), *ranked[:length]]
    return [(*q[row].tolist(), float(intensity[row])) for row in rows]


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    origin=st.booleans(),
    limit=st.sampled_from([1, 5, 24, 64]),
    kind=st.sampled_from(sorted(ARMS)),
    seed=st.integers(0, 100),
)
def test_choice_follows_its_rule(
    lengths: list[int], origin: bool, limit: int, kind: str, seed: int
) -> None:
    data = perturb(random_set(seed, lengths, origin=origin), kind, None, 0)
    points = strongest(data, limit).points_NT5
    assert points.shape == (len(lengths), 1 + limit, 5)
    for n in range(len(lengths)):
        found = points[n][points[n, :, 4] > 0][:, :4]
        assert found.tolist() == [list(point) for point in chosen_slowly(data, n, limit)]
        assert (points[n][points[n, :, 4] == 0] == 0).all()
        assert (points[n, 1:].norm(dim=1) == 0)[len(found) :].all()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("limit", [24, 48])
def test_choice_keeps_orbits_whole(limit: int, binary: bool) -> None:
    # 171 points: whole shells up to h² + k² + l² = 19, so that no orbit is cut by the cloud's end.
    data = cubic(171)
    if binary:
        data = replace(data, intensity_P=torch.ones_like(data.intensity_P))
    points = strongest(data, limit).points_NT5
    for n, length in enumerate([4.0, 4.1, 5.0, 6.3]):
        found = points[n, 1:][points[n, 1:, 4] > 0]
        assert limit - 24 < len(found) <= limit
        orbit = (found[:, :3] * length).round().long().abs().sort(dim=1).values
        for hkl, count in zip(*orbit.unique(dim=0, return_counts=True), strict=True):
            h, k, l = hkl.tolist()  # noqa: E741
            orders = len({(h, k, l), (h, l, k), (k, h, l), (k, l, h), (l, h, k), (l, k, h)})
            assert count == orders * 2 ** sum(x > 0 for x in (h, k, l)) // 2


def test_more_equal_points_than_places_are_left_out() -> None:
    data = random_set(0, [60, 60])
    sphere = torch.nn.functional.normalize(data.q_P3, dim=1)
    data = replace(data, q_P3=sphere, intensity_P=torch.ones_like(data.intensity_P))
    points = strongest(data, POINTS).points_NT5
    assert (points[:, 1:] == 0).all()
    assert answers(network(), data).isfinite().all()


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_perturbed_clouds_have_answers_and_gradients(arm: str) -> None:
    for data in (random_set(0, [0, *LENGTHS]), random_set(1, [0, 0, 3], origin=False)):
        data = perturb(data, arm, None, 0)
        model = network().train()
        logits = model(model.prepare(data).batch(torch.arange(len(data))))
        assert logits.shape == (len(data), 3)
        assert logits.isfinite().all()
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_crystals_without_points_leave_the_scales() -> None:
    model = Attention(2, 16)
    model.scale_to(random_set(0, [0]))
    assert answers(model.eval(), random_set(0, [0])).isfinite().all()


def test_neighbours_and_padding_do_not_matter() -> None:
    data, model = random_set(0, LENGTHS), network()
    together = answers(model, data)
    for n in range(len(data)):
        alone = answers(model, data.subset(np.array([n])))
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=1e-5)
    points = model.prepare(data).points_NT5
    empty = points[..., 4:] == 0
    garbage = torch.where(empty, torch.rand(points.shape) + 1, points)
    garbage[..., 4] = points[..., 4]
    longer = torch.cat([garbage, torch.zeros(len(data), 7, 5)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(longer), together, atol=1e-5, rtol=1e-5)


def test_sees_points_only() -> None:
    data, model = random_set(0, LENGTHS), network()
    other = replace(
        data,
        ids=data.ids[::-1].copy(),
        groups=data.groups[::-1].copy(),
        crystal_systems=data.crystal_systems[::-1].copy(),
        labels={},
        hkl_P3=torch.zeros_like(data.hkl_P3),
        lattice_N33=torch.zeros_like(data.lattice_N33),
    )
    assert torch.equal(answers(model, data), answers(model, other))


def test_scales_come_from_the_training_crystals() -> None:
    data = random_set(0, LENGTHS)
    model = Attention(2, 16)
    model.scale_to(data)
    assert float(model.q_max) == float(data.q_P3.norm(dim=1).max())
    assert float(model.intensity_scale) == float(data.intensity_P[data.intensity_P > 0].median())


def test_overfits_one_batch() -> None:
    data = random_set(3, [30] * 8)
    torch.manual_seed(0)
    model = Attention(2, 32)
    model.scale_to(data)
    model.eval()  # without dropout, the answer is that of the training
    points = model.prepare(data).batch(torch.arange(8))
    target = torch.arange(8) // 2 % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(points), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_state_round_trip() -> None:
    data, model = random_set(0, LENGTHS), network()
    torch.manual_seed(5)
    other = Attention(3, 16).eval()
    assert not torch.equal(answers(other, data), answers(model, data))
    other.load_state_dict(model.state_dict())
    assert torch.equal(answers(other, data), answers(model, data))
