"""The metrics of a run for people: tables in a terminal of 80 columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.terminal import out


def show(run: Path, answer: Mapping[str, Any]) -> None:
    """Print the content of a run's metrics.json."""
    sides = answer["class_counts"]
    counts = Table("class", *sides, title=answer["question"], title_justify="left")
    for name in answer["classes"]:
        counts.add_row(name, *(str(classes[name]) for classes in sides.values()))
    out.print(counts)
    table = Table("test metric", "value", "95 % interval", title_justify="left")
    for name, interval in answer["metrics"].items():
        value, low, high = (
            "–" if interval[k] is None else f"{interval[k]:.3f}" for k in ("value", "low", "high")
        )
        table.add_row(name, value, f"{low} … {high}")
    out.print(table)
    for side, counted in answer.get("leakage", {}).get("splits", {}).items():
        out.print(
            f"{side}: {counted['near']} of {counted['structures']} crystals have a near-duplicate "
            f"in training, {counted['isostructural']} an isostructural crystal"
        )
    if "against" in answer:
        rows = Table("test metric", "difference", "95 % interval", "p", title_justify="left")
        rows.title = f"{run} minus {answer['against']['run']}"
        for name, pair in answer["against"]["bootstrap"].items():
            found = [pair["difference"][k] for k in ("value", "low", "high")] + [pair["p"]]
            value, low, high, p = ("–" if each is None else f"{each:.3f}" for each in found)
            rows.add_row(name, value, f"{low} … {high}", p)
        out.print(rows)
    for name, other in answer.get("also", {}).items():
        metric = "auroc" if "auroc" in other["metrics"] else next(iter(other["metrics"]))
        value, low, high = (
            "–" if (number := other["metrics"][metric][k]) is None else f"{number:.3f}"
            for k in ("value", "low", "high")
        )
        out.print(f"{name}: {other['question']} {metric} {value}, {low} … {high}")
    out.print(f"written: {run}/metrics.json, predictions.parquet, tensorboard/", soft_wrap=True)
