"""PointNet: invariances, scales, and that it can learn at all."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_set, tiny
from torch import nn

from training.config import NetworkName
from training.dataset import CloudBatch
from training.models.build import empty_network, new_network
from training.models.pointnet import PointNet
from training.rotations import random_rotations

LENGTHS = [3, 1, 17, 40, 2]


def network(dtype=torch.float32, classes=3, kind=PointNet):
    torch.manual_seed(0)
    model = kind(classes, 16)
    model.q_scale.fill_(0.5)
    model.intensity_scale.fill_(0.1)
    return model.to(dtype).eval()


def batch_of(lengths=LENGTHS, dtype=torch.float32, seed=0):
    data = random_set(seed, list(lengths))
    batch = data.batch(torch.arange(len(data)))
    return CloudBatch(batch.q_P3.to(dtype), batch.intensity_P.to(dtype), batch.lengths_B)


def reordered(batch, seed):
    """The points of each crystal in another order, crystal by crystal."""
    generator = torch.Generator().manual_seed(seed)
    starts = (batch.lengths_B.cumsum(0) - batch.lengths_B).tolist()
    order = torch.cat(
        [
            start + torch.randperm(n, generator=generator)
            for start, n in zip(starts, batch.lengths_B.tolist(), strict=True)
        ]
    )
    return CloudBatch(batch.q_P3[order], batch.intensity_P[order], batch.lengths_B)


def change_by_order(model, batch, seed):
    with torch.no_grad():
        return float((model(batch) - model(reordered(batch, seed))).abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_points_does_not_matter(dtype, tolerance, seed):
    assert change_by_order(network(dtype), batch_of(dtype=dtype, seed=seed), seed) < tolerance


class FirstPoints(PointNet):
    """Broken on purpose: pools the first points of each crystal instead of all."""

    def forward(self, batch):
        starts = batch.lengths_B.cumsum(0) - batch.lengths_B
        chosen = CloudBatch(
            batch.q_P3[starts], batch.intensity_P[starts], torch.ones_like(batch.lengths_B)
        )
        return super().forward(chosen)


def test_the_check_of_order_finds_a_pool_that_takes_the_first_points():
    assert change_by_order(network(kind=FirstPoints), batch_of(), 1) > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_a_crystal_does_not_see_its_neighbours(lengths, draw):
    data, model = random_set(5, lengths), network(torch.float64)
    rows = torch.tensor(draw.draw(st.permutations(range(len(lengths)))))

    def logits(rows_B):
        batch = data.batch(rows_B)
        with torch.no_grad():
            return model(
                CloudBatch(batch.q_P3.double(), batch.intensity_P.double(), batch.lengths_B)
            )

    alone = torch.cat([logits(row[None]) for row in rows])
    assert torch.allclose(logits(rows), alone, rtol=0, atol=1e-13)


def test_all_points_and_both_mates_count():
    model, data = network(), random_set(6, [30])
    batch = data.batch(torch.tensor([0]))
    with torch.no_grad():
        whole = model(batch)
        half = model(CloudBatch(data.q_P3, data.intensity_P, torch.tensor([30])))
        strong = batch.intensity_P.clone()
        strong[-1] += 1e4
        changed = model(CloudBatch(batch.q_P3, strong, batch.lengths_B))
    assert (whole - half).abs().max() > 1e-6
    assert (whole - changed).abs().max() > 1e-3


def test_the_network_alone_is_not_invariant_to_rotation():
    # Only augmentation teaches it; an accidental invariance would hide angles from the network.
    batch = batch_of()
    turns = random_rotations(len(LENGTHS), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = network()
        assert (model(batch) - model(batch.rotated(turns))).abs().max() > 1e-4


def test_an_absent_reflection_is_zero_whatever_the_scale():
    batch = replace(batch_of(), intensity_P=torch.zeros_like(batch_of().intensity_P))
    small, large = network(), network()
    large.intensity_scale.fill_(1e6)
    with torch.no_grad():
        assert torch.equal(small(batch), large(batch))


def test_scales_come_from_the_training_rows_alone(clouds):
    rows = torch.arange(0, 60)
    model = new_network(tiny(), clouds, rows)
    points = clouds.crystal_P < 60
    q = clouds.q_P3[points].double().norm(dim=1)
    assert float(model.q_scale) == pytest.approx(float((q**2).mean().sqrt()), rel=1e-5)
    present = clouds.intensity_P[points & (clouds.intensity_P > 0)].numpy()
    assert float(model.intensity_scale) == pytest.approx(float(np.median(present)), rel=0.01)

    strange = replace(
        clouds,
        q_P3=torch.where(points[:, None], clouds.q_P3, 99.0),
        intensity_P=torch.where(points, clouds.intensity_P, 1e9),
    )
    other = new_network(tiny(), strange, rows)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_scales_of_a_set_without_intensity_or_length_are_one():
    data = random_set(0, [1, 1, 1, 1])
    empty = replace(data, intensity_P=torch.zeros(4))
    model = new_network(tiny(), empty, torch.arange(4))
    assert (float(model.q_scale), float(model.intensity_scale)) == (1.0, 1.0)
    with torch.no_grad():
        assert model(empty.batch(torch.arange(4))).isfinite().all()


def test_weights_depend_on_the_seed_alone(clouds):
    rows = torch.arange(60)
    torch.manual_seed(123)
    first = new_network(tiny(seed=3), clouds, rows).state_dict()
    torch.manual_seed(456)
    again = new_network(tiny(seed=3), clouds, rows).state_dict()
    other = new_network(tiny(seed=4), clouds, rows).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.1.weight"], other["head.1.weight"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 99))
def test_gradients_are_those_of_pooling_all_points(lengths, seed):
    batch = random_set(seed, lengths).batch(torch.arange(len(lengths)))
    torch.manual_seed(seed)
    model = PointNet(3, 16).double()
    batch = CloudBatch(batch.q_P3.double(), batch.intensity_P.double(), batch.lengths_B)
    model.train()(batch).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    features = torch.cat([batch.q_P3, torch.log1p(batch.intensity_P)[:, None]], dim=1)
    pooled = [part.amax(dim=0) for part in model.points(features).split(batch.lengths_B.tolist())]
    logits = model.head(torch.stack(pooled))
    assert torch.allclose(model.eval()(batch), logits)
    logits.square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_one_batch_can_be_learned_by_heart():
    data = random_set(7, [20] * 12)
    batch, target = data.batch(torch.arange(12)), torch.arange(12) % 3
    torch.manual_seed(0)
    model = PointNet(3, 64)
    model.q_scale.fill_(0.4)
    model.intensity_scale.fill_(0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(250):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8
    assert losses[-1] < 0.05
    assert (model(batch).argmax(dim=1) == target).all()


@pytest.mark.parametrize("name", get_args(NetworkName))
def test_a_share_of_no_crystals_gives_zero_gradients(name):
    # What a worker meets at the tail of an epoch: it must still take part in the sum.
    data, model = random_set(8, [4, 4]), empty_network(tiny(model=name)).train()
    batch = model.prepare(data).batch(torch.zeros(0, dtype=torch.int64))
    if isinstance(batch, CloudBatch):
        batch = batch.rotated(torch.zeros(0, 3, 3))
    logits = model(batch)
    assert logits.shape == (0, 7)
    target = torch.zeros(0, dtype=torch.int64)
    nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_powder_cnn_in_double_precision_answers_as_in_single():
    data, model = random_set(8, [30, 4, 17]), empty_network(tiny(model="powder_cnn")).eval()
    model.scale_to(data)
    batch = model.prepare(data).batch(torch.arange(3))
    single = model(batch)
    double = model.double()(batch)
    assert double.dtype == torch.float64
    assert torch.allclose(double, single.double(), atol=1e-4)
