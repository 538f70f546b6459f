"""Words and numbers of the report: what may be said of a result, and how it is written."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ablation import contrast
from ablation.report_study import Effect, Report, Study
from ablation.significance import ALPHA, MARGIN
from training.metrics import METRICS, Interval

_NAMED = 4
"""Conditions with an effect that the answer names; the page's table has all."""


def answer(study: Study) -> list[str]:
    """The question's answer in plain sentences, each no stronger than its tests.

    "No effect" is said only where the equivalence test says it; what neither test settles is
    "undecided".
    """
    sentences = [_performance(study)]
    effects = study.primary_effects()
    title = metric_title(study.primary)
    seen = [e for e in effects if e.verdict in ("effect", "small effect")]
    seen.sort(key=lambda e: (-abs(e.difference.value), e.condition.name))
    for verb, sign in (("falls", -1), ("rises", 1)):
        named = [
            f"by {interval(_times(e.difference, sign))} with {_quoted(e)}"
            for e in seen[:_NAMED]
            if e.difference.value * sign > 0
        ]
        if named:
            sentences.append(f"{title} {verb} {_listed(named)}.")
    if len(seen) > _NAMED:
        more = len(seen) - _NAMED
        count = "1 more perturbation has" if more == 1 else f"{more} more perturbations have"
        sentences.append(f"{count} a smaller effect.")
    none = [e for e in effects if e.verdict == "no effect"]
    if none:
        sentences.append(f"{_some(none)}: no effect, within ±{MARGIN:g}.")
    undecided = [e for e in effects if e.verdict == "undecided"]
    if undecided:
        sentences.append(f"{_some(undecided)}: undecided, neither an effect nor its absence.")
    single = [e for e in effects if e.verdict == "one seed"]
    if single:
        sentences.append(f"{_some(single)}: one seed, which does not tell how trainings differ.")
    return sentences


def claim(study: Study) -> str:
    """The declared contrast in words, or why there is none."""
    if study.contrast is None:
        return (
            "not tested: it takes finished trials, of one seed at least, of "
            f"{_listed([*contrast.SYMMETRY_ARMS])} and of one of "
            f"{_listed([*contrast.INTENSITY_ARMS])}."
        )
    return contrast.sentence(study.contrast)


def notes(report: Report) -> list[str]:
    """What a reader must keep in mind about the numbers."""
    found = []
    if report.missing:
        found.append(
            f"This grid is not finished: {report.missing} of {report.planned} trials are missing. "
            "All numbers are of those that are there."
        )
    found.append(
        "Brackets hold 95 % intervals: test crystals are resampled, those of one group together, "
        "and training noise is Student's t over the seeds."
    )
    seeds = {
        len(study.trials.probabilities[study.reference])
        for study in report.studies
        if study.reference is not None
    }
    if seeds == {1}:
        found.append(
            "One training seed only: the intervals cover the choice of test crystals, not the "
            "randomness of training."
        )
    elif seeds and min(seeds) < 5:
        found.append(f"With only {min(seeds)} training seeds the intervals are wide.")
    if report.kind == "ablation":
        found.append(
            f"An effect has a permutation p below {ALPHA:g}, “no effect” an equivalence test with "
            f"margin {MARGIN:g}, both after Holm's correction over all perturbations of a task."
        )
    return found


def planning(study: Study) -> str:
    """How many seeds would see 0.01."""
    rows = [e.row for e in study.primary_effects() if e.row["visible"] is not None]
    if not rows:
        return ""
    needed = [row["seeds_needed"] for row in rows]
    enough = sorted(n for n in needed if n is not None)
    words = "To see a change of 0.01 with power 80 %, "
    if enough:
        middle = enough[len(enough) // 2]
        words += f"half of the perturbations need up to {middle} seeds, the most {enough[-1]}. "
        words += f"For {len(rows) - len(enough)} of {len(rows)} no number of seeds is enough: "
        words += "it takes more test crystals. "
    else:
        words += "no number of seeds is enough for any perturbation: it takes more test crystals. "
    visible = sorted(row["visible"] for row in rows)
    return words + (
        f"With the seeds at hand, changes from {number(visible[0])} to {number(visible[-1])} on "
        f"are visible (median {number(visible[len(visible) // 2])})."
    )


def counted(study: Study) -> str:
    """How many conditions have which verdict."""
    effects = study.primary_effects()
    counts = Counter(e.verdict for e in effects)
    words = {
        "effect": "with an effect",
        "small effect": f"with an effect within ±{MARGIN:g}",
        "no effect": "without effect",
        "undecided": "undecided",
        "one seed": "with one seed only",
    }
    found = [f"{counts[verdict]} {text}" for verdict, text in words.items() if counts[verdict]]
    return f"Of {len(effects)} perturbations: {', '.join(found)}." if found else ""


def metric_title(name: str) -> str:
    """Title of a metric; an unknown one keeps its name."""
    return METRICS[name].title if name in METRICS else name.replace("_", " ")


def number(value: float | None, *, signed: bool = False, digits: int = 3) -> str:
    """A number with a true minus sign; "–" where it is not defined."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def p_value(p: float | None) -> str:
    """A p value to two digits, and none below what the permutations resolve."""
    if p is None or not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


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
    if study.reference is None:
        return f"No trial of the untouched input has finished for model {study.model} yet."
    found = study.metrics[study.reference][study.primary]
    title = metric_title(study.primary)
    if len(study.classes) > 2 and study.primary in ("auroc", "average_precision"):
        title = f"macro one-vs-rest {title}"
    seeds = len(study.trials.probabilities[study.reference])
    held = f"{grouped(len(study.trials.ids))} held-out crystals"
    held += f" (mean of {seeds} seeds)" if seeds > 1 else ""
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
        return f"From its diffraction cloud alone, the model {verb}s {rest} with {result}."
    at = f"chance is {number(chance, digits=2)}"
    if found.high < chance:
        task = f"the model {verb}s {rest} worse than chance"
    else:
        task = f"no ability to {task} was resolved"
    return f"From diffraction clouds, {task}: {result}; {at}."


def _some(effects: Sequence[Effect]) -> str:
    if len(effects) > 2 * _NAMED:
        return f"For {len(effects)} perturbations"
    return "For " + _listed(
        [f"{_quoted(e)} ({interval(e.difference, signed=True)})" for e in effects]
    )


def _quoted(effect: Effect) -> str:
    return f"“{effect.condition.name}”"


def _times(change: Interval, sign: int) -> Interval:
    if sign > 0:
        return change
    return Interval(-change.value, -change.high, -change.low)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
