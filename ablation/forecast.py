"""What a grid takes, from a timed part of one training of each model on its own dataset."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ablation.grid import GridConfig
from ablation.parts import Part, not_done
from ablation.plan import Trial, fits_of, plan
from ablation.trials import REFERENCE
from cluster.ray_session import cards, cores, threads_for
from cluster.terminal import duration, out, summary
from featurization.manifest import read_manifest
from training.config import ModelName
from training.dataset import POINT_BYTES, map_clouds
from training.split import Parts
from training.timing import WORKING, Timed, timed_training

_LINE = 900  # bytes of a trial in record.jsonl and the Parquet tables, at most
_FILES = 10  # of a grid, and two more a task
_FILES_AT_WORK = 4  # of a training at work


@dataclass(frozen=True, slots=True)
class Forecast:
    """Trials by kind, and what they take, in words."""

    counts: dict[str, dict[str, int]]  # "task", "model", "arm", "mode" → value → trials
    rows: dict[str, str]
    shared: float  # s of one process, which all share
    memory: int  # bytes of a process
    shares: int  # most processes that can work at a time


def forecast(grid: GridConfig, folder: Path | None, part: Part | None = None) -> Forecast:
    """Time a part of a training of each model, one after the other, and add up; writes nothing.

    Of the clouds, only those that are timed are read.

    Args:
        folder: of a grid that is begun, what is done there does not count.

    Raises:
        UserError: as `ablation.run.run_grid`.
    """
    manifest = read_manifest(Path(grid.dataset))
    planned = plan(grid, manifest["content_hash"])
    if part is not None:
        planned = part.of(planned)
    todo = planned if folder is None else not_done(folder, planned)
    data = map_clouds(Path(grid.dataset), grid.training.radiation)
    parts = {t: Parts.of(data, grid.training_of(t, grid.all_models[0], 0)) for t in grid.all_tasks}
    task = max(parts, key=lambda name: len(parts[name].rows["train"]))
    processes = min(grid.processes or cores(), len(planned))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_for(processes))
    try:
        timed = {
            m: timed_training(data, grid.training_of(task, m, 0), parts[task])
            for m in grid.all_models
        }
    finally:
        torch.set_num_threads(threads)
    seconds = _seconds(todo, timed, {t: len(p.rows["train"]) for t, p in parts.items()}, task)
    fits = fits_of(todo)
    tests = {t: len(parts[t].rows["test"]) for t in parts}
    values = sum(4 * tests[t.training.task] * len(t.training.question.classes) for t in planned)
    models = sum(t.arm == REFERENCE for t in planned) if "test_only" in grid.modes else 0
    mib = (2 * values + _LINE * len(planned)) / 2**20
    files = _FILES + 2 * len(parts) + _FILES_AT_WORK * processes + 2 * models
    gpus = cards(torch.cuda.device_count())
    clouds = POINT_BYTES * int(data.offsets[-1])
    needs = clouds + round(max(t.inputs for t in timed.values())) + WORKING
    return Forecast(
        {
            "task": _counted(planned, lambda t: t.training.task),
            "model": _counted(planned, lambda t: t.training.model),
            "arm": _counted(planned, lambda t: t.arm),
            "mode": _counted(planned, lambda t: t.mode),
        },
        {
            "trials": f"{len(planned):,}, of which {len(planned) - len(todo):,} are done",
            "trainings to do": f"{len(fits):,}",
            "one training": ", ".join(f"{m} {duration(t.training)}" for m, t in timed.items()),
            "work": f"{seconds / 3600:,.1f} hours of one process",
            "time": f"{duration(seconds / processes)} with {processes} processes at a time",
            "processor": f"{processes} processes on {cores()} cores",
            "GPU": f"{gpus}, shared by {processes} processes"
            if gpus
            else "none found, none needed",
            "memory": f"about {needs / 2**30:.1f} GiB a process",
            "disk": f"{mib:,.0f} MiB in about {files} files",
        },
        seconds,
        needs,
        min(grid.processes or len(planned), max(1, len(fits) or len(todo))),
    )


def show(expected: Forecast) -> None:
    """Print it."""
    for name, counts in expected.counts.items():
        table = Table(name, "trials", title_justify="left")
        for value, count in counts.items():
            table.add_row(value, f"{count:,}")
        out.print(table)
    summary("what to expect; nothing was run", expected.rows)


def _seconds(
    todo: list[Trial], timed: dict[ModelName, Timed], sizes: dict[Any, int], task: Any
) -> float:
    """Of one process; clouds and inputs are shared by the tasks of an arm and seed."""
    total, seen = 0.0, set()
    for one in fits_of(todo).values():
        time_of = timed[one.training.model]
        total += time_of.training * sizes[one.training.task] / sizes[task]
        seen.add((one.arm, one.strength, one.training.seed, one.training.model))
    total += sum(timed[model].once for *_, model in seen)
    return total + sum(timed[t.training.model].test for t in todo)


def _counted(planned: list[Trial], key: Any) -> dict[str, int]:
    return dict(Counter(key(trial) for trial in planned))
