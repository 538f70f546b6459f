"""Spherical coefficients and the network over them: oracles, invariances, odd clouds, learning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre
from safetensors.torch import load_file, save_file
from small import random_set
from torch import Tensor

from ablation.perturbations import ARMS, perturb
from training.dataset import CloudSet
from training.models import descriptors, spherical
from training.models.harmonic import Harmonic, fixed_invariants
from training.models.spherical import CHANNELS, DEGREES, SHELLS, SLICES, coefficients, harmonics

LENGTHS = [3, 1, 17, 40, 2, 120]
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-11}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def typed(data: CloudSet, dtype: torch.dtype) -> CloudSet:
    return replace(data, q_P3=data.q_P3.to(dtype), intensity_P=data.intensity_P.to(dtype))


def network(dtype: torch.dtype = torch.float32, kind: type[Harmonic] = Harmonic) -> Harmonic:
    torch.manual_seed(0)
    model = kind(3, 32)
    model.scale_to(random_set(0, LENGTHS))
    torch.nn.init.normal_(model.learned[2].weight)  # new networks do not use this branch yet
    return model.to(dtype).eval()


def answers(model: Harmonic, data: CloudSet) -> Tensor:
    with torch.no_grad():
        return model(model.prepare(data).batch(torch.arange(len(data))))


def difference(model: Harmonic, one: CloudSet, other: CloudSet) -> float:
    return float((answers(model, one) - answers(model, other)).abs().max())


def orthogonal(seed: int, determinant: int) -> Tensor:
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return torch.from_numpy(turn * np.sign(np.linalg.det(turn)) * determinant)


def turned(data: CloudSet, matrix_33: Tensor) -> CloudSet:
    return replace(data, q_P3=(data.q_P3.double() @ matrix_33.T).to(data.q_P3.dtype))


def reordered(data: CloudSet, seed: int) -> CloudSet:
    """The points of each crystal in another order, and some stored by the other mate."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.q_P3), generator=generator)
    order = order[torch.argsort(data.crystal_P[order], stable=True)]
    sign = torch.randint(2, (len(order), 1), generator=generator) * 2 - 1
    return replace(
        data,
        hkl_P3=data.hkl_P3[order],
        q_P3=data.q_P3[order] * sign,
        intensity_P=data.intensity_P[order],
        multiplicity_P=data.multiplicity_P[order],
    )


def whole(data: CloudSet) -> CloudSet:
    """Both mates stored, each with multiplicity 1."""
    batch = data.batch(torch.arange(len(data)))
    return replace(
        data,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths_B.cumsum(0)]),
        hkl_P3=torch.repeat_interleave(data.hkl_P3, data.multiplicity_P, dim=0),
        q_P3=batch.q_P3,
        intensity_P=batch.intensity_P,
        multiplicity_P=torch.ones(len(batch.q_P3), dtype=torch.int64),
    )


def test_harmonics_obey_the_addition_theorem() -> None:
    random = np.random.default_rng(0).normal(size=(60, 3))
    direction = random / np.linalg.norm(random, axis=1, keepdims=True)
    values = harmonics(torch.from_numpy(direction)).numpy()
    cosine = direction @ direction.T
    for degree in DEGREES:
        part = values[:, SLICES[degree]]
        expected = legendre.Legendre.basis(degree)(cosine)
        np.testing.assert_allclose(part @ part.T, expected, atol=1e-13)


def test_coefficients_are_those_of_the_whole_cloud() -> None:
    # Scalar products of coefficients against sums over pairs of points: no harmonics, no halves.
    data = typed(random_set(1, [40, 7]), torch.float64)
    q_max, scale = 0.6, 0.05
    found = coefficients(data, q_max, scale)
    for crystal in range(2):
        batch = data.batch(torch.tensor([crystal]))
        q, intensity = batch.q_P3.numpy(), batch.intensity_P.numpy()
        radius = np.linalg.norm(q, axis=1)
        direction = q / np.where(radius > 0, radius, 1)[:, None]
        place = np.minimum(radius / q_max, 1)[:, None] * (SHELLS - 1)
        shells = np.exp(-0.5 * (place - np.arange(SHELLS)) ** 2)
        kinds = [intensity > 0, np.log(1 + intensity / scale), np.sqrt(intensity), intensity]
        weight = np.concatenate([kind[:, None] * shells for kind in kinds], axis=1)
        np.testing.assert_allclose(found[crystal, :, 0], weight.sum(axis=0), rtol=1e-11)
        for degree in DEGREES[1:]:
            away = (radius[:, None] > 0) & (radius > 0)
            pairs = np.where(away, legendre.Legendre.basis(degree)(direction @ direction.T), 0)
            part = found[crystal, :, SLICES[degree]].numpy()
            np.testing.assert_allclose(part @ part.T, weight.T @ pairs @ weight, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 90))
def test_chunks_do_not_change_coefficients(lengths: list[int], chunk: int) -> None:
    data = typed(random_set(2, lengths), torch.float64)
    expected = coefficients(data, 0.6, 0.05)
    usual, spherical._CHUNK = spherical._CHUNK, chunk
    try:
        found = coefficients(data, 0.6, 0.05)
    finally:
        spherical._CHUNK = usual
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not expected[torch.tensor(lengths) == 0].any()


