"""Grids with planted effects, in the layout that a real one leaves; no network is trained."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ablation.stats import Samples
from ablation.trials import read_trials
from training.metrics import METRICS, score


def sampled(table: pa.Table, **options: int) -> Samples:
    """The samples of a table of predictions."""
    return Samples(read_trials(table), **options)


KEYS = ("trial", "model", "arm", "strength", "mode", "seed")


def logits_of(random, labels, classes, hard, skill, noise=0.3):
    """(N, C) logits: crystals hard for all trials, noise of a training on each, a skill."""
    logits = 0.8 * hard + noise * random.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    return logits


def predictions(
    random, conditions, *, classes=2, seeds=(0, 1, 2), crystals=200, between=0.0, prefix="mp-"
):
    """Rows of one task: (model, arm, strength, mode) → skill; two thirds of the groups are pairs.

    `between`: standard deviation of a training's own skill.
    """
    group = np.minimum(np.arange(crystals), np.arange(crystals) % (2 * crystals // 3))
    labels = random.integers(classes, size=crystals)
    hard = random.normal(size=(crystals, classes)) + 0.5 * random.normal(size=crystals)[group, None]
    tables = []
    for (model, arm, strength, mode), skill in conditions.items():
        for seed in seeds:
            own = skill + between * random.normal()
            p = np.exp(logits_of(random, labels, classes, hard, own))
            p /= p.sum(axis=1, keepdims=True)
            dose = pa.nulls(crystals, pa.float64())
            if strength is not None:
                dose = pa.array(np.full(crystals, strength))
            columns = {
                "trial": pa.array([f"{model}-{arm}-{strength}-{mode}-{seed}"] * crystals),
                "model": pa.array([model] * crystals),
                "arm": pa.array([arm] * crystals),
                "strength": dose,
                "mode": pa.array([mode] * crystals),
                "seed": pa.array([seed] * crystals, pa.int64()),
                "id": pa.array([f"{prefix}{i}" for i in range(crystals)]),
                "group": pa.array([f"g{g}" for g in group]),
                "label": pa.array(labels, pa.int64()),
            }
            for name in ("trial", "model", "arm", "mode", "id", "group"):
                columns[name] = columns[name].dictionary_encode()
            columns |= {f"p{c}": pa.array(p[:, c].astype(np.float32)) for c in range(classes)}
            tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default").unify_dictionaries()


def plain(skills, model="pointnet"):
    """Arms without strength, trained again."""
    return {(model, arm, None, "retrain"): skill for arm, skill in skills.items()}


def write_grid(folder: Path, tables, *, classes=None, arms=(), missing=0, resamples=200, **grid):
    """A grid's folder from task → predictions.

    Args:
        classes: task → names; by default numbered.
        missing: planned trials that have not finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks, rows, models, modes, seeds = {}, [], {}, {}, {}
    named = {arm["name"]: arm for arm in arms}
    for task, table in tables.items():
        pq.write_table(table, folder / f"predictions-{task}.parquet")
        size = sum(name[0] == "p" and name[1:].isdigit() for name in table.column_names)
        names = list((classes or {}).get(task, [f"class {c}" for c in range(size)]))
        counts = {name: 100 + i for i, name in enumerate(names)}
        tasks[task] = {"title": task.replace("_", " "), "question": f"{names[-1]} ({task})?"}
        tasks[task] |= {"unit": "GPa", "threshold": 85.0, "classes": names}
        tasks[task] |= {"class_counts": {"train": counts, "validation": counts, "test": counts}}
        columns = {name: table[name].to_pylist() for name in (*KEYS, "label")}
        p = np.stack([table[f"p{c}"].to_numpy() for c in range(size)], axis=1)
        trial = np.array(columns["trial"])
        for name in dict.fromkeys(columns["trial"]):
            own = np.flatnonzero(trial == name)
            found = score(np.array(columns["label"])[own], p[own])
            row = {key: columns[key][own[0]] for key in KEYS}
            models[row["model"]] = modes[row["mode"]] = seeds[row["seed"]] = None
            named.setdefault(row["arm"], {"name": row["arm"], "description": f"Does {row['arm']}."})
            row |= {"task": task, "trial": f"{task}-{name}", "status": "done", "seconds": 41.0}
            rows.append(row | {m: float(found[m][0]) for m in METRICS} | {"commit": "2783c0c"})
    strength = pa.array([row["strength"] for row in rows], pa.float64())
    results = pa.Table.from_pylist([{k: v for k, v in r.items() if k != "strength"} for r in rows])
    pq.write_table(results.append_column("strength", strength), folder / "results.parquet")
    summary = {"structures": 7851, "rejected": 18, "content_hash": "cd" * 32}
    document = {"tasks": tasks, "models": list(models), "arms": list(named.values())}
    document |= {"modes": list(modes), "seeds": list(seeds), "trials": len(rows) + missing}
    document |= {"primary_metric": "auroc", "dataset": "dataset", "dataset_summary": summary}
    document |= {"training": {"epochs": 40, "resamples": resamples}}
    document |= {"provenance": {"commit": "2783c0c", "hardware": "1 GPU"}}
    document |= {"attribution": "Data: the Materials Project, CC BY 4.0; Jain et al. 2013."}
    (folder / "grid.json").write_text(json.dumps(document | grid))
    return folder
