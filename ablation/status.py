"""How far a grid is: from its files alone, whether a driver is at work or not."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ablation.claim import CLAIM, read_claim
from ablation.layout import read_plan
from ablation.parts import folders, rows_of
from ablation.plan import Trial
from cluster.terminal import duration, err, out, summary

_LINE_EVERY = 30.0  # s between lines in a log file


@dataclass(frozen=True, slots=True)
class Count:
    """Trials of one task and arm."""

    planned: int = 0
    done: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a grid is."""

    total: Count
    by_task: Mapping[str, Mapping[str, Count]]  # task → arm → trials
    running: tuple[str, ...]  # jobs, in words
    share: float  # trials done or failed, with the finished part of those at work
    seconds_left: float | None  # None before the first result, or when nobody works


def standing(
    planned: Sequence[Trial],
    rows: Mapping[str, Mapping[str, Any]],
    running: Mapping[str, float],
    processes: int,
) -> Standing:
    """Count the trials of a plan.

    Args:
        rows: the record's, by trial.
        running: jobs at work, in words, and how many trials of each are as good as done.
        processes: trials at a time; 0 if nobody works.
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    for trial in planned:
        arms = counts.setdefault(trial.training.task, {})
        count = arms.setdefault(trial.arm, Counter())
        count["planned"] += 1
        count[rows.get(trial.id, {}).get("status", "missing")] += 1
    by_task = {
        task: {arm: _count(count) for arm, count in arms.items()} for task, arms in counts.items()
    }
    total = _count(
        sum((count for arms in counts.values() for count in arms.values()), start=Counter())
    )
    share = total.done + total.failed + sum(running.values())
    left = _seconds_left(planned, rows, processes) if processes else None
    return Standing(total, by_task, tuple(running), share, left)


def status(out: Path) -> dict[str, Any]:
    """What `xtal ablate status` says of a grid's folder, as plain JSON values.

    Raises:
        UserError: no grid.
    """
    _, planned = read_plan(out)
    rows = rows_of(out)
    drivers: list[dict[str, Any]] = []
    running: dict[str, float] = {}
    processes = 0
    for place in (*folders(out), out):
        if (claim := read_claim(place)) is not None:
            silent = round(max(0.0, time.time() - (place / CLAIM).stat().st_mtime), 1)
            driver = {name: claim[name] for name in ("host", "pid")} | {"silent_seconds": silent}
            drivers.append(driver)
            running |= dict.fromkeys(claim.get("running", ()), 0.0)
            processes += claim.get("processes", 0)
    found = standing(
        planned,
        rows,
        running,
        processes,
    )
    failures = [rows[t.id] for t in planned if rows.get(t.id, {}).get("status") == "failed"]
    return {
        "trials": found.total.planned,
        "done": found.total.done,
        "failed": found.total.failed,
        "missing": found.total.planned - found.total.done - found.total.failed,
        "tasks": {
            task: {arm: asdict(count) for arm, count in arms.items()}
            for task, arms in found.by_task.items()
        },
        "running": list(found.running),
        "seconds_left": None if found.seconds_left is None else round(found.seconds_left, 1),
        "drivers": drivers,
        "failures": failures,
    }


@contextmanager
def live() -> Iterator[Callable[[Standing], None]]:
    """Show how far a running grid is: a table in a terminal, a line now and then in a log file."""
    if err.is_terminal:
        with Live(console=err, refresh_per_second=2) as shown:
            yield lambda at: shown.update(Group(counts_table(at.by_task), Text(_sentence(at))))
        return
    said = float("-inf")

    def line(at: Standing) -> None:
        nonlocal said
        over = at.total.done + at.total.failed == at.total.planned
        if over or time.monotonic() > said + _LINE_EVERY:
            said = time.monotonic()
            err.print(_sentence(at), soft_wrap=True)

    yield line


def show(folder: Path, answer: Mapping[str, Any]) -> None:
    """Print what `status` gives."""
    by_task = {
        task: {arm: Count(**count) for arm, count in arms.items()}
        for task, arms in answer["tasks"].items()
    }
    out.print(counts_table(by_task))
    rows = {name: answer[name] for name in ("trials", "done", "failed", "missing")}
    drivers = [
        f"process {each['pid']} on {each['host']}, last sign of life "
        f"{each['silent_seconds']:.0f} s ago"
        for each in answer["drivers"]
    ]
    rows["driver"] = "\n".join(drivers) or "none at work"
    if drivers:
        rows |= {"running": "\n".join(answer["running"]), "left": duration(answer["seconds_left"])}
    summary(f"grid {folder}", rows)
    for row in answer["failures"]:
        out.print(f"{row['trial']} {row['task']} {row['model']} {row['arm']} seed {row['seed']}:")
        out.print(row["error"], soft_wrap=True)


def _sentence(at: Standing) -> str:
    failed = f", {at.total.failed:,} failed" if at.total.failed else ""
    left = duration(at.seconds_left)
    return f"{at.total.done:,} of {at.total.planned:,} trials done{failed}; time left: {left}"


def counts_table(by_task: Mapping[str, Mapping[str, Count]]) -> Table:
    """Arms × tasks: trials done of those planned, failed ones after a cross."""
    arms = list(dict.fromkeys(arm for counts in by_task.values() for arm in counts))
    table = Table("arm", *by_task, title_justify="left")
    for arm in arms:
        cells = []
        for counts in by_task.values():
            count = counts.get(arm, Count())
            cell = f"{count.done}/{count.planned}" if count.planned else ""
            cells.append(cell + (f" ✗{count.failed}" if count.failed else ""))
        table.add_row(arm, *cells)
    return table


def _count(count: Counter[str]) -> Count:
    return Count(count["planned"], count["done"], count["failed"])


def _seconds_left(
    planned: Sequence[Trial], rows: Mapping[str, Mapping[str, Any]], processes: int
) -> float | None:
    """From what trials of the same model, task and mode took, or else of all."""
    took: dict[tuple[str, ...], list[float]] = defaultdict(list)
    waiting = []
    for trial in planned:
        row = rows.get(trial.id, {})
        keys = _kinds(trial)
        if row.get("status") == "done":
            for key in keys:
                took[key].append(row["seconds"])
        elif not row:
            waiting.append(keys)
    if not took:
        return None
    mean = {key: sum(seconds) / len(seconds) for key, seconds in took.items()}
    left = sum(next(mean[key] for key in keys if key in mean) for keys in waiting)
    return left / min(processes, max(1, len(waiting)))


def _kinds(trial: Trial) -> tuple[tuple[str, ...], ...]:
    """What a trial's time depends on, the most telling first."""
    mode, model = trial.mode, trial.training.model
    return (mode, model, trial.training.task), (mode, model), (mode,), ()
