"""The lattice of a cloud, its electrons, and the distribution of its intensities."""

from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch
from small import random_set

from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from featurization.sources import open_source
from training.dataset import load
from training.models import wilson
from training.models.descriptors import Q_MAX, profile
from training.models.indexing import volumes
from training.rotations import random_rotations

GRID = np.linspace(0, Q_MAX, 241)
SOURCE = "prototypes:60"
VOLUME, ELECTRONS, SQUARE = 74, 75, 76  # columns of `wilson.statistics`


@pytest.fixture(scope="module")
def sphere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wilson") / "sphere"
    featurize(SOURCE, folder, FeaturizationConfig(selection="sphere:1.2"), OneProcess())
    return load(folder)


def found(data):
    return wilson.statistics(data, profile(data)[1], GRID)


def test_the_cell_is_found_from_the_points_alone(sphere):
    blind = replace(sphere, hkl_P3=sphere.hkl_P3 * 0, lattice_N33=sphere.lattice_N33 * 0)
    cells = np.abs(np.linalg.det(sphere.lattice_N33.double().numpy()))
    assert np.allclose(volumes(blind), cells, rtol=1e-4)
    # Shortest points that span a part of the lattice only are refined by the others.
    corners = torch.tensor(
        [[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [3.0, 4.0, 5.0], [2.0, 3.0, 4.0]]
    )
    one = random_set(0, [5])
    turn = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert volumes(replace(one, q_P3=0.1 * corners @ turn.T)) == pytest.approx([1000 / 2], rel=1e-4)


def test_points_on_no_lattice_have_no_cell(sphere):
    generator = torch.Generator().manual_seed(0)
    turns = random_rotations(len(sphere.q_P3), generator)
    random = replace(sphere, q_P3=torch.einsum("pij,pj->pi", turns, sphere.q_P3))
    assert np.isnan(volumes(random)).mean() > 0.9  # few points may lie on one by accident
    assert np.isnan(volumes(random_set(0, [0, 1, 2, 3]))).all()
    assert np.isfinite(found(random)).all()


def test_electrons_and_squares_are_those_of_the_atoms(sphere):
    """Oracle: the atoms; f(0) is Z within 0.3 %."""
    columns = found(sphere)
    source = open_source(SOURCE)
    crystals = {c.id: c for c in map(source.parse, source.records())}
    density = np.array([_density(crystals[str(id)]) for id in sphere.ids])
    volume_N1 = columns[:, VOLUME, None]
    assert np.allclose(columns[:, ELECTRONS, None] / volume_N1, density[:, :1], rtol=0.003)
    # The window over |q| takes part of f² away, more where electrons are loosely bound.
    ratio = columns[:, SQUARE] / volume_N1[:, 0] / density[:, 1]
    assert 0.6 < ratio.min() < ratio.max() < 1.05
    assert np.std(np.log(ratio)) < 0.1


def _density(crystal):
    """Σ Z and Σ Z² per volume."""
    atoms = crystal.composition.items()
    return [
        sum(n * gemmi.Element(name).atomic_number ** power for name, n in atoms) / crystal.volume
        for power in (1, 2)
    ]


def test_the_mean_of_squares_is_one(sphere):
    """Σf² is what intensities are on average (Wilson 1942), however few reflections there are."""
    columns = found(sphere).reshape(len(sphere), -1)
    mean = columns[:, -10:-5]  # of E², by range of |q|
    assert np.allclose(mean[:, 1:4].mean(axis=0), 1, atol=0.15)
