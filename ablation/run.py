"""Run a grid on long-lived Ray workers; what is done is never done again.

The driver alone writes the record (`ablation.record`); workers keep checkpoints of the trainings
at work in `OUT/fits/`. Kill any of them, or all: the same command goes on.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ablation import layout
from ablation.claim import Claim, driving, refuse_driven
from ablation.grid import GridConfig
from ablation.jobs import Bereaved, Group, Job, Queue, jobs_of
from ablation.parts import Part, not_done, take_up
from ablation.plan import Trial, plan
from ablation.record import Record
from ablation.status import Standing, standing
from ablation.tables import write_statistics
from ablation.variants import CloudSource, Variants
from ablation.worker import Failure, Shared, Worker
from cluster import memory
from cluster.errors import DiskFailed, RunFailed, Stopped
from cluster.gauges import Gauges
from cluster.provenance import commit
from cluster.ray_session import cards, cores, job_ray, ray_for, threads_for
from featurization.guard import StopSignals
from featurization.manifest import read_manifest
from training.dataset import load
from training.ensemble import folders
from training.loop import MODEL

_NOTICED = 20.0  # s in which Ray notices that a node is lost (cluster/ray_node.py)
_LOOK = 2.0  # s between looks at how far trainings are


def run_grid(
    grid: GridConfig,
    out: str | Path,
    progress: Callable[[Standing], None] = lambda at: None,
    *,
    part: Part | None = None,
) -> dict[str, int]:
    """Run the trials of a grid that have no result in `out` yet, then write its tables.

    Args:
        progress: called a few times a second with how far the grid is.
        part: run its trials alone, in a folder of `out` of its own, and write no tables; a later
            call without it takes up what the parts have done, and does what they have not.

    `out` gets what `ablation.layout` and `ablation.record` say, `datasets/` of arms that are
    featurized anew, and `fits/` of trainings at work; models of the reference stay there if
    `test_only` trials need them.

    Returns:
        How many trials are `done`, `failed` and `skipped`, which were done before.

    Raises:
        UserError: no dataset, no usable classes, `out` holds another grid, or another driver is at
            work there or in one of its parts.
        RunFailed: Ray lost its workers again and again, or another driver has taken over.
        DiskFailed: in a worker; no trial is blamed for it.
        Stopped: by a signal; all that is done is recorded.
    """
    out = Path(out).resolve()
    manifest = read_manifest(Path(grid.dataset))
    planned = plan(grid, manifest["content_hash"])
    layout.refuse_strangers(out)
    place = out if part is None else part.folder(out)
    with driving(place) as claim:
        if part is not None:
            refuse_driven(out)
            planned = part.of(planned)
        layout.begin(out, grid, manifest, load(Path(grid.dataset), grid.training.radiation))
        record = Record.mended(place)
        if part is None:
            take_up(record, out, planned)
        todo = not_done(out, planned)
        if todo:
            with StopSignals() as signals:
                driver = _Driver(grid, place, planned, record, claim, signals, progress)
                driver.run(todo)
        if part is None:
            done = layout.write_tables(out)
            if done == len(planned):
                write_statistics(out, dataset=Path(grid.dataset))
        else:
            done = len(planned) - len(not_done(out, planned))
    return {"done": done, "failed": len(planned) - done, "skipped": len(planned) - len(todo)}


class _Driver:
    """Hands jobs to workers and writes down what they give."""

    def __init__(
        self,
        grid: GridConfig,
        out: Path,
        planned: list[Trial],
        record: Record,
        claim: Claim,
        signals: StopSignals,
        progress: Callable[[Standing], None],
    ) -> None:
        self._grid, self._out, self._planned = grid, out, planned
        self._record, self._claim, self._signals = record, claim, signals
        self._progress = progress
        self._variants = Variants(Path(grid.dataset), out)
        self._shared: dict[CloudSource, Any] = {}
        self._attempts: Counter[Job] = Counter()
        self._commit = commit()
        self._looked = 0.0
        self._gauges = Gauges()
        self._kept = {t.fit.id for t in planned if t.mode == "test_only"}

    def run(self, todo: list[Trial]) -> None:
        """All trials that have no result."""
        trained = {fit for fit in self._kept if self._has_model(fit)}
        queue = Queue(jobs_of(todo, self._variants, trained), trained)
        processes = min(self._grid.processes or cores(), len(queue))
        for source in sorted(queue.sources(), key=lambda source: source.name):
            self._variants.featurize(source, min(processes, os.cpu_count() or 1))
        with ExitStack() as held:
            held.enter_context(ray_for(processes, self._grid.metrics_port))
            held.callback(self._shared.clear)
            self._drive(queue, processes)
        waiting = {t.fit.id for t in self._planned if not self._record.is_done(t.id)}
        for folder in (self._out / "fits").glob("*"):  # of workers that outlived their driver
            if folder.name not in self._kept | waiting:
                shutil.rmtree(folder, ignore_errors=True)

    def _drive(self, queue: Queue, processes: int) -> None:
        import ray

        # Ray takes whole GPUs, or equal parts of one that several trials then share.
        gpus = cards(torch.cuda.device_count())
        share = 0 if not gpus else 1 / max(1, -(-processes // gpus))
        kind: Any = ray.remote(num_cpus=1, num_gpus=share)(Worker)
        threads = threads_for(processes)
        room = memory.available() // (4 * min(processes, os.cpu_count() or 1))

        # Who has started gets a job; one hired on a node that is gone never does.
        busy: dict[Any, tuple[Any, Job | None]] = {}  # without a job: it starts
        places: dict[Any, str] = {}  # ids of the nodes of workers
        numbers = count(1)

        def hire() -> None:
            named = kind.options(name=f"{self._out.name}: worker {next(numbers)}")
            worker = named.remote(self._out, threads, room)
            busy[worker.node.remote()] = worker, None

        def running() -> list[Job]:
            return [job for _, job in busy.values() if job is not None]

        for _ in range(processes):
            hire()
        idle: list[tuple[Any, Group | None]] = []
        lost = 0  # workers, one after the other, without a job done between
        bereaved = Bereaved(_NOTICED if job_ray() else 0.0)
        while queue or running() or bereaved:
            if self._signals.received:
                raise Stopped(
                    f"stopped by {self._signals.received}; what is done is recorded",
                    remedy="give the same command again",
                )
            waiting = []
            for worker, last in idle:
                if (job := queue.take(last)) is None:
                    waiting.append((worker, last))
                else:
                    busy[self._start(worker, job)] = worker, job
            idle = waiting
            assert running() or (busy and not idle) or bereaved, "jobs wait for each other"
            if not busy:
                time.sleep(0.5)
            for reference in ray.wait(list(busy), timeout=0.5)[0] if busy else ():
                worker, job = busy.pop(reference)
                try:
                    answers = ray.get(reference)
                except ray.exceptions.RayError as error:  # the worker itself is gone
                    lost += 1
                    if len(idle) + len(busy) < ray.cluster_resources().get("CPU", 0):
                        hire()
                    if lost > 3 * processes + 10:
                        raise RunFailed(
                            f"Ray lost {lost} workers in a row: {error}",
                            remedy="see whether memory or nodes fail; the same command goes on",
                        ) from None
                    if job is not None:
                        bereaved.add(job, places[worker], f"{type(error).__name__}: {error}")
                    continue
                idle.append((worker, None if job is None else job.group))
                if job is None:
                    places[worker] = answers
                    continue
                lost = 0
                queue.ended(job)
                if isinstance(answers, Failure):
                    self._failed(queue, job, answers)
                else:
                    self._done(queue, job, answers)
            if bereaved:
                alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
                for job, said in bereaved.blamed(alive, queue):
                    self._failed(queue, job, Failure(said, hopeless=False))
            self._tell(running(), processes, queue)

    def _start(self, worker: Any, job: Job) -> Any:
        """Reference to the answers of a job."""
        base = self._variants.base((job.fit or job.trials[0].fit).training.radiation)
        given = job.fit, list(job.trials), self._share(base), self._share(job.source)
        return worker.attempt.options(name=job.title).remote(*given)

    def _share(self, source: CloudSource) -> Any:
        """One copy a node of the clouds that several jobs start from."""
        import ray

        if source not in self._shared:
            data = load(source.folder, source.radiation)
            self._shared[source] = ray.put(Shared.of(source.name, data))
        return self._shared[source]

    def _done(self, queue: Queue, job: Job, answers: list[Any]) -> None:
        self._claim.check()
        for answer in answers:
            row = answer.trial.identity | {"status": "done"} | answer.row
            self._record.add(row | {"commit": self._commit}, answer.probability_NC)
        if job.fit is not None:
            queue.trained.add(job.fit.id)
            if job.fit.id not in self._kept:
                shutil.rmtree(self._folder(job.fit.id), ignore_errors=True)

    def _failed(self, queue: Queue, job: Job, failure: Failure) -> None:
        """Put a job back, or write down that its trials failed, and those that need its model."""
        self._claim.check()
        if failure.disk:
            said = failure.traceback.strip().splitlines()[-1]
            raise DiskFailed(said, remedy="make room and give the same command again")
        if job.fit is None and len(job.trials) > 1:  # one of them may be to blame
            for trial in job.trials:
                queue.back(Job(None, (trial,), job.source, job.group))
            return
        self._attempts[job] += 1
        if not failure.hopeless and self._attempts[job] <= self._grid.retries:
            queue.back(job)
            return
        rows = dict.fromkeys(job.trials, failure.traceback)
        if job.fit is not None:
            reason = f"the training that it tests has failed: {failure.traceback}"
            rows |= dict.fromkeys(queue.without(job.fit), reason)
        for trial, text in rows.items():
            row = trial.identity | {"status": "failed", "attempts": self._attempts[job]}
            self._record.add(row | {"commit": self._commit, "error": text})

    def _tell(self, running: list[Job], processes: int, queue: Queue) -> None:
        """Report how far the grid is, now and then."""
        if time.monotonic() < self._looked + _LOOK and (queue or running):
            return
        self._looked = time.monotonic()
        at_work = {job.title: self._part(job) for job in running}
        self._claim.say(processes=processes, running=list(at_work))
        at = standing(self._planned, self._record.rows, at_work, processes)
        self._progress(at)
        self._gauges.set({"trials_running": sum(len(job.trials) for job in running)})
        if at.seconds_left is not None:
            self._gauges.set({"seconds_left": at.seconds_left})
        for task, arms in at.by_task.items():
            for arm, counted in arms.items():
                numbers = {f"trials_{name}": number for name, number in asdict(counted).items()}
                self._gauges.set(numbers, task=task, arm=arm)

    def _part(self, job: Job) -> float:
        """Trials of a job that are as good as done, by its finished epochs."""
        if job.fit is None:
            return 0.0
        epochs = 0
        for folder in folders(self._folder(job.fit.id), job.fit.training):
            try:
                epochs += len((folder / "history.csv").read_text().splitlines()) - 1
            except FileNotFoundError:
                continue
        config = job.fit.training
        return len(job.trials) * epochs / (config.members * config.passes)

    def _folder(self, fit: str) -> Path:
        return self._out / "fits" / fit

    def _has_model(self, fit: str) -> bool:
        config = next(t.fit.training for t in self._planned if t.fit.id == fit)
        return all((folder / MODEL).exists() for folder in folders(self._folder(fit), config))
