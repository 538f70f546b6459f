"""Lattice, powder and composition alone: what each may see, and that it is what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_set

from cluster.errors import UserError
from training.dataset import CloudSet
from training.models import baselines
from training.models.powder_cnn import PowderCNN, profiles
from training.rotations import random_rotations

LENGTHS = [40, 25, 1, 0, 12, 3]
FORMULAS = ["NaCl", "O2Si", "Fe0.333O0.667", "DLi", "C", "CsXe"]


def crystals(seed=0, lengths=LENGTHS, **changes):
    data = random_set(seed, lengths)
    groups = np.resize(np.array(FORMULAS), len(data))
    return replace(data, **({"groups": groups} | changes))


def nonsense(data: CloudSet, *kept: str) -> CloudSet:
    """Everything but the fields `kept` replaced by another crystal's or by noise."""
    other = random_set(99, data.offsets.diff().tolist())
    values = {
        "ids": other.ids,
        "groups": np.array(["Zn"] * len(data)),
        "crystal_systems": other.crystal_systems[::-1],
        "labels": {"bulk_modulus": other.labels["bulk_modulus"]},
        "hkl_P3": other.hkl_P3.flip(0),
        "q_P3": other.q_P3.flip(0),
        "intensity_P": other.intensity_P.flip(0),
        "multiplicity_P": other.multiplicity_P.flip(0),
        "lattice_N33": other.lattice_N33,
    }
    return replace(data, **{name: new for name, new in values.items() if name not in kept})


def turned(data, seed=1):
    """Each crystal in another orientation, half of them reflected."""
    generator = torch.Generator().manual_seed(seed)
    rotations = random_rotations(len(data), generator)
    rotations = rotations * torch.tensor([1.0, -1.0])[torch.arange(len(data)) % 2, None, None]
    of_points = rotations[data.crystal_P]
    return replace(
        data,
        q_P3=torch.einsum("pij,pj->pi", of_points, data.q_P3),
        lattice_N33=data.lattice_N33 @ rotations.transpose(1, 2),
    )


def network(data, width=16):
    torch.manual_seed(0)
    model = PowderCNN(2, width).eval()
    model.scale_to(data)
    return model


def logits(model, data):
    with torch.no_grad():
        return model(model.prepare(data).batch(torch.arange(len(data)))).numpy()


SEEN = {
    "lattice": (baselines.lattice, ("lattice_N33",)),
    "powder": (baselines.powder, ("q_P3", "intensity_P", "multiplicity_P")),
    "composition": (baselines.composition, ("groups",)),
    "powder_cnn": (
        lambda data: logits(network(crystals()), data),
        ("q_P3", "intensity_P", "multiplicity_P"),
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_baseline_sees_its_own_fields_alone(name):
    describe, fields = SEEN[name]
    data = crystals()
    np.testing.assert_array_equal(describe(nonsense(data, *fields)), describe(data))
    # The same with any of its own fields replaced finds the difference.
    changed = [field for field in fields if field != "multiplicity_P"]
    for field in changed:
        others = [kept for kept in fields if kept != field]
        again = describe(nonsense(data, *others))
        assert not np.array_equal(again, describe(data), equal_nan=True)


@pytest.mark.parametrize("name", ["lattice", "powder", "powder_cnn"])
def test_orientation_does_not_matter(name):
    describe, _ = SEEN[name]
    data = crystals()
    # Far from 1e-4, the distance of two lines, random cells have no |q| that agree by chance.
    np.testing.assert_allclose(describe(turned(data)), describe(data), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("describe", [baselines.powder, SEEN["powder_cnn"][0]])
def test_the_order_of_points_does_not_matter(describe):
    data = crystals()
    order = torch.cat([row.flip(0) for row in torch.arange(len(data.q_P3)).split(LENGTHS)])
    fields = ("q_P3", "intensity_P", "multiplicity_P")
    again = replace(data, **{name: getattr(data, name)[order] for name in fields})
    np.testing.assert_allclose(describe(again), describe(data), rtol=1e-5, atol=1e-6)


def unimodular(random):
    """A change of basis: products of shears, a permutation and a sign."""
    matrix = np.eye(3)[random.permutation(3)] * random.choice([-1, 1], 3)[:, None]
    for _ in range(4):
        shear = np.eye(3)
        i, j = random.permutation(3)[:2]
        shear[i, j] = random.integers(-2, 3)
        matrix = shear @ matrix
    return matrix


# Cells at the edges of reduction, where the shortest basis is not unique.
EDGES = {
    "cubic": np.eye(3),
    "fcc": np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2,
    "bcc": np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) / 2,
    "hexagonal": np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 1.6]]),
    "flat hexagonal": np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 0.6]]),
    "rhombohedral": np.eye(3) + 0.3,
    "monoclinic": np.array([[1, 0, 0], [0, 1.3, 0], [-0.5, 0, 1.7]]),
}


