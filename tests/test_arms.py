"""Every arm against its claims: identity, laws kept and broken, pose, order, device; and that a
wrong claim would be found."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from laws import JUDGES, absences, is_symmetric, rotations_of, whole
from small import random_set
from tiny import ROOT

from ablation import perturbations
from ablation.arm import Arm, Strength
from ablation.draws import Draws
from ablation.perturbations import ARMS, describe, featurization_of, perturb, strength_of, table
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from featurization.crystal import Crystal
from featurization.sources import open_source
from featurization.validation import crystal_from_arrays
from featurization.worker import entry_of, featurize_one
from training.dataset import CloudSet, cloud_set
from training.rotations import random_rotations

SPHERE = FeaturizationConfig(selection="sphere:0.7")
KEPT = SPHERE.model_copy(update={"absences": "keep"})
WITH_STRENGTH = sorted(name for name, arm in ARMS.items() if arm.strength)
TENSORS = ("offsets", "hkl_P3", "q_P3", "intensity_P", "multiplicity_P", "lattice_N33")
# Of 140 prototypes, small ones of every system and of Laue classes below that of the lattice.
CHOSEN = (18, 25, 27, 28, 29, 31, 37, 76, 85, 88, 100, 101, 110, 137)


def pyrite() -> Crystal:
    """Laue class m-3 on a cubic lattice: 210 is present, 120 absent."""
    u = 0.385
    iron = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    half = [[u, u, u], [0.5 - u, -u, 0.5 + u], [-u, 0.5 + u, 0.5 - u], [0.5 + u, 0.5 - u, -u]]
    positions = np.array([*iron, *half, *(-np.array(half))]) % 1.0
    species, site = ["Fe"] * 4 + ["S"] * 8, np.arange(12)
    return crystal_from_arrays(
        "pyrite", 5.42 * np.eye(3), positions, species, np.ones(12), site, {}
    )


@cache
def prototypes(config: FeaturizationConfig) -> CloudSet:
    """15 crystals of all systems, some 50 stored points each."""
    source = open_source("prototypes:140")
    records = [record for record in source.records() if record.index in CHOSEN]
    entries = [featurize_one(source, record, config) for record in records]
    return cloud_set([*entries, entry_of(pyrite(), 140, config)], config)


def of_arm(name: str, dose: float | None, config: FeaturizationConfig) -> CloudSet:
    return perturb(prototypes(featurization_of(name, dose, config)), name, dose, 0)


@cache
def symmetry() -> list[np.ndarray]:
    return rotations_of(prototypes(SPHERE), most=6)


def doses(arm: Arm) -> tuple[float | None, ...]:
    return (None,) if arm.strength is None else tuple(map(float, arm.strength.ladder))


def same(one: CloudSet, other: CloudSet) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def small_sets() -> list[CloudSet]:
    """Empty and single-point crystals, a set of none, with the origin and without."""
    return [
        random_set(0, [12, 0, 1, 30]),
        random_set(1, [0, 7, 1], origin=False),
        random_set(2, [0]),
        random_set(3, [5, 5]).subset(np.zeros(0, dtype=int)),
    ]


# --- what must hold of any arm ------------------------------------------------------------------


def check_identity(name: str) -> None:
    dose = ARMS[name].strength
    assert dose is not None
    for data in [*small_sets(), prototypes(SPHERE)]:
        rows = torch.arange(len(data))
        asked, found = data.batch(rows), perturb(data, name, dose.identity, 3).batch(rows)
        assert torch.equal(found.q_P3, asked.q_P3)
        assert torch.equal(found.intensity_P, asked.intensity_P)
        assert torch.equal(found.lengths_B, asked.lengths_B)


def check_nearly_identity(name: str) -> None:
    dose = ARMS[name].strength
    assert dose is not None
    data = random_set(5, [40] * 4, origin=False)  # the origin is what q_above takes first
    rows = torch.arange(4)
    near = 1e15 if math.isinf(dose.identity) else dose.identity + 1e-9
    found, asked = perturb(data, name, near, 3).batch(rows), data.batch(rows)
    torch.testing.assert_close(found.q_P3, asked.q_P3, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.intensity_P, asked.intensity_P, rtol=1e-3, atol=0)


def check_laws(name: str) -> None:
    arm, before = ARMS[name], prototypes(SPHERE)
    broken = set()
    for dose in doses(arm):
        after = of_arm(name, dose, SPHERE)
        pairs = list(zip(whole(before), whole(after), strict=True))
        for law, judge in JUDGES.items():
            if not all(judge(a, b) for a, b in pairs):
                broken.add(law)
        if absences(prototypes(KEPT)) != absences(of_arm(name, dose, KEPT)):
            broken.add("absences")
        if not all(is_symmetric(b, r) for (_, b), r in zip(pairs, symmetry(), strict=True)):
            broken.add("laue")
    assert not broken & arm.keeps, f"{name} breaks {broken & arm.keeps}"
    if arm.featurization is None:  # what else is featurized anew can agree by accident
        assert broken | arm.keeps == {*JUDGES, "absences", "laue"}, f"{name} breaks only {broken}"


def check_turns_along(name: str) -> None:
    """Perturbed and turned is turned and perturbed."""
    for data in (random_set(4, [30] * 6), prototypes(SPHERE)):
        turns = random_rotations(len(data), torch.Generator().manual_seed(1)).double()

        def turned(one: CloudSet, turns: torch.Tensor = turns) -> CloudSet:
            q = torch.einsum("pij,pj->pi", turns[one.crystal_P], one.q_P3.double())
            lattice = torch.einsum("nij,nkj->nki", turns, one.lattice_N33.double())
            return replace(one, q_P3=q.float(), lattice_N33=lattice.float())

        first, then = perturb(turned(data), name, None, 0), turned(perturb(data, name, None, 0))
        assert torch.equal(first.hkl_P3, then.hkl_P3)
        torch.testing.assert_close(first.q_P3, then.q_P3, rtol=0, atol=2e-5)
        torch.testing.assert_close(first.intensity_P, then.intensity_P, rtol=2e-3, atol=1e-6)


def check_order(name: str) -> None:
    """A crystal's cloud does not depend on where in the set it stands."""
    for data in (random_set(6, [9, 25, 0, 14, 1, 31]), prototypes(SPHERE)):
        order = np.random.default_rng(0).permutation(len(data))
        whole_set = perturb(data, name, None, 7)
        assert same(perturb(data.subset(order), name, None, 7), whole_set.subset(order))
        if name != "intensity_exchanged":
            few = order[: len(data) // 2]
            assert same(perturb(data.subset(few), name, None, 7), whole_set.subset(few))


def check_purity(name: str) -> None:
    for data in small_sets():
        kept = {n: getattr(data, n).clone() for n in TENSORS}
        state = torch.random.get_rng_state()
        first, again = perturb(data, name, None, 0), perturb(data, name, None, 0)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(getattr(data, n), kept[n]) for n in TENSORS)
        assert same(first, again)
        for field in fields(data):
            if field.name not in TENSORS:
                assert getattr(first, field.name) is getattr(data, field.name)
            else:
                assert getattr(first, field.name).dtype == kept[field.name].dtype
        assert len(first.offsets) == len(data) + 1
        sizes = {len(getattr(first, n)) for n in TENSORS[1:-1]}
        assert sizes == {int(first.offsets[-1])}
        batch = first.batch(torch.arange(len(first)))
        assert len(batch.q_P3) == int(batch.lengths_B.sum())
        for tensor in (batch.q_P3, batch.intensity_P, first.lattice_N33):
            assert tensor.isfinite().all()
        assert (batch.intensity_P >= 0).all()


