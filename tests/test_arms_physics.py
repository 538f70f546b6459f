"""What single arms mean in physics, against featurization, other programs and geometry."""

import json
import math
from dataclasses import replace
from pathlib import Path

import moyopy
import numpy as np
import pytest
import scipy.stats
import torch
from small import random_set, tiny
from test_arms import KEPT, SPHERE, prototypes, pyrite

from ablation.noise import poisson
from ablation.perturbations import ARMS, featurization_of, perturb
from ablation.points import equivalents_P, shells_P, sum_of
from ablation.symmetry import reduction, rotations
from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization.cloud import disguised
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from featurization.manifest import read_manifest
from featurization.radiation import form_factors
from featurization.worker import entry_of
from training.config import TrainingConfig
from training.dataset import CloudSet, cloud_set
from training.rotations import posed_rotations


def test_thermal_motion_is_that_of_featurization() -> None:
    asked = prototypes(SPHERE.model_copy(update={"b_iso": 3.0}))
    found = perturb(prototypes(SPHERE), "debye_waller", 3.0, 0)
    assert torch.equal(found.hkl_P3, asked.hkl_P3)
    torch.testing.assert_close(found.intensity_P, asked.intensity_P, rtol=2e-5, atol=0)


def test_poisson_quantiles_are_scipys() -> None:
    random = np.random.default_rng(0)
    mean = np.concatenate([[0.0], 10.0 ** random.uniform(-3, 6, 3000)])
    uniform = np.concatenate([[0.5], random.uniform(0, 1, 2994), [1e-12, 1 - 1e-12] * 3])
    found = poisson(torch.from_numpy(uniform), torch.from_numpy(mean)).numpy()
    np.testing.assert_array_equal(found, scipy.stats.poisson.ppf(uniform, mean).clip(min=0))


def test_counts_have_the_mean_and_the_noise_of_counts() -> None:
    data = random_set(0, [40] * 400, origin=False)
    data = replace(data, intensity_P=torch.ones_like(data.intensity_P))
    # 400 photons on 40 pairs: 10 on each, of variance 10.
    found = perturb(data, "intensity_counts", 400, 0).intensity_P.double() * 10
    assert torch.allclose(found, found.round(), atol=1e-5)
    assert abs(float(found.mean()) - 10) < 5 * math.sqrt(10 / 16000)
    assert abs(float(found.var()) - 10) < 5 * math.sqrt(2 * 100 / 16000) * 1.1


def test_noise_is_lognormal_of_mean_one() -> None:
    data = random_set(0, [40] * 400, origin=False)
    data = replace(data, intensity_P=torch.ones_like(data.intensity_P))
    logs = perturb(data, "intensity_noise", 0.5, 0).intensity_P.double().log()
    z = (logs + 0.125) / 0.5
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3


def test_wilson_is_exponential_about_the_shells_mean() -> None:
    data = random_set(0, [200] * 60, origin=False)
    data = replace(data, q_P3=torch.nn.functional.normalize(data.q_P3, dim=1))
    data = replace(data, q_P3=data.q_P3 * (1 + 0.01 * torch.rand(len(data.q_P3), 1)))
    present = torch.full_like(data.intensity_P, 7.0)
    found = perturb(replace(data, intensity_P=present), "intensity_wilson", None, 0)
    assert scipy.stats.kstest(found.intensity_P / 7.0, "expon").pvalue > 1e-3


def test_friedel_mates_share_their_mean() -> None:
    data = prototypes(SPHERE)
    found = perturb(data, "friedel_broken", 0.2, 0)
    assert (found.multiplicity_P == 1).all()
    rows = {
        (c, *hkl): i
        for c, hkl, i in zip(
            found.crystal_P.tolist(), found.hkl_P3.tolist(), found.intensity_P.tolist(), strict=True
        )
    }
    differing = 0
    for c, (h, k, l), i in zip(  # noqa: E741
        data.crystal_P.tolist(), data.hkl_P3.tolist(), data.intensity_P.tolist(), strict=True
    ):
        one, mate = rows[c, h, k, l], rows[c, -h, -k, -l]
        assert (one + mate) / 2 == pytest.approx(i, rel=1e-5)
        assert abs(one - mate) <= 0.4 * i * 1.001
        differing += one != mate
    assert differing == int((data.multiplicity_P == 2).sum())