@DTYPES
@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_rotation_and_reflection_change_nothing(
    dtype: torch.dtype, determinant: int, seed: int
) -> None:
    data = typed(random_set(seed, LENGTHS), dtype)
    other = turned(data, orthogonal(seed, determinant))
    assert difference(network(dtype), data, other) < TOLERANCE[dtype]


class AcrossOrders(Harmonic):
    """Broken on purpose: weighs the orders m of a degree differently."""

    def power(self, relative_BAM: Tensor) -> Tensor:
        return super().power(relative_BAM * torch.linspace(0.5, 1.5, relative_BAM.shape[2]))


class AcrossDegrees(Harmonic):
    """Broken on purpose: takes the last order of each degree for the first of the next."""

    def power(self, relative_BAM: Tensor) -> Tensor:
        return super().power(relative_BAM.roll(1, dims=2))


@pytest.mark.parametrize("kind", [AcrossOrders, AcrossDegrees])
def test_the_check_of_rotation_finds_mixing_of_components(kind: type[Harmonic]) -> None:
    data = random_set(0, LENGTHS)
    model = network(kind=kind)
    assert difference(model, data, turned(data, orthogonal(0, 1))) > 10 * TOLERANCE[torch.float32]


@DTYPES
def test_order_and_choice_of_mates_change_nothing(dtype: torch.dtype) -> None:
    data = typed(random_set(3, LENGTHS), dtype)
    assert difference(network(dtype), data, reordered(data, 0)) < TOLERANCE[dtype]
    assert difference(network(dtype), data, whole(data)) < TOLERANCE[dtype]


def test_directions_count() -> None:
    # Every |q| and I stays, only angles between points change.
    data = random_set(4, [40, 120])
    bent = data.q_P3.roll(1, dims=1).where(data.intensity_P[:, None] > 0.05, data.q_P3)
    model = network()
    learned = model.prepare(data).values_ND - model.prepare(replace(data, q_P3=bent)).values_ND
    angular = CHANNELS * 27
    assert learned[:, :angular].abs().max() > 0.1
    assert difference(model, data, replace(data, q_P3=bent)) > 1e-2


def test_only_points_are_seen() -> None:
    data = random_set(5, LENGTHS)
    other = replace(
        data,
        ids=data.ids[::-1],
        groups=data.groups[::-1],
        crystal_systems=data.crystal_systems[::-1],
        labels={},
        hkl_P3=torch.zeros_like(data.hkl_P3),
        lattice_N33=torch.full_like(data.lattice_N33, torch.nan),
    )
    found = []
    for points in (data, other):
        torch.manual_seed(0)
        model = Harmonic(2, 16).eval()
        model.scale_to(points)
        found.append(answers(model, points))
    assert torch.equal(*found)


def test_the_columns_left_out_are_the_power_spectra() -> None:
    data = random_set(5, LENGTHS)
    half = coefficients(data, descriptors.Q_MAX, descriptors._UNIT).double()
    below = half[:, :, 0].square().clamp_min(1e-12)
    power = [half[:, :, SLICES[degree]].square().sum(dim=2) / below for degree in DEGREES[1:]]
    columns = torch.from_numpy(descriptors.invariants(data))
    kept = fixed_invariants(data)
    start = kept.shape[1] - 27
    expected = torch.cat([kept[:, :start], *power, kept[:, start:]], dim=1).float()
    torch.testing.assert_close(columns, expected, rtol=1e-4, atol=1e-6)


def test_a_crystal_does_not_see_its_neighbours() -> None:
    data, model = random_set(6, LENGTHS), network()
    alone = [answers(model, data.subset(np.array([row]))) for row in range(len(data))]
    torch.testing.assert_close(torch.cat(alone), answers(model, data), rtol=0, atol=1e-3)


@pytest.mark.parametrize("lengths", [[0], [1], [3], [0, 1, 3, 40]])
@pytest.mark.parametrize("scaled", [False, True])
def test_clouds_of_few_points(lengths: list[int], scaled: bool) -> None:
    model, data = Harmonic(2, 16).eval(), random_set(7, lengths)
    if scaled:
        model.scale_to(data)
    assert answers(model, data).isfinite().all()
    nowhere = replace(data, intensity_P=torch.zeros_like(data.intensity_P))
    assert answers(model, nowhere).isfinite().all()
    model.scale_to(nowhere)
    assert answers(model, data).isfinite().all()


@pytest.mark.parametrize("arm", ARMS)
def test_every_perturbed_cloud_has_an_answer(arm: str, clouds: CloudSet) -> None:
    data = perturb(clouds.subset(np.arange(20)), arm, None, seed=0)
    model = Harmonic(7, 16).eval()
    model.scale_to(data)
    assert answers(model, data).isfinite().all()


def test_a_batch_is_learned_by_heart(clouds: CloudSet) -> None:
    data = clouds.subset(np.arange(0, 140, 5))
    target = torch.from_numpy(np.unique(data.crystal_systems, return_inverse=True)[1])
    target = target.roll(7)  # wrong on purpose: nothing but the memory of single clouds helps
    model = Harmonic(7, 32)
    model.scale_to(data)
    batch = model.prepare(data).batch(torch.arange(len(data)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()
    assert torch.equal(model.eval()(batch).argmax(dim=1), target)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_file_gives_the_same_answers(tmp_path: Path) -> None:
    model, data = network(), random_set(8, LENGTHS)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(9)
    copy = Harmonic(3, 32)
    copy.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(answers(copy.eval(), data), answers(model, data))
