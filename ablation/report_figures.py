"""Which figures a report has, by name; the names are those of the files."""

from functools import partial

from ablation import figures_curves, figures_effects
from ablation.figures import Drawing, draw
from ablation.report_study import Report, Study
from ablation.report_text import metric_title


def drawings(report: Report) -> dict[str, Drawing]:
    """All flat figures of a report, in the order of the page."""
    found: dict[str, Drawing] = {}
    title = metric_title(report.studies[0].primary)
    if any(study.primary_effects(model) for study in report.studies for model in report.models):
        found["heat-map"] = draw(
            partial(figures_effects.heat_map, report.studies),
            f"Change of {title} by arm and task.",
        )
    contrasts = [study.contrast for study in report.studies if study.contrast is not None]
    if contrasts:
        found["contrast"] = draw(
            partial(figures_effects.contrast_figure, contrasts, title),
            f"Symmetry against intensities: change of {title}, and the declared difference.",
        )
    if report.history:
        found["history"] = draw(
            partial(figures_curves.history_figure, report.history),
            "Loss and validation AUROC against the epoch.",
        )
    for study in report.studies:
        name = key(report, study)
        found |= {f"{kind}{name}": made for kind, made in _of_study(report, study, title).items()}
    return found


def key(report: Report, study: Study) -> str:
    """What a study's figures and sections end with; empty when it is the only one."""
    return "" if len(report.studies) == 1 else f"-{study.task}"


def _of_study(report: Report, study: Study, title: str) -> dict[str, Drawing]:
    found: dict[str, Drawing] = {}
    effects = study.primary_effects()
    if effects:
        found["effects"] = draw(
            partial(figures_effects.forest, effects, title),
            f"Change of {title} when the input is perturbed, against the untouched input.",
        )
    if figures_effects.doses(study):
        found["doses"] = draw(
            partial(figures_effects.dose_figure, study, report.arms, title),
            f"Change of {title} against the strength of a perturbation.",
        )
    parts = [row for row in study.losses if row["by"] in ("all", "crystal_system")]
    if any(row["symmetry_lost"] is not None for row in parts):
        found["losses"] = draw(
            partial(figures_effects.losses_figure, parts),
            "Crystals that the model loses, by crystal system (number of test crystals).",
        )
    if figures_curves.roc_conditions(study):
        found["roc"] = draw(
            partial(figures_curves.roc_figure, study, report.kind == "run"),
            "Receiver operating characteristic on the test crystals.",
        )
    if study.reference is not None:
        found["reliability"] = draw(
            partial(figures_curves.reliability_figure, study),
            "Reliability: how often a stated probability comes true.",
        )
    return found