@pytest.mark.parametrize("name", ["strained", "sheared", "affine_random", "volume_normalized"])
def test_lattice_and_points_move_together(name: str) -> None:
    data = prototypes(SPHERE)
    found = perturb(data, name, None, 0)
    reciprocal = torch.linalg.inv(found.lattice_N33.double()).mT[data.crystal_P]
    q = (data.hkl_P3.double()[:, :, None] * reciprocal).sum(1)
    torch.testing.assert_close(found.q_P3.double(), q, rtol=0, atol=2e-6)
    before, after = (one.lattice_N33.double().det().abs() for one in (data, found))
    if name == "sheared":
        torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    elif name == "strained":
        torch.testing.assert_close(after, 1.05 * before, rtol=1e-5, atol=0)
    elif name == "volume_normalized":
        torch.testing.assert_close(after, torch.full_like(after, 100.0), rtol=1e-5, atol=0)
        origin = (data.hkl_P3 == 0).all(dim=1)
        electrons = data.intensity_P[origin].double().sqrt() * before
        torch.testing.assert_close(
            found.intensity_P[origin].double().sqrt() * 100.0, electrons, rtol=1e-5, atol=0
        )


def test_strain_is_of_the_size_that_is_said() -> None:
    data = prototypes(SPHERE)
    for name in ("strained", "sheared"):
        moved = perturb(data, name, 0.05, 0)
        forward = torch.linalg.inv(data.lattice_N33.double()) @ moved.lattice_N33.double()
        size = (forward - torch.eye(3, dtype=torch.float64)).norm(dim=(1, 2))
        torch.testing.assert_close(size, torch.full_like(size, 0.05), rtol=1e-4, atol=0)


def test_rotations_of_lattices_are_moyos() -> None:
    lattice = prototypes(SPHERE).lattice_N33.double()
    # In cells that are anything but reduced.
    skewed = torch.tensor([[1, 3, -2], [0, 1, 4], [0, 0, 1]], dtype=torch.float64) @ lattice
    change = reduction(skewed)
    assert (torch.linalg.det(change.double()).abs() - 1 < 1e-9).all()
    found = rotations(change.double() @ skewed)
    for n, cell in enumerate(lattice.tolist()):
        bare = moyopy.MoyoDataset(moyopy.Cell(cell, [[0.0] * 3], [1]), symprec=1e-4)
        proper = sum(np.linalg.det(w) > 0 for w in np.array(bare.operations.rotations))
        assert int(found[n].any(dim=(1, 2)).sum()) == proper


def test_symmetry_is_raised_to_that_of_the_lattice() -> None:
    """Pyrite: of 210 and 120 only one is present; raised, both have half."""
    data = cloud_set([entry_of(pyrite(), 0, SPHERE)], SPHERE)
    raised = perturb(data, "symmetry_raised", None, 0)
    before, after = (
        {tuple(h): i for h, i in zip(one.hkl_P3.tolist(), one.intensity_P.tolist(), strict=True)}
        for one in (data, raised)
    )
    (there,) = {(0, 2, 1), (0, 1, 2)} & before.keys()
    gone = (there[0], there[2], there[1])
    assert after[there] == after[gone] == pytest.approx(before[there] / 2, rel=1e-5)
    for hkl, intensity in after.items():
        alike = [after[o] for o in after if sorted(map(abs, o)) == sorted(map(abs, hkl))]
        assert np.allclose(alike, intensity, rtol=1e-5)
    # Where absences were kept, the same and no new points.
    kept = cloud_set([entry_of(pyrite(), 0, KEPT)], KEPT)
    whole = perturb(kept, "symmetry_raised", None, 0)
    assert torch.equal(whole.hkl_P3, kept.hkl_P3)
    rows = zip(whole.hkl_P3.tolist(), whole.intensity_P.tolist(), strict=True)
    assert {tuple(h) for h, i in rows if i > 0} == after.keys()


def test_symmetry_is_raised_within_a_cube_alone(clouds: CloudSet) -> None:
    found = perturb(clouds, "symmetry_raised", None, 0)
    assert torch.equal(found.hkl_P3, clouds.hkl_P3)
    triclinic = np.flatnonzero(clouds.crystal_systems == "triclinic")
    kept = clouds.subset(triclinic).intensity_P
    torch.testing.assert_close(found.subset(triclinic).intensity_P, kept)  # nothing to raise


