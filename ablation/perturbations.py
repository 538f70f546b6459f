"""The arms of an ablation: each takes a set of clouds and gives another, network untouched.

They act on the stored half of each cloud, one point of every pair ±q, so Friedel's law survives all
of them unless the docstring says otherwise. They turn with the crystal: perturbed and rotated is
rotated and perturbed. Random ones draw from `ablation.draws` and are applied once, before training:
every epoch sees the same perturbed pattern of a crystal. What acts on the crystal before its cloud
exists is a change of the featurization; what acts on the poses of a training, one of its settings.
"""

import math
from typing import get_args

import numpy as np

from ablation import before, extent, intensities, noise, positions, symmetry
from ablation.arm import Arm, Law, arm
from ablation.draws import Draws
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from training.dataset import CloudSet


@arm(
    "reference",
    keeps={"lengths", "intensities", "absences", "density", "friedel", "laue", "powder"},
)
def none(data: CloudSet, strength: float, draws: Draws) -> CloudSet:
    """The measured pattern: destroys nothing. The reference of every comparison."""
    return data


ARMS: dict[str, Arm] = {"none": none} | {
    value.name: value
    for module in (intensities, noise, symmetry, positions, extent, before)
    for value in vars(module).values()
    if isinstance(value, Arm)
}
"""All arms by name; `docs/perturbations.md` says what each does."""


def describe(name: str) -> str:
    """An arm's docstring as one paragraph."""
    return " ".join((ARMS[name].apply.__doc__ or "").split())


def strength_of(name: str, strength: float | None) -> float:
    """The strength that an arm is applied with: nan where it has none, None its default.

    Raises:
        UserError: no such arm, a strength for one without, or one that is not allowed.
    """
    if name not in ARMS:
        raise UserError(f"unknown arm {name}", remedy=f"arms are {', '.join(ARMS)}")
    known = ARMS[name].strength
    if known is None:
        if strength is not None and not math.isnan(strength):
            raise UserError(f"arm {name} has no strength; {strength:g} given", remedy="leave it")
        return math.nan
    asked = float(known.default if strength is None else strength)
    if asked == known.identity:
        return asked
    kind = "a whole number, " if known.whole else ""
    if not known.low <= asked <= known.high or (known.whole and not asked.is_integer()):
        raise UserError(
            f"arm {name}: {known.name} = {asked:g}; must be {kind}{known.low:g} to {known.high:g}",
            remedy=f"nothing changes at {known.identity:g}; usual are "
            f"{', '.join(f'{dose:g}' for dose in known.ladder)}",
        )
    return asked


def featurization_of(
    name: str, strength: float | None, config: FeaturizationConfig
) -> FeaturizationConfig:
    """What the clouds of an arm are featurized with, given that of the reference; often the same.

    Raises:
        UserError: as `strength_of`.
    """
    dose, change = strength_of(name, strength), ARMS[name].featurization
    return config if change is None else change(dose, config)


def perturb(data: CloudSet, name: str, strength: float | None, seed: int) -> CloudSet:
    """The arm applied to a whole set of clouds that were featurized for it.

    The same (name, strength, seed) gives a crystal the same cloud in whatever set it stands; only
    intensity_exchanged, in which crystals trade, knows the others.

    Raises:
        UserError: as `strength_of`.
    """
    return perturbed(data, name, strength, seed)[0]


def perturbed(
    data: CloudSet, name: str, strength: float | None, seed: int
) -> tuple[CloudSet, bool]:
    """The clouds that `perturb` gives, and whether any random number was drawn for them."""
    dose, draws = strength_of(name, strength), Draws(name, seed, data)
    found = ARMS[name].apply(data, dose, draws)
    assert np.array_equal(found.ids, data.ids), f"arm {name} has changed which crystals there are"
    return found, draws.drawn > 0


def table() -> str:
    """All arms in Markdown, as docs/perturbations.md has them."""
    lines = [
        "| arm | family | what | strength | unit | identity | doses | keeps at every dose |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in ARMS.items():
        what = " ".join((one.apply.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
        dose = one.strength
        doses = ", ".join(_number(value) for value in dose.ladder) if dose else ""
        cells = [dose.name, dose.unit, _number(dose.identity), doses] if dose else [""] * 4
        kept = ", ".join(law for law in get_args(Law) if law in one.keeps)
        lines.append(f"| `{name}` | {one.family} | {what} | {' | '.join(cells)} | {kept} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"
