"""Words and numbers of the report: what may be said of a result, and how it is written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ablation.figures import resolved
from ablation.report_study import REFERENCE, Study
from training.metrics import METRICS, Interval

_NAMED = 4
"""Arms with a resolved effect that the answer names; the page's table has all."""


def answer(study: Study) -> list[str]:
    """The question's answer in plain sentences, each no stronger than its interval.

    An interval that includes chance, or zero for a difference, gives "was not resolved" and
    never "is absent".
    """
    sentences = [_performance(study)]
    changes = [
        (arm, effects[study.primary].difference)
        for arm, effects in study.effects.items()
        if study.primary in effects
    ]
    changes.sort(key=lambda change: (-abs(change[1].value), change[0]))
    seen = [(arm, change) for arm, change in changes if resolved(change)]
    unseen = [(arm, c) for arm, c in changes if not resolved(c) and not math.isnan(c.value)]
    undefined = [arm for arm, change in changes if math.isnan(change.value)]
    title = metric_title(study.primary)
    for verb, sign in (("falls", -1), ("rises", 1)):
        named = [
            f"by {interval(_times(change, sign))} with “{arm}”"
            for arm, change in seen[:_NAMED]
            if change.value * sign > 0
        ]
        if named:
            sentences.append(f"{title} {verb} {_listed(named)}.")
    if len(seen) > _NAMED:
        more = len(seen) - _NAMED
        arms = "1 more arm has" if more == 1 else f"{more} more arms have"
        sentences.append(f"{arms} a smaller resolved effect.")
    if unseen:
        listed = _listed([f"“{arm}” ({interval(c, signed=True)})" for arm, c in unseen])
        sentences.append(f"For {listed} no effect was resolved: the interval includes 0.")
    if undefined:
        listed = _listed([f"“{arm}”" for arm in undefined])
        sentences.append(f"For {listed} the effect is not defined.")
    return sentences


def notes(study: Study) -> list[str]:
    """What a reader must keep in mind about the intervals."""
    found = [
        "Brackets hold 95 % intervals: test crystals are resampled, those of one group together, "
        "and training noise is Student's t over the seeds."
    ]
    seeds = {trial.seed for trial in study.of_arm(REFERENCE)}
    if len(seeds) == 1:
        found.append(
            "One training seed only: the intervals cover the choice of test crystals, not the "
            "randomness of training."
        )
    elif len(seeds) < 5:
        found.append(
            f"With only {len(seeds)} training seeds the intervals are wide: an effect that is not "
            "resolved may still exist."
        )
    if len(study.effects) > 1:
        found.append(
            f"The intervals of the {len(study.effects)} ablations are not corrected for the "
            "number of comparisons."
        )
    return found


def metric_title(name: str) -> str:
    """Title of a metric; an unknown one keeps its name."""
    return METRICS[name].title if name in METRICS else name.replace("_", " ")


def number(value: float, *, signed: bool = False, digits: int = 3) -> str:
    """A number with a true minus sign; "–" where it is not defined."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(found: Interval, *, signed: bool = False) -> str:
    """`value [low, high]`."""
    value, low, high = (number(x, signed=signed) for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (path, text) rows, in their order; empty values are left out."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flattened(value, f"{title} · ")
        elif isinstance(value, list | tuple):
            rows.append((title, ", ".join(map(_plain, value))))
        else:
            rows.append((title, _plain(value)))
    return [(title, text) for title, text in rows if text]


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return grouped(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def grouped(count: int) -> str:
    """A whole number with thin spaces between thousands, from 10 000 on."""
    return f"{count:,}".replace(",", "\u202f") if abs(count) >= 10_000 else str(count)


def _performance(study: Study) -> str:
    found = study.metrics[REFERENCE][study.primary]
    title = metric_title(study.primary)
    if len(study.classes) > 2 and study.primary in ("auroc", "average_precision"):
        title = f"macro one-vs-rest {title}"
    trials = study.of_arm(REFERENCE)
    held = f"{grouped(len(trials[0].ids))} held-out crystals"
    held += f" (mean of {len(trials)} seeds)" if len(trials) > 1 else ""
    if not math.isfinite(found.value):
        return f"The {title} is not defined on these {held}."
    chance = {"auroc": 0.5, "balanced_accuracy": 1 / len(study.classes), "mcc": 0.0}.get(
        study.primary
    )
    task = f"tell {_listed([f'“{name}”' for name in study.classes])} crystals apart"
    if study.primary == "auroc" and len(study.classes) == 2:
        task = f"rank “{study.classes[1]}” above “{study.classes[0]}” crystals"
    result = f"{title} {interval(found)} on {held}"
    verb, rest = task.split(" ", 1)
    if chance is None or found.low > chance:
        return f"From its diffraction cloud alone, the network {verb}s {rest} with {result}."
    at = f"chance is {number(chance, digits=2)}"
    if found.high < chance:
        task = f"the network {verb}s {rest} worse than chance"
    else:
        task = f"no ability to {task} was resolved"
    return f"From diffraction clouds, {task}: {result}; {at}."


def _times(change: Interval, sign: int) -> Interval:
    if sign > 0:
        return change
    return Interval(-change.value, -change.high, -change.low)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