def test_quantized_levels() -> None:
    data = prototypes(SPHERE)
    found = perturb(data, "intensity_quantized", 3, 0)
    for n in range(len(data)):
        part = slice(int(data.offsets[n]), int(data.offsets[n + 1]))
        moved = (data.hkl_P3[part] != 0).any(dim=1) & (data.intensity_P[part] > 0)
        values = found.intensity_P[part][moved]
        assert len(values.unique()) <= 3
        assert float(values.sum()) == pytest.approx(
            float(data.intensity_P[part][moved].sum()), rel=1e-3
        )
    one = perturb(data, "intensity_quantized", 1, 0).intensity_P
    uniform = perturb(data, "intensity_uniform", None, 0).intensity_P
    torch.testing.assert_close(one, uniform, rtol=1e-3, atol=0)


def test_exchange_gives_every_crystal_the_intensities_of_one_other() -> None:
    data = random_set(0, [20] * 6)
    found = perturb(data, "intensity_exchanged", None, 0)
    sums = data.intensity_P.reshape(6, 20).sum(1)
    donor = [int((sums - s).abs().argmin()) for s in found.intensity_P.reshape(6, 20).sum(1)]
    assert sorted(donor) == list(range(6))
    assert all(donor[n] != n for n in range(6))
    alone = random_set(0, [20])
    assert torch.equal(
        perturb(alone, "intensity_exchanged", None, 0).intensity_P, alone.intensity_P
    )


def test_a_zone_is_a_plane_and_its_axis_is_of_the_crystal() -> None:
    data = prototypes(SPHERE)
    found = perturb(data, "zone_axis", 0, 0)
    for part in found.q_P3.double().split(found.offsets.diff().tolist()):
        assert len(part) >= 3
        assert torch.linalg.svdvals(part)[2] < 1e-5 * torch.linalg.svdvals(part)[0]


@pytest.mark.parametrize("angle", [30.0, 60.0, 120.0])
def test_a_wedge_takes_its_part_of_the_sphere(angle: float) -> None:
    data = random_set(0, [60] * 300, origin=False)
    normal = torch.randn(len(data.q_P3), 3, generator=torch.Generator().manual_seed(0))
    data = replace(data, q_P3=torch.nn.functional.normalize(normal, dim=1))
    left = len(perturb(data, "missing_wedge", angle, 0).q_P3) / len(data.q_P3)
    assert left == pytest.approx(1 - angle / 180, abs=5 * 0.5 / math.sqrt(len(data.q_P3)))


def test_half_a_space_is_on_one_side() -> None:
    data = random_set(0, [200] * 3, origin=False)
    found = perturb(data, "half_space", None, 0)
    for part in found.q_P3.double().split(200):
        # A plane separates the points from the origin: some direction sees all of them in front.
        mean = part.mean(0)
        for _ in range(2000):
            behind = part[(part @ mean) <= 0]
            if not len(behind):
                break
            mean = mean + behind[0] / behind[0].norm()
        assert ((part @ mean) > 0).all()


