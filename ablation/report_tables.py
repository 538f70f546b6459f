"""Tables behind the page beyond the grid's own: confusion, class counts, ROC, reliability."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from ablation.curves import GRID, mean_roc, reliability
from ablation.figures_curves import roc_conditions
from ablation.report_study import Report, Study

_TEXT = pa.string()


def page_tables(report: Report) -> dict[str, pa.Table]:
    """Name → table, each with the column `task`; of a run also its metrics."""
    made: dict[str, list[dict[str, Any]]] = {
        "confusion": [],
        "class_counts": [],
        "roc": [],
        "reliability": [],
    }
    for study in report.studies:
        for name, rows in _of_study(study):
            made[name] += [{"task": study.task} | row for row in rows]
    if report.kind == "run":
        made["run_metrics"] = [
            {"task": study.task, "metric": name, **asdict(found)}
            for study in report.studies
            for metrics in study.metrics.values()
            for name, found in metrics.items()
        ]
    else:
        made["results"] = [dict(row) for row in report.results]
    return {name: _table(rows) for name, rows in made.items() if rows}


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    for name, column in columns.items():
        if pa.types.is_null(column.type):
            columns[name] = column.cast(_TEXT)
    return pa.table(columns)


def _of_study(study: Study) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    yield (
        "confusion",
        [
            {"true": true, "predicted": predicted, "count": count}
            for true, counts in zip(study.classes, study.confusion.tolist(), strict=True)
            for predicted, count in zip(study.classes, counts, strict=True)
        ],
    )
    yield (
        "class_counts",
        [
            {"split": split, "class": name, "crystals": count}
            for split, counts in study.class_counts.items()
            for name, count in counts.items()
        ],
    )
    labels = study.trials.labels
    yield (
        "roc",
        [
            {
                "model": condition.model,
                "condition": condition.name,
                "seed": seed,
                "false_positive_rate": false_rate,
                "true_positive_rate": true_rate,
            }
            for condition in roc_conditions(study)
            for seed, p_NC in sorted(study.trials.probabilities[condition].items())
            for false_rate, true_rate in zip(
                GRID.round(6).tolist(), mean_roc(labels, p_NC).tolist(), strict=True
            )
        ],
    )
    if study.reference is not None:
        by_seed = study.trials.probabilities[study.reference]
        p_NC = np.concatenate([by_seed[seed] for seed in sorted(by_seed)])
        bins = asdict(reliability(np.tile(labels, len(by_seed)), p_NC, repeats=len(by_seed)))
        columns = [column.tolist() for column in bins.values()]
        yield (
            "reliability",
            [dict(zip(bins, row, strict=True)) for row in zip(*columns, strict=True)],
        )