def lattice_features(cells, dtype=torch.float32):
    cells = torch.tensor(np.array(cells), dtype=dtype)
    return baselines.lattice(crystals(lengths=[1] * len(cells), lattice_N33=cells))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_basis_of_the_lattice_does_not_matter(seed):
    random = np.random.default_rng(seed)
    cells = [5 * cell for cell in EDGES.values()]
    cells += [np.diag(random.uniform(3, 9, 3)) + random.normal(0, 1.5, (3, 3)) for _ in range(5)]
    # A flat cell, and a basis of long vectors, would amplify a rounding to float32 beyond any
    # useful tolerance.
    cells = [cell for cell in cells if abs(np.linalg.det(cell)) > 20]
    again = [unimodular(random) @ cell for cell in cells]
    first, second = (lattice_features(each, torch.float64) for each in (cells, again))
    np.testing.assert_allclose(second, first, rtol=1e-3, atol=2e-3)


def test_the_check_of_bases_finds_the_lengths_of_the_given_cell():
    cell = np.diag([3.0, 4.0, 5.0])
    other = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]]) @ cell
    lengths = [np.sort(np.linalg.norm(each, axis=1)) for each in (cell, other)]
    assert np.abs(lengths[0] - lengths[1]).max() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_vonorms_and_minima_are_those_of_an_exhaustive_search(seed):
    random = np.random.default_rng(seed)
    cells = [5 * cell for cell in EDGES.values()]
    cells += [np.diag(random.uniform(3, 9, 3)) + random.normal(0, 1, (3, 3))]
    data = crystals(lengths=[1] * len(cells), lattice_N33=torch.tensor(np.array(cells)))
    columns = baselines.lattice_columns(data)
    grid = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for i, cell in enumerate(cells):
        length = np.linalg.norm(grid @ cell, axis=1)
        parity = grid % 2 @ [1, 2, 4]
        shortest = np.sort([length[parity == k].min() for k in range(1, 8)])
        np.testing.assert_allclose(columns["vonorm"][i], shortest, rtol=1e-5)
        chosen: list[np.ndarray] = []
        for vector in grid[np.argsort(length)][1:]:
            if np.linalg.matrix_rank([*chosen, vector]) == len(chosen) + 1:
                chosen.append(vector)
        np.testing.assert_allclose(
            columns["minimum"][i], np.linalg.norm(np.array(chosen) @ cell, axis=1), rtol=1e-5
        )
        np.testing.assert_allclose(columns["volume"][i], abs(np.linalg.det(cell)), rtol=1e-5)