def check_device(name: str) -> None:
    """No tensor is made on the default device: with one that holds no numbers, all is the same."""
    data = random_set(8, [12, 0, 30])
    asked = perturb(data, name, None, 0)
    with torch.device("meta"):
        found = perturb(data, name, None, 0)
        batch = found.batch(torch.arange(3, device="cpu"))
    assert same(found, asked)
    assert torch.equal(batch.q_P3, asked.batch(torch.arange(3)).q_P3)


@pytest.mark.parametrize("name", WITH_STRENGTH)
def test_nothing_changes_at_the_identity(name: str) -> None:
    check_identity(name)
    check_nearly_identity(name)


@pytest.mark.parametrize("name", ARMS)
def test_laws_are_kept_or_broken_as_claimed(name: str) -> None:
    check_laws(name)


@pytest.mark.parametrize("name", ARMS)
def test_any_arm_is_pure_repeatable_finite_and_turns_along(name: str) -> None:
    check_purity(name)
    check_order(name)
    check_turns_along(name)
    check_device(name)


def test_random_arms_depend_on_the_seed_and_no_others() -> None:
    random = {
        "intensity_shuffled", "intensity_shuffled_in_shells", "intensity_exchanged",
        "intensity_random", "intensity_scaled", "intensity_noise", "intensity_counts",
        "intensity_wilson", "friedel_broken", "symmetry_lowered", "jitter", "directions_random",
        "lengths_random", "positions_shuffled", "strained", "sheared", "affine_random",
        "random_points", "dropout", "missing_wedge", "half_space", "zone_axis",
    }  # fmt: skip
    data = prototypes(SPHERE)
    depends = {n for n in ARMS if not same(perturb(data, n, None, 0), perturb(data, n, None, 1))}
    assert depends == random


def test_doses_of_an_arm_share_their_random_numbers() -> None:
    data = random_set(0, [20] * 3)
    once = perturb(data, "jitter", 0.01, 0).q_P3 - data.q_P3
    twice = perturb(data, "jitter", 0.02, 0).q_P3 - data.q_P3
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=1e-6)


