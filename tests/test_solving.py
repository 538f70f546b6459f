"""Structures solved from points alone."""

import os
from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch
from small import random_set
from test_boosted import turned
from tiny import write_lines

from cluster.errors import RunFailed
from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from featurization.sources import open_source
from training.dataset import load
from training.models import atoms as own
from training.models import kernel
from training.models.atoms import contents, description, structures
from training.models.descriptors import steady_invariants
from training.models.peaks import peaks_of
from training.models.refining import LIKELY, Q_MAX, SOLVED, Atoms, form_factors

SOURCE = "prototypes:60"


@pytest.fixture(scope="module")
def sphere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solving") / "sphere"
    featurize(SOURCE, folder, FeaturizationConfig(selection="sphere:1.2"), OneProcess())
    data = load(folder)
    return data.subset(np.flatnonzero(data.offsets.diff().numpy() < 800)[:30])


@pytest.fixture(scope="module")
def found(sphere):
    return structures(replace(sphere, hkl_P3=sphere.hkl_P3 * 0, lattice_N33=sphere.lattice_N33 * 0))


@pytest.fixture(scope="module")
def crystals(sphere):
    """Oracle: the atoms that the clouds were computed of."""
    source = open_source(SOURCE)
    every = (source.parse(record) for record in source.records())
    return {crystal.id: crystal for crystal in every if crystal.id in set(sphere.ids)}


def shares(numbers):
    kinds, counts = np.unique(numbers, return_counts=True)
    return dict(zip(kinds.tolist(), (counts / counts.sum()).round(6).tolist(), strict=True))


def nearest(lattice, places):
    """Each atom's distance to the next, sorted."""
    cells = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    apart = (places[None] - places[:, None])[:, :, None] + cells
    length = np.linalg.norm(apart @ lattice, axis=3)
    return np.sort(np.where(length < 0.1, np.inf, length).min(axis=(1, 2)))


def test_elements_and_distances_are_those_of_the_crystal(sphere, found, crystals):
    assert np.mean([atoms is not None for atoms in found]) > 0.8
    right = []
    for id, atoms in zip(sphere.ids, found, strict=True):
        if atoms is None:
            continue
        crystal = crystals[id]
        truth = [gemmi.Element(name).atomic_number for name in crystal.species]
        same = shares(truth) == shares(atoms.number_A.astype(int))
        if same:
            theirs = nearest(crystal.lattice, crystal.positions)
            ours = nearest(atoms.lattice, atoms.place_A3)
            assert np.interp([0, 0.5, 1], np.linspace(0, 1, len(ours)), ours) == pytest.approx(
                np.interp([0, 0.5, 1], np.linspace(0, 1, len(theirs)), theirs), abs=0.2
            )
        right.append(same)
        assert same or atoms.misfit > SOLVED
    assert np.mean(right) > 0.9


def test_orientation_and_order_change_little(sphere, found):
    one = contents(found)
    for seed in (1, 2):
        again = structures(turned(sphere, seed, reflected=seed == 2))
        both = [a is not None and b is not None for a, b in zip(found, again, strict=True)]
        assert (
            np.mean([(a is None) == (b is None) for a, b in zip(found, again, strict=True)]) > 0.95
        )
        other = contents(again)
        change = np.abs(one - other)[both] / (1e-3 + np.nanstd(one, axis=0))
        assert np.mean(np.nanmax(change, axis=1) < 0.01) > 0.9


def test_one_column_says_how_well_the_atoms_fit(found):
    known = [atoms for atoms in found if atoms is not None]
    exact, poor, not_fitted = (replace(known[0], misfit=r) for r in (SOLVED / 9, 0.02, np.inf))
    answer = contents([exact, poor, not_fitted, None])
    assert np.array_equal(answer[0, :-1], answer[1, :-1], equal_nan=True)
    assert answer[:, -1] == pytest.approx([SOLVED, 0.02, LIKELY, np.nan], nan_ok=True)


@pytest.fixture(scope="module")
def some():
    """Nodes of a cell, form factors there, and atoms in it."""
    random = np.random.default_rng(4)
    lattice = 5 * np.eye(3) + random.normal(0, 0.5, (3, 3))
    hkl = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    length = np.linalg.norm(hkl @ np.linalg.inv(lattice).T, axis=1)
    hkl, length = hkl[length < Q_MAX], length[length < Q_MAX]
    return hkl, length, random.random((5, 3)), np.array([1.0, 8, 22, 57, 97])


def test_structure_factors_are_those_of_gemmi(some):
    hkl, length, place, number = some
    real, imaginary, _ = kernel.waves(hkl, place, number, form_factors(length))
    expected = np.zeros(len(hkl), dtype=complex)
    for x, z in zip(place, number, strict=True):
        table = gemmi.Element(int(z)).it92
        f = np.array([table.calculate_sf(q * q / 4) for q in length])
        expected += f * np.exp(2j * np.pi * (hkl @ x))
    assert np.abs(real + 1j * imaginary - expected).max() < 3e-5 * number.sum()