def test_lattices_of_one_crystal_system_but_other_centring_differ():
    edges = {"cubic": 5.0, "fcc": 5 * 4 ** (1 / 3), "bcc": 5 * 2 ** (1 / 3)}
    features = lattice_features([EDGES[name] * edge for name, edge in edges.items()])
    np.testing.assert_allclose(features[:, 0], 125, rtol=1e-4)  # volumes
    assert min(np.abs(features[i] - features[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1


def test_a_profile_is_a_sum_over_both_friedel_mates():
    data = crystals()
    q_max, bins = 0.5, 7
    found = profiles(data, data.intensity_P.numpy(), q_max, bins)
    expected = np.zeros((len(data), bins))
    for i in range(len(data)):
        batch = data.batch(torch.tensor([i]))
        for q, intensity in zip(batch.q_P3.norm(dim=1), batch.intensity_P, strict=True):
            for k in range(bins):
                expected[i, k] += float(intensity) * max(0, 1 - abs(float(q) * 6 / q_max - k))
    assert (expected == 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_profile_does_not_depend_on_the_blocks(monkeypatch):
    data = crystals()
    value = data.intensity_P.numpy()
    whole = profiles(data, value, 0.5, 9)
    monkeypatch.setattr("training.models.powder_cnn._BLOCK", 2)
    np.testing.assert_array_equal(profiles(data, value, 0.5, 9), whole)


@pytest.mark.parametrize("describe", [baselines.powder, SEEN["powder_cnn"][0]])
def test_a_small_change_of_length_is_a_small_change_of_the_pattern(describe):
    # Eleven points with |q| at, below and above a bin's centre.
    centre = 3 * 1.2 / 29
    q = torch.tensor([[centre + step * 1e-6, 0, 0] for step in range(-5, 6)])
    data = crystals(lengths=[1] * 11)
    data = replace(data, q_P3=q, multiplicity_P=torch.full((11,), 2), intensity_P=torch.ones(11))
    features = describe(data)
    assert np.nanmax(np.abs(np.diff(features, axis=0))) < 2e-3


def test_lines_of_a_simple_cubic_crystal():
    grid = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    half = grid[[tuple(h) > (0, 0, 0) for h in grid]]
    data = crystals(lengths=[len(half)])
    data = replace(
        data,
        q_P3=torch.tensor(half / 5.0, dtype=torch.float32),
        multiplicity_P=torch.full((len(half),), 2),
        intensity_P=torch.ones(len(half)),
    )
    columns = baselines.powder_columns(data)
    squares = np.array([1, 2, 3, 4, 5, 6, 8, 9])
    np.testing.assert_allclose(columns["line |q|"][0, :8], np.sqrt(squares) / 5, rtol=1e-5)
    # Multiplicities of h² + k² + l² = 1, 2, 3, 4, 5, 6, 8, 9.
    np.testing.assert_allclose(columns["line intensity"][0, :8], [6, 12, 8, 6, 24, 24, 12, 30])


def test_no_cloud_is_too_small():
    data = crystals(lengths=[0, 1, 1, 2])
    dark = replace(data, intensity_P=torch.zeros(4))
    for each in (data, dark, crystals(lengths=[0, 0])):
        assert baselines.powder(each).shape == (len(each), 200)
        assert not np.isinf(baselines.powder(each)).any()
        assert np.isfinite(logits(network(each), each)).all()
        assert np.isfinite(logits(network(crystals()), each)).all()
    none = crystals().subset(np.zeros(len(LENGTHS), dtype=bool))
    for describe in (baselines.lattice, baselines.powder, baselines.composition):
        assert describe(none).shape == (0, describe(data).shape[1])


def statistics(*formulas):
    data = crystals(lengths=[1] * len(formulas), groups=np.array(formulas))
    return baselines.composition_columns(data)


def test_statistics_of_a_formula_by_hand():
    found = statistics("O2Si")
    third, z = 1 / 3, {"O": 8, "Si": 14}
    expected = {
        "mean number": (2 * z["O"] + z["Si"]) * third,
        "deviation number": 2 * third * 2 + third * 4,
        "low number": 8,
        "high number": 14,
        "range number": 6,
        "mode number": 8,
        "mean electronegativity": (2 * 3.44 + 1.90) * third,
        "mean valence p": (2 * 4 + 2) * third,
        "mean unfilled p": (2 * 2 + 4) * third,
        "mean valence": (2 * 6 + 4) * third,
        "mean row": (2 * 2 + 3) * third,
        "mean group": (2 * 16 + 14) * third,
        "elements": 2,
        "norm 2": 5**0.5 * third,
        "ionic": 2 * 2 * third * third * (1 - np.exp(-0.25 * (3.44 - 1.90) ** 2)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], [[value]], rtol=1e-6, err_msg=name)
    # The most frequent element, and the lower of two.
    assert statistics("OSi2", "OSi")["mode number"].tolist() == [[14], [8]]


@pytest.mark.parametrize(
    ("formula", "electrons"),
    [("Fe", (2, 0, 6, 0)), ("As", (2, 3, 10, 0)), ("Gd", (2, 0, 1, 7)), ("Ne", (2, 6, 0, 0))],
)
def test_valence_electrons(formula, electrons):
    found = statistics(formula)
    assert tuple(found[f"mean valence {shell}"].item() for shell in "spdf") == electrons


def test_formulas_that_mean_the_same_and_unknown_properties():
    found = statistics("DLi", "HLi", "Fe0.333O0.667", "FeO2", "CsXe", "HeNa")
    for name, column in found.items():
        np.testing.assert_array_equal(column[0], column[1], err_msg=name)
        np.testing.assert_allclose(column[2], column[3], rtol=1e-2, atol=0.1, err_msg=name)
    # Helium has no electronegativity, xenon has.
    assert np.isnan(found["mean electronegativity"][:, 0]).tolist() == [False] * 5 + [True]
    assert all(np.isfinite(column[:5]).all() for name, column in found.items() if "number" in name)


@pytest.mark.parametrize("group", ["", "A_cF8_225_b:NaCl", "Na(Cl)2", "Xq2", "nacl", "group-1"])
def test_a_group_that_is_no_formula_is_explained(group):
    with pytest.raises(UserError, match="no chemical formula") as caught:
        statistics("NaCl", group)
    assert repr(group) in caught.value.problem


def test_the_network_learns_a_batch_by_heart():
    data = crystals(3, [30] * 8)
    target = torch.arange(8) % 2
    torch.manual_seed(0)
    model = PowderCNN(2, 32)
    model.scale_to(data)
    batch = model.prepare(data).batch(torch.arange(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert (model(batch).argmax(dim=1) == target).all()


def test_an_answer_does_not_depend_on_the_neighbours_in_the_batch():
    data = crystals()
    model = network(data)
    alone = [logits(model, data.subset(np.array([i]))) for i in range(len(data))]
    np.testing.assert_allclose(np.concatenate(alone), logits(model, data), atol=1e-5)