# --- what is said of arms -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_explains_itself(name: str) -> None:
    arm, text = ARMS[name], describe(name)
    assert arm.name == name
    assert "\n" not in text
    assert "estroys" in text
    assert "Keeps:" in text or name == "none"
    if arm.strength is None:
        return
    dose = arm.strength
    assert "Limit:" in text
    assert dose.name in text
    assert dose.unit in text
    assert dose.identity not in dose.ladder
    for value in (*dose.ladder, dose.default, dose.identity):
        assert strength_of(name, value) == value


def test_the_table_of_arms_is_theirs() -> None:
    text = (ROOT / "docs" / "perturbations.md").read_text(encoding="utf-8")
    assert text.endswith("\n" + table())  # else write it anew: its head says how


def test_strengths_that_make_no_sense_are_refused() -> None:
    for name, value in (
        ("jitter", -0.1), ("jitter", math.nan), ("dropout", 1.5), ("miller_cut", 1.5),
        ("miller_cut", -2), ("intensity_quantized", 0), ("none", 1.0), ("strongest", -1),
        ("jiter", 0.1),
    ):  # fmt: skip
        with pytest.raises(UserError, match=name) as caught:
            perturb(random_set(0, [3]), name, value, 0)
        assert caught.value.remedy
    assert math.isnan(strength_of("none", None))
    assert strength_of("jitter", None) == 0.05


def test_only_arms_before_the_cloud_change_the_featurization() -> None:
    changed = {n: featurization_of(n, None, SPHERE) for n in ARMS}
    assert {n: c for n, c in changed.items() if c != SPHERE} == {
        "point_atoms": SPHERE.model_copy(update={"scatterers": "points"}),
        "scatterers_alike": SPHERE.model_copy(update={"scatterers": "alike"}),
        "species_permuted": SPHERE.model_copy(update={"scatterers": "permuted"}),
        "lattice_filled": SPHERE.model_copy(update={"absences": "keep"}),
        "radiation_neutron": SPHERE.model_copy(update={"radiation": "neutron"}),
        "radiation_electron": SPHERE.model_copy(update={"radiation": "electron"}),
    }
    two = SPHERE.model_copy(update={"also_radiation": ("neutron",)})
    assert featurization_of("radiation_neutron", None, two) == changed["radiation_neutron"]
    for config in changed.values():
        assert FeaturizationConfig(**config.model_dump()) == config
    assert {n: a.pose for n, a in ARMS.items() if a.pose} == {
        "pose_fixed": "fixed",
        "pose_axis": "axis",
    }


# --- tests of these tests -----------------------------------------------------------------------


def with_apply(apply: Callable[[CloudSet, float, Draws], CloudSet], *keeps: str) -> Arm:
    dose = Strength("x", "", identity=0.0, default=1.0, ladder=(1.0,))
    return Arm("broken", "intensities", apply, dose, keeps=frozenset(keeps))


def shifted(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    return replace(data, q_P3=data.q_P3 + 0.01)  # whatever the strength, in the laboratory


def sequential(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    generator = torch.Generator().manual_seed(0)
    return replace(data, intensity_P=torch.rand(len(data.q_P3), generator=generator))


def in_place(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    data.intensity_P.mul_(2.0)
    return data


def unseeded(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    return replace(data, intensity_P=torch.rand(len(data.q_P3)))


def not_finite(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    return replace(data, intensity_P=data.intensity_P.log())


def elsewhere(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    return replace(data, intensity_P=torch.ones(len(data.q_P3)))


def noisy(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    return ARMS["intensity_noise"].apply(data, 0.1, draws)


def nothing(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    return data


@pytest.mark.parametrize(
    ("arm", "check"),
    [
        (with_apply(shifted), check_identity),
        (with_apply(shifted), check_nearly_identity),
        (with_apply(shifted), check_turns_along),
        (with_apply(shifted, "friedel"), check_laws),
        (with_apply(sequential), check_order),
        (with_apply(in_place), check_purity),
        (with_apply(unseeded), check_purity),
        (with_apply(not_finite), check_purity),
        (with_apply(elsewhere), check_device),
        (with_apply(nothing, "laue"), check_laws),  # says that it breaks what it keeps
        *((with_apply(noisy, law), check_laws) for law in ("laue", "intensities", "powder")),
        (with_apply(ARMS["friedel_broken"].apply, "friedel"), check_laws),
        (with_apply(ARMS["intensity_shuffled"].apply, "absences"), check_laws),
        (with_apply(ARMS["jitter"].apply, "lengths"), check_laws),
        (with_apply(ARMS["intensity_scaled"].apply, "density"), check_laws),
    ],
)
def test_a_broken_arm_is_found(
    arm: Arm, check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(perturbations.ARMS, "broken", arm)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        check("broken")
