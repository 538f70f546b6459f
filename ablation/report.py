"""The report: one HTML page that opens offline, its figures as SVG and PNG, its numbers as tables.

The page depends on the folder's files (and the dataset's clouds) only: the same inputs give the
same bytes. Text from those files is data: escaped in HTML by the template engine, drawn letter by
letter in figures, and escaped by `ablation.figures_clouds` and in the JSON of the figure here.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from ablation import report_figures, report_text
from ablation.contrast import INTENSITY_ARMS, SYMMETRY_ARMS
from ablation.figures import Drawing
from ablation.figures_clouds import clouds_figure
from ablation.figures_effects import SHOWN_FOREST
from ablation.report_clouds import POINTS, Clouds, read_clouds
from ablation.report_data import FILES, read_report
from ablation.report_study import Report, Study
from ablation.report_tables import page_tables
from ablation.significance import MARGIN
from ablation.tables import AT_TOP, write_table
from ablation.trials import REFERENCE
from cluster.files import replacing, write_text

_FEW = 5
"""Crystals of a space group below which the page leaves it to the table."""


def write_report(folder: str | Path, *, dataset: str | Path | None = None) -> Path:
    """Write `folder/report.html`, `folder/tables/` and `folder/figures/`.

    Args:
        folder: of an ablation, finished or not, or of a training run; see `ablation.report_data`.
        dataset: dataset folder for the 3D view and the crystals' symmetry; by default the one that
            the folder names. If it is missing, the page says so and shows the rest.

    Returns:
        Path of the page.

    Raises:
        UserError: the folder is of neither kind, or a file of it is missing or broken.
    """
    folder = Path(folder)
    report = read_report(folder, None if dataset is None else Path(dataset))
    clouds = read_clouds(report.studies[0], report.place)
    for name, table in page_tables(report).items():
        write_table(folder, name, table)
    drawings = report_figures.drawings(report)
    for name, drawing in drawings.items():
        for ending, content in (("svg", drawing.svg), ("png", drawing.png)):
            with replacing(folder / "figures" / f"{name}.{ending}") as temporary:
                temporary.write_bytes(content)
    page = folder / "report.html"
    write_text(page, _page(report, clouds, drawings, _links(folder, report)))
    return page


def _links(folder: Path, report: Report) -> list[str]:
    names = [*FILES[report.kind], *(f"{name}.parquet" for name in AT_TOP)]
    names += sorted(path.name for path in folder.glob("predictions-*.parquet"))
    tables = sorted(path.relative_to(folder).as_posix() for path in (folder / "tables").iterdir())
    return [name for name in dict.fromkeys(names) if (folder / name).is_file()] + tables


def _page(
    report: Report, clouds: Clouds, drawings: Mapping[str, Drawing], links: Sequence[str]
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": report_text.number,
        "p": report_text.p_value,
        "metric": report_text.metric_title,
        "grouped": report_text.grouped,
    }
    first = report.studies[0]
    shown = {"clouds": json.loads(clouds_figure(clouds.shown).to_json(engine="json"))}
    return environment.get_template("report.html").render(
        report=report,
        sections=[_section(report, study) for study in report.studies],
        reference=REFERENCE,
        heading=_heading(report),
        notes=report_text.notes(report),
        symmetry_arms=SYMMETRY_ARMS,
        intensity_arms=INTENSITY_ARMS,
        margin=MARGIN,
        shown_forest=SHOWN_FOREST,
        arms=_arms(report),
        run_facts=_run_facts(report),
        data_facts=report_text.flattened(_data_facts(report)),
        provenance=report_text.flattened(report.provenance),
        clouds=clouds,
        cloud_study=first,
        cloud_limit=POINTS,
        drawings={
            name: {
                "caption": drawing.caption,
                "uri": "data:image/svg+xml;base64," + base64.b64encode(drawing.svg).decode(),
            }
            for name, drawing in drawings.items()
        },
        links=links,
        # The engine must not escape scripts; `_json` did what a script element needs.
        figures_json=_json(shown if clouds.shown else {}),
        plotly_js=get_plotlyjs() if clouds.shown else "",
    )


def _json(document: Any) -> str:
    """JSON that cannot end or open anything in HTML: no `<`, `>`, `&` stays in it."""
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _heading(report: Report) -> str:
    if len(report.studies) == 1:
        question = report.studies[0].question
        return question[:1].upper() + question[1:]
    return f"What a network sees in diffraction clouds: {len(report.studies)} questions"


def _section(report: Report, study: Study) -> dict[str, Any]:
    """What the page says of one task."""
    effects = study.primary_effects()
    names = dict.fromkeys(name for found in study.metrics.values() for name in found)
    shown = [c for c in study.metrics if report.kind == "run" or c.arm == REFERENCE]
    return {
        "study": study,
        "key": report_figures.key(report, study),
        "question": study.question[:1].upper() + study.question[1:],
        "primary": report_text.metric_title(study.primary),
        "answer": report_text.answer(study),
        "claim": report_text.claim(study) if report.kind == "ablation" else "",
        "planning": report_text.planning(study),
        "counted": report_text.counted(study),
        "effects": effects,
        "metric_names": list(names),
        "metrics": [(c, study.metrics[c]) for c in shown],
        "confusion": _confusion(study),
        "class_counts": _class_counts(study),
        "losses": [
            row
            for row in study.losses
            if row["crystals"] >= _FEW and row["symmetry_lost"] is not None
        ],
    }


def _arms(report: Report) -> list[dict[str, Any]]:
    """One entry an arm: what it does, and its settings."""
    found = []
    for name, what in report.arms.items():
        strength = what.get("strength")
        unit = f" in {what['unit']}" if what.get("unit") else ""
        done = sum(row["arm"] == name and row["status"] == "done" for row in report.results)
        settings = f"strength: {strength}{unit}" if strength else ""
        found.append(
            {
                "name": name,
                "description": what.get("description", ""),
                "family": what.get("family", ""),
                "settings": settings,
                "done": done,
            }
        )
    return found


def _confusion(study: Study) -> list[dict[str, Any]]:
    """Rows of the confusion matrix: class, total, and count, share and colours of each cell."""
    rows = []
    for name, counts in zip(study.classes, study.confusion.tolist(), strict=True):
        total = sum(counts)
        cells = []
        for count in counts:
            share = count / total if total else 0.0
            # White to Okabe–Ito blue (#0072B2); text turns white where the blue is dark.
            mixed = [round(255 + share * (end - 255)) for end in (0x00, 0x72, 0xB2)]
            ink = "#ffffff" if share > 0.55 else "#1c2026"
            style = f"background:rgb({mixed[0]},{mixed[1]},{mixed[2]});color:{ink}"
            cells.append({"count": count, "share": f"{100 * share:.0f} %", "style": style})
        rows.append({"name": name, "total": total, "cells": cells})
    return rows


def _class_counts(study: Study) -> list[tuple[str, list[int], int]]:
    """(split, crystals a class in the order of the classes, all)."""
    rows = []
    for split, counts in study.class_counts.items():
        of_class = [counts.get(name, 0) for name in study.classes]
        rows.append((split, of_class, sum(of_class)))
    return rows


def _data_facts(report: Report) -> dict[str, Any]:
    rest = {**report.place.summary, **report.dataset_summary}
    sources = rest.pop("sources", None)
    facts: dict[str, Any] = {"dataset": (report.place.root or Path(report.dataset)).name}
    for number, source in enumerate(sources if isinstance(sources, list) else [], start=1):
        # How its records were counted and which of them are crystals is no reader's concern.
        texts = {k: v for k, v in source.items() if isinstance(v, str) and k != "path"}
        title = "source" if len(sources) == 1 else f"source {number}"
        facts[title] = texts | {"records": source.get("records")}
    return facts | rest


def _run_facts(report: Report) -> list[tuple[str, str]]:
    facts: dict[str, Any] = {}
    if len(report.studies) == 1:
        study = report.studies[0]
        facts["task"] = study.title
        if study.threshold is not None:
            facts["threshold"] = f"{study.threshold:g} {study.unit}".strip()
    facts |= {name: value for name, value in report.settings.items() if name != "training"}
    training = report.settings.get("training")
    if isinstance(training, Mapping):
        facts |= {name: value for name, value in training.items() if name not in facts}
    if report.results:
        status = Counter(str(row["status"]) for row in report.results)
        facts["trials"] = ", ".join(f"{count} {name}" for name, count in sorted(status.items()))
        if report.planned is not None:
            facts["trials"] += f", of {report.planned} planned"
        seconds = [row["seconds"] for row in report.results if row.get("seconds") is not None]
        if seconds:
            facts["time of all trials"] = f"{sum(seconds) / 60:.0f} min"
    facts["primary metric"] = report_text.metric_title(report.studies[0].primary)
    return report_text.flattened(facts)
