"""What the grid costs: overhead a trial, against one process a trial; and what kills do to it.

    python -m benchmarks.grid overhead DATASET [TRIALS]
    python -m benchmarks.grid kills DATASET [KILLS]

`overhead` runs trials that do nothing (a worker that answers at once with the probabilities of the
test crystals), the same with real trainings of the model `majority`, and single trials in processes
of their own. `kills` sends SIGKILL to the driver, a worker, the raylet or all of them at random
moments of a real grid until it has ended, and compares with an undisturbed run.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import ablation.run
from ablation.grid import GridConfig
from ablation.plan import plan
from ablation.run import run_grid
from ablation.worker import Answer, Worker
from featurization.manifest import read_manifest
from training.metrics import METRICS

_TINY = {"task": "crystal_system", "validation_fraction": 0.2, "test_fraction": 0.2}


class Idle(Worker):
    """Does nothing but answer."""

    def train(self, fit, trials, base, own):  # type: ignore[no-untyped-def]
        parts = self._parts_of(base, fit.training)
        shape = len(parts.rows["test"]), len(fit.training.question.classes)
        row = dict.fromkeys((*METRICS, "seconds"), 0.5)
        return [Answer(trial, row, np.full(shape, 1 / shape[1], np.float32)) for trial in trials]


def overhead(dataset: Path, trials: int) -> dict[str, object]:
    """Seconds, bytes and files of a grid of trials that do nothing, and of real small ones."""
    found: dict[str, object] = {"trials": trials, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker, count in (("idle", Idle, trials), ("majority", Worker, 100)):
            ablation.run.Worker = worker
            out = Path(folder) / name
            seconds, marks = _timed_grid(_grid(dataset, "majority", count), out)
            files = [path for path in out.rglob("*") if path.is_file()]
            found[name] = {
                "seconds in all": round(seconds, 2),
                "ms a trial between first and last": round(1e3 * marks / max(1, count - 1), 2),
                "files": len(files),
                "bytes a trial": round(sum(path.stat().st_size for path in files) / count),
            }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["MiB of the driver at its peak"] = round(peak / 1024)
        alone = []
        for number in range(3):
            start = time.perf_counter()
            command = [sys.executable, "-m", "xtal", "train", dataset, f"{folder}/run-{number}"]
            command += ["--model", "majority", "--task", "crystal_system", "--json"]
            subprocess.run([*map(str, command)], check=True, capture_output=True)
            alone.append(time.perf_counter() - start)
        found["s of one process a trial"] = round(sorted(alone)[1], 2)
    return found


def kills(dataset: Path, wanted: int) -> dict[str, object]:
    """SIGKILL at random moments, the same command again, until the grid has ended."""
    random.seed(0)
    grid = {"dataset": str(dataset), "arms": ["none", "basis_only", "directions_random"]}
    grid |= {"modes": ["retrain", "test_only"], "seeds": list(range(8))}
    training = _TINY | {"width": 16, "epochs": 12, "batch_size": 16}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "grid.toml", Path(folder) / "out"
        lines = [f"{key} = {json.dumps(value)}" for key, value in grid.items()]
        lines += ["[training]", *(f"{key} = {json.dumps(v)}" for key, v in training.items())]
        path.write_text("\n".join(lines))
        done, aims = 0, {"driver": 0, "worker": 0, "raylet": 0, "all": 0}
        while True:
            command = [sys.executable, "-m", "xtal", "ablate", str(path), str(out)]
            driver = subprocess.Popen(
                command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            while driver.poll() is None and done < wanted:
                time.sleep(random.uniform(2, 12))
                aim = random.choice(list(aims))
                while not (hit := _kill(driver, aim)) and driver.poll() is None:
                    time.sleep(0.2)  # it has not started yet
                done, aims[aim] = done + hit, aims[aim] + hit
            code = driver.wait()
            if code == 0:
                break
            assert done, driver.stderr.read().decode()  # type: ignore[union-attr]
        config = GridConfig(**grid, training=training)
        planned = [t.id for t in plan(config, read_manifest(dataset)["content_hash"])]
        rows = pq.read_table(out / "results.parquet").to_pylist()
        run_grid(config, Path(folder) / "calm")
        calm = pq.read_table(Path(folder) / "calm" / "results.parquet").to_pylist()
        differ = [
            max(abs(a[name] - b[name]) for name in METRICS) for a, b in zip(rows, calm, strict=True)
        ]
        return {
            "kills": done,
            "at": aims,
            "trials planned": len(planned),
            "exactly these have a result": [row["trial"] for row in rows] == planned,
            "largest difference of a metric from an undisturbed run": max(differ),
        }


def _kill(driver: subprocess.Popen[bytes], aim: str) -> int:
    """Returns 1 if something was there to kill."""
    if driver.poll() is not None:
        return 0
    if aim in ("driver", "all"):
        (os.kill if aim == "driver" else os.killpg)(driver.pid, signal.SIGKILL)
        return 1
    word = b"raylet/raylet" if aim == "raylet" else b"ray::"
    for pid in _family(driver.pid):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b" ")[0].find(word) >= 0:
                os.kill(pid, signal.SIGKILL)
                return 1
        except OSError:
            continue
    return 0


def _family(root: int) -> list[int]:
    """A process's descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(state[1])
    known, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in known} - known
        known |= more
        grown = bool(more)
    return sorted(known - {root})


def _grid(dataset: Path, model: str, trials: int) -> GridConfig:
    training = _TINY | {"model": model, "trees": 1}
    return GridConfig(
        dataset=str(dataset), arms=("none",), seeds=tuple(range(trials)), training=training
    )


def _timed_grid(grid: GridConfig, out: Path) -> tuple[float, float]:
    """Seconds of it all, and between its first and last result."""
    start = time.perf_counter()
    run_grid(grid, out)
    seconds = time.perf_counter() - start
    times = [json.loads(line[9:])["at"] for line in (out / "record.jsonl").open()]
    return seconds, max(times) - min(times)


if __name__ == "__main__":
    name, given, *rest = sys.argv[1:]
    runs = {"overhead": (overhead, 1000), "kills": (kills, 20)}
    run, usual = runs[name]
    print(json.dumps(run(Path(given), int(rest[0]) if rest else usual), indent=1))