def test_the_miller_cut_follows_the_original() -> None:
    data = random_set(0, [120] * 3)
    basis = perturb(data, "miller_cut", 0, 0)
    assert torch.equal(basis.q_P3, perturb(data, "basis_only", None, 0).q_P3)
    four = perturb(data, "miller_cut", -1, 0)
    assert four.hkl_P3.reshape(3, 4, 3)[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert four.multiplicity_P.tolist() == [1, 2, 2, 2] * 3
    assert four.intensity_P.reshape(3, 4)[:, 0].tolist() == data.intensity_P[::120].tolist()
    for limit in (1, 2):
        assert int(perturb(data, "miller_cut", limit, 0).hkl_P3.abs().max()) == limit


def test_strongest_pairs_are_the_strongest() -> None:
    data = random_set(0, [60] * 5)
    found = perturb(data, "strongest", 7, 0)
    assert found.offsets.tolist() == [8 * n for n in range(6)]
    for n in range(5):
        part = data.intensity_P[60 * n + 1 : 60 * n + 60].sort(descending=True).values[:7]
        assert found.intensity_P[8 * n + 1 : 8 * n + 8].sort(descending=True).values.tolist() == (
            part.tolist()
        )


def test_lowered_symmetry_leaves_the_powder_pattern_and_equivalents_differ() -> None:
    data = prototypes(SPHERE)
    found = perturb(data, "symmetry_lowered", 1.0, 0)
    before, after = (sum_of(one.intensity_P.double(), shells_P(data)) for one in (data, found))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    assert len(equivalents_P(found).unique()) > 1.5 * len(equivalents_P(data).unique())


# --- before the cloud ---------------------------------------------------------------------------


def test_points_scatter_without_fall_off() -> None:
    crystal, config = pyrite(), SPHERE.model_copy(update={"scatterers": "points"})
    found = entry_of(crystal, 0, config).cloud
    standard = entry_of(crystal, 0, SPHERE)
    q0 = form_factors(("Fe", "S"), np.zeros(1), "xray")[:, 0]
    phases = np.exp(2j * np.pi * (found.hkl @ crystal.positions.T))
    direct = np.abs(phases @ np.repeat(q0, [4, 8])) ** 2 / 5.42**6
    np.testing.assert_allclose(found.intensity, direct, rtol=1e-4)
    assert found.intensity[found.multiplicity == 1] == pytest.approx(
        standard.cloud.intensity[standard.cloud.multiplicity == 1], rel=1e-6
    )


def test_alike_knows_no_element_and_permuted_no_place() -> None:
    crystal = pyrite()
    other = replace(crystal, species=("Au",) * 4 + ("O",) * 8)
    config = SPHERE.model_copy(update={"scatterers": "alike"})
    one, two = (entry_of(each, 0, config).cloud for each in (crystal, other))
    np.testing.assert_array_equal(one.intensity, two.intensity)
    swapped = disguised(crystal, "permuted")
    assert swapped.species == ("S",) * 4 + ("Fe",) * 8
    assert disguised(swapped, "permuted").species == crystal.species
    three = replace(crystal, species=("Fe", "Ni", "Co", "Fe") + ("S",) * 8)
    cycle = {disguised(replace(three, id=str(n)), "permuted").species for n in range(40)}
    assert len(cycle) == 6  # (4 − 1)! cycles of four elements
    assert all(a != b for species in cycle for a, b in zip(species, three.species, strict=True))
    pure = replace(crystal, species=("Fe",) * 12)
    assert disguised(pure, "permuted") == pure


def test_formula_group_and_symmetry_stay_those_of_the_crystal() -> None:
    standard = entry_of(pyrite(), 0, SPHERE)
    for kind in ("points", "alike", "permuted"):
        found = entry_of(pyrite(), 0, SPHERE.model_copy(update={"scatterers": kind}))
        assert (found.formula, found.group) == (standard.formula, standard.group)
        assert found.symmetry == standard.symmetry


def test_a_filled_lattice_has_no_absences() -> None:
    found = perturb(
        prototypes(featurization_of("lattice_filled", None, SPHERE)), "lattice_filled", None, 0
    )
    assert (found.intensity_P == 1).all()
    assert len(found.q_P3) > len(prototypes(SPHERE).q_P3)


def test_datasets_of_before_are_still_the_same_question(tmp_path: Path) -> None:
    out, config = tmp_path / "data", FeaturizationConfig(selection="miller:1")
    featurize("prototypes:7", out, config, OneProcess())
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["scatterers"]
    path.write_text(json.dumps(manifest))
    before = path.read_text()
    featurize("prototypes:7", out, config, OneProcess())  # nothing to do
    assert path.read_text() == before
    other = config.model_copy(update={"scatterers": "alike"})
    with pytest.raises(UserError, match="scatterers"):
        featurize("prototypes:7", out, other, OneProcess())
    featurize("prototypes:3:5", out, config, OneProcess(), append=True)
    assert read_manifest(out)["config"]["scatterers"] == "atoms"


# --- pose ---------------------------------------------------------------------------------------


def test_poses_of_a_training() -> None:
    def drawn(pose: str) -> torch.Tensor:
        return posed_rotations(pose, 4000, torch.Generator().manual_seed(0)).double()

    one = torch.eye(3, dtype=torch.float64)
    assert torch.equal(drawn("fixed"), one.expand(4000, 3, 3))
    turns = drawn("axis")
    assert torch.allclose(turns @ turns.mT, one, atol=1e-6)
    assert torch.allclose(turns @ one[2], one[2])
    angle = torch.atan2(turns[:, 1, 0], turns[:, 0, 0]) / (2 * math.pi) % 1
    assert scipy.stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3
    assert drawn("random")[:, 2, 2].std() == pytest.approx(1 / math.sqrt(3), abs=0.03)


def test_a_pose_decides_a_training_unless_it_is_the_old_one() -> None:
    assert "pose" not in tiny().deciding()
    assert {tiny(pose=p).deciding()["pose"] for p in ("axis", "fixed")} == {"axis", "fixed"}
    assert TrainingConfig(pose="fixed").pose == ARMS["pose_fixed"].pose
