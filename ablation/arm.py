"""What an arm is: a function from clouds to clouds, and what is said of it."""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal

from ablation.draws import Draws
from featurization.config import FeaturizationConfig
from training.config import PoseName
from training.dataset import CloudSet

Apply = Callable[[CloudSet, float, Draws], CloudSet]
Change = Callable[[float, FeaturizationConfig], FeaturizationConfig]
Family = Literal["reference", "intensities", "positions", "extent", "radiation", "pose"]
# What an arm can leave as it was, of whole clouds: every |q|; every intensity; which reflections
# are absent; I(0); I(−q) = I(q); the equality of equivalent points; the sum of I over each |q|.
Law = Literal["lengths", "intensities", "absences", "density", "friedel", "laue", "powder"]


@dataclass(frozen=True, slots=True)
class Strength:
    """What the strength of an arm means."""

    name: str
    unit: str  # "1/Å"; "" of a pure number
    identity: float  # where nothing changes
    default: float
    ladder: tuple[float, ...]  # doses of a dose–response curve, without the identity
    low: float = 0.0  # what is allowed
    high: float = math.inf
    whole: bool = False  # only whole numbers are


@dataclass(frozen=True, slots=True)
class Arm:
    """One perturbation."""

    name: str
    family: Family
    apply: Apply  # pure; its strength is nan where there is none
    strength: Strength | None = None
    # The configuration that the clouds of this arm are featurized with, given strength and that
    # of the reference; None: they are those of the reference.
    featurization: Change | None = None
    pose: PoseName | None = None  # what it sets `TrainingConfig.pose` to
    keeps: frozenset[Law] = frozenset()  # laws that hold at every dose

    def __call__(self, data: CloudSet, strength: float, draws: Draws) -> CloudSet:
        return self.apply(data, strength, draws)


def arm(
    family: Family,
    *,
    keeps: Set[Law],
    strength: Strength | None = None,
    featurization: Change | None = None,
    pose: PoseName | None = None,
) -> Callable[[Apply], Arm]:
    """Makes an arm of a function, whose name and docstring become the arm's."""

    def made(apply: Apply) -> Arm:
        name = getattr(apply, "__name__", "")
        return Arm(name, family, apply, strength, featurization, pose, frozenset(keeps))

    return made