@pytest.mark.parametrize("unknowns", [3, 4])
def test_derivatives_are_those_of_differences(some, unknowns):
    hkl, length, place, number = some
    number = number - 0.3
    factors = form_factors(length)

    def size(place, number):
        return np.hypot(*kernel.waves(hkl, place, number, factors)[:2])

    real, imaginary, part = kernel.waves(hkl, place, number, factors)
    computed = np.hypot(real, imaginary)
    u, v = (real / computed).astype(np.float32), (imaginary / computed).astype(np.float32)
    node = hkl.T.astype(np.float32, order="C")
    answer = kernel.derivatives(node, u, v, part, unknowns)
    assert answer.shape == (unknowns * len(number), len(hkl))
    step = 1e-6
    for row, derivative in enumerate(answer):
        kind, atom = divmod(row, len(number))
        there, back = [place.copy(), number.copy()], [place.copy(), number.copy()]
        for moved, sign in ((there, 1), (back, -1)):
            changed = moved[0][:, kind] if kind < 3 else moved[1]
            changed[atom] += sign * step
        expected = (size(*there) - size(*back)) / (2 * step)
        assert derivative == pytest.approx(expected, abs=2e-4 * np.abs(expected).max())


def perovskites(folder, edges, selection):
    """Clouds of SrTiO3 of some edges in Å."""
    place = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    sites = [
        {"species": [{"element": name, "occu": 1}], "abc": xyz}
        for name, xyz in zip(["Sr", "Ti", "O", "O", "O"], place, strict=True)
    ]
    documents = [
        {"material_id": f"a-{n}", "structure": {"lattice": {"matrix": cell}, "sites": sites}}
        for n, cell in enumerate((np.eye(3) * np.array(edges)[:, None, None]).tolist())
    ]
    source = write_lines(folder / "source.jsonl", documents)
    featurize(str(source), folder / "out", FeaturizationConfig(selection=selection), OneProcess())
    return load(folder / "out")


@pytest.mark.parametrize(
    ("edges", "selection"),
    [
        # A shell just beyond the sphere, which is within it where edges are rounded.
        (np.sqrt([20, 21, 22, 24, 29]) / 1.2 - 1e-6, "sphere:1.2"),
        ([3.905], "sphere:1.1"),
    ],
)
def test_what_the_sphere_cuts_away_is_not_absent(tmp_path, edges, selection):
    answer = structures(perovskites(tmp_path, edges, selection))
    assert len(answer) == len(edges)
    for atoms in answer:
        assert atoms is not None
        assert atoms.misfit < SOLVED
        assert sorted(atoms.number_A) == [8, 8, 8, 22, 38]


def test_a_process_of_the_pool_that_is_killed_is_told(sphere, monkeypatch):
    monkeypatch.setattr(own, "_SHARE", 2)
    monkeypatch.setattr(own.torch, "get_num_threads", lambda: 2)
    parent = os.getpid()
    monkeypatch.setattr(own, "solved", lambda *_: os.getpid() == parent or os.kill(os.getpid(), 9))
    with pytest.raises(RunFailed, match="was killed"):
        structures(sphere)


def test_contents_do_not_change_with_orientation():
    """Whatever solving does: of one structure, turned and moved, they are the same."""
    random = np.random.default_rng(0)
    lattice = 4 * np.eye(3) + random.normal(0, 0.4, (3, 3))
    place, number = random.random((4, 3)), np.array([8.0, 8, 22, 38])
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    order = random.permutation(4)
    pair = [
        Atoms(lattice, place, number),
        Atoms(lattice @ turn, (place[order] + random.random(3)) % 1, number[order]),
    ]
    one, other = contents(pair)
    assert np.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not np.allclose(one, contents([Atoms(lattice, place * 0.9, number)])[0], equal_nan=True)


def test_what_explains_no_intensities_is_not_believed():
    data = random_set(0, [0, 1, 5, 40, 60])
    answer = description(data)
    fixed = steady_invariants(data)
    assert structures(data)[:2] == [None, None]
    assert np.array_equal(answer[:, : fixed.shape[1]], fixed)
    assert np.isnan(contents([None])).all()
    assert contents([]).shape == (0, contents([None]).shape[1])


def test_what_is_no_whole_sphere_is_not_tried(sphere, monkeypatch):
    asked = []
    monkeypatch.setattr(own, "solved", lambda *_: asked.append(None))
    structures(sphere)
    assert len(asked) == len(sphere)
    near = np.linalg.norm(sphere.q_P3.numpy(), axis=1) < 0.8
    crystal_P = np.repeat(np.arange(len(sphere)), sphere.offsets.diff().numpy())[near]
    cut = replace(
        sphere,
        q_P3=sphere.q_P3[near],
        intensity_P=sphere.intensity_P[near],
        multiplicity_P=sphere.multiplicity_P[near],
        hkl_P3=sphere.hkl_P3[near],
        offsets=torch.from_numpy(np.append(0, np.bincount(crystal_P).cumsum())),
    )
    assert structures(cut) == [None] * len(cut)
    assert len(asked) == len(sphere)


def test_peaks_are_found_between_the_points_of_a_map():
    axis = np.arange(16) / 16
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    wave = [np.cos(2 * np.pi * (a - b)) for a, b in ((x, 0.21), (y, 0.48), (z, 0.97))]
    heights, places = peaks_of(np.exp(2 * sum(wave)), 5)
    assert len(heights) == 1
    assert places[0] % 1 == pytest.approx([0.21, 0.48, 0.97], abs=0.01)
