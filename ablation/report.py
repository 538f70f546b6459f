"""The report: one HTML page that opens offline, and its numbers as CSV.

The page depends on the folder's files (and the dataset's clouds) only: the same inputs give the
same bytes. Text from those files is data: escaped in HTML by the template engine, in figures by
`ablation.figures`, and in the JSON of the figures here.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from ablation import figures, report_text
from ablation.curves import GRID, mean_roc, reliability
from ablation.figures_clouds import clouds_figure
from ablation.report_clouds import POINTS, Clouds, read_clouds
from ablation.report_data import FILES, read_study
from ablation.report_study import REFERENCE, Study
from cluster.files import write_text


def write_report(folder: Path, *, dataset: Path | None = None) -> Path:
    """Write `folder/report.html` and `folder/tables/*.csv`.

    Args:
        folder: of an ablation or of a training run, see `ablation.report_data`.
        dataset: dataset folder for the 3D view; by default the one that the folder names. If it
            is missing, the page says so and shows the rest.

    Returns:
        Path of the page.

    Raises:
        UserError: the folder is of neither kind, or a file of it is missing or broken.
    """
    study = read_study(folder)
    clouds = read_clouds(study, dataset, folder)
    tables = _tables(study)
    for name, (header, rows) in tables.items():
        write_text(folder / "tables" / f"{name}.csv", _csv(header, rows))
    page = folder / "report.html"
    write_text(page, _page(study, clouds, dataset, list(tables)))
    return page


def _page(study: Study, clouds: Clouds, dataset: Path | None, tables: Sequence[str]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": report_text.number,
        "interval": report_text.interval,
        "metric": report_text.metric_title,
        "grouped": report_text.grouped,
    }
    run = study.kind == "run"
    primary = report_text.metric_title(study.primary)
    drawn: dict[str, go.Figure] = {}
    if any(study.primary in effects for effects in study.effects.values()):
        drawn["effects"] = figures.forest_figure(study, primary)
    if run and study.history:
        drawn["history"] = figures.history_figure(study.history)
    drawn["roc"] = figures.roc_figure(study)
    drawn["reliability"] = figures.reliability_figure(study)
    if clouds.shown:
        drawn["clouds"] = clouds_figure(clouds.shown)
    source = dataset.name if dataset else Path(study.dataset).name
    links = [f"tables/{name}.csv" for name in tables] + list(FILES[study.kind])
    return environment.get_template("report.html").render(
        study=study,
        reference=REFERENCE,
        primary=primary,
        heading=study.question[:1].upper() + study.question[1:],
        answer=report_text.answer(study),
        notes=report_text.notes(study),
        metric_names=list(dict.fromkeys(n for arm in study.metrics.values() for n in arm)),
        resolved=figures.resolved,
        arms=_arms(study),
        confusion=_confusion(study),
        class_counts=_class_counts(study),
        run_facts=_run_facts(study),
        data_facts=report_text.flattened(
            {"dataset": source, **clouds.summary, **study.dataset_summary}
        ),
        provenance=report_text.flattened(study.provenance),
        clouds=clouds,
        cloud_limit=POINTS,
        drawn=list(drawn),
        links=links,
        # The engine must not escape scripts; `_json` did what a script element needs.
        figures_json=_json(
            {name: json.loads(f.to_json(engine="json")) for name, f in drawn.items()}
        ),
        plotly_js=get_plotlyjs(),
    )


def _json(document: Any) -> str:
    """JSON that cannot end or open anything in HTML: no `<`, `>`, `&` stays in it."""
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _arms(study: Study) -> list[dict[str, Any]]:
    """One entry an arm: description, strength and mode, seeds that finished."""
    found = []
    for arm in study.arms:
        rows = [row for row in study.results if row["arm"] == arm]
        settings = {
            f"{name} {row[name]:g}" if isinstance(row[name], float) else str(row[name])
            for row in rows
            for name in ("strength", "mode")
            if row.get(name) not in (None, "")
        }
        found.append(
            {
                "name": arm,
                "description": study.arm_descriptions.get(arm, ""),
                "settings": ", ".join(sorted(settings)),
                "seeds": ", ".join(str(trial.seed) for trial in study.of_arm(arm)),
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


def _run_facts(study: Study) -> list[tuple[str, str]]:
    facts: dict[str, Any] = {"task": study.title}
    if study.threshold is not None:
        facts["threshold"] = f"{study.threshold:g} {study.unit}".strip()
    facts |= {name: value for name, value in study.settings.items() if name != "training"}
    training = study.settings.get("training")
    if isinstance(training, Mapping):
        facts |= {name: value for name, value in training.items() if name not in facts}
    if study.results:
        status = Counter(str(row["status"]) for row in study.results)
        facts["trials"] = ", ".join(f"{count} {name}" for name, count in sorted(status.items()))
        seconds = [row["seconds"] for row in study.results if row.get("seconds") is not None]
        if seconds:
            facts["time of all trials"] = f"{sum(seconds) / 60:.0f} min"
    facts["primary metric"] = report_text.metric_title(study.primary)
    return report_text.flattened(facts)


def _tables(study: Study) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Name → header and rows of all numbers that the page shows."""
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "metrics": (
            ["arm", "metric", "value", "low", "high"],
            [
                [arm, name, *asdict(found).values()]
                for arm, metrics in study.metrics.items()
                for name, found in metrics.items()
            ],
        ),
        "confusion": (
            ["true", *study.classes],
            [
                [name, *row]
                for name, row in zip(study.classes, study.confusion.tolist(), strict=True)
            ],
        ),
        "class_counts": (
            ["split", *study.classes],
            [[split, *counts] for split, counts, _ in _class_counts(study)],
        ),
        "roc": (["arm", "seed", "false_positive_rate", "true_positive_rate"], _roc_rows(study)),
    }
    trials = study.of_arm(REFERENCE)
    labels = np.concatenate([t.labels for t in trials])
    probabilities = np.concatenate([t.probabilities for t in trials])
    bins = asdict(reliability(labels, probabilities, repeats=len(trials)))
    columns = [column.tolist() for column in bins.values()]
    tables["reliability"] = (list(bins), [list(row) for row in zip(*columns, strict=True)])
    if study.kind == "ablation":
        header = ["arm", "metric", "none", "value", "difference", "low", "high", "seeds"]
        tables["effects"] = (
            header,
            [
                [arm, name, e.reference, e.value, *asdict(e.difference).values(), e.seeds]
                for arm, effects in study.effects.items()
                for name, e in effects.items()
            ],
        )
        header = list(study.results[0]) if study.results else ["arm", "seed", "status"]
        tables["results"] = (header, [[row.get(n) for n in header] for row in study.results])
    return tables


def _roc_rows(study: Study) -> list[list[Any]]:
    return [
        [trial.arm, trial.seed, false_rate, true_rate]
        for trial in study.trials
        for false_rate, true_rate in zip(
            GRID.round(6).tolist(),
            mean_roc(trial.labels, trial.probabilities).tolist(),
            strict=True,
        )
    ]


def _csv(header: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()
