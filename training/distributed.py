"""Data-parallel training: long-lived Ray actors that share each batch over torch.distributed.

Own actors rather than Ray Train's TorchTrainer: a fit of two workers starts in about 3 s instead of
11 to 14, no report blocks the loop (each of Ray Train's takes 2 s unless its health checks are made
more frequent), and the loop is that of a single worker, so that both give the same result within
rounding. What Ray Train would add is here in a few lines: when a worker, a node or Ray itself dies,
all begin again at the last checkpoint, as many of them as what is left of the machine can hold. The
batch is the whole group's, so that fewer workers are slower and change nothing else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import Stopped, UserError
from cluster.files import disk_failed
from cluster.ray_session import cards, job_ray, ray_for, threads_for
from training.config import TrainingConfig
from training.dataset import open_clouds
from training.ensemble import fit_members
from training.gauges import TrainingGauges
from training.progress import Progress
from training.tensorboard import log_epochs

_POLL = 0.5  # s
_SAVING = 30.0  # s, in which worker 0 ends its step and saves it
_FAREWELL = 15.0  # s, in which the others notice that a worker is gone


class Group:
    """The workers of a torch.distributed process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the workers: one message for all of them."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """All workers' rows, interleaved: row i of worker r is row i·size + r of the answer."""
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor([len(rows)], device=where)
        dist.all_reduce(total)
        count, longest = int(total), -(-int(total) // self.size)
        padded = torch.zeros(longest, rows.shape[1], device=where)
        padded[: len(rows)] = torch.from_numpy(rows)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        whole: NDArray[np.float32] = torch.stack(parts, dim=1).flatten(0, 1)[:count].cpu().numpy()
        return whole


class _Worker:
    """An actor of two threads: one trains, the other says how far it is."""

    def __init__(self) -> None:
        self._at: Progress | None = None
        self._stopping = False

    def stop(self) -> None:
        """End after the step at work; worker 0 saves it."""
        self._stopping = True

    def standing(self) -> Progress | None:
        """Where the training is."""
        return self._at

    def fit(
        self,
        rank: int,
        size: int,
        meeting: str,
        dataset: str,
        run: str,
        config: TrainingConfig,
        identity: dict[str, Any],
        resume: bool,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # A file that all see: torch's TCP store would listen on all interfaces, for anybody.
        store = dist.FileStore(meeting, size)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        try:
            with log_epochs(Path(run), rank == 0) as log:
                show = TrainingGauges(rank).following(config)

                def note(at: Progress) -> None:
                    log(at)
                    show(at)
                    self._at = at
                    if self._stopping:
                        raise Stopped("stopped by the driver", remedy="go on with --resume")

                fit_members(
                    Path(run),
                    open_clouds(Path(dataset), config.radiation, size),
                    config,
                    identity=identity,
                    resume=resume,
                    peers=Group(),
                    progress=note,
                )
        finally:
            dist.destroy_process_group()


class _Lost(Exception):
    """A worker, or Ray, died."""


def whole_job() -> int:
    """Workers that use all GPUs, without GPUs one a node of the job; 1 outside of a job."""
    job = job_ray()
    return cards(torch.cuda.device_count()) or (1 if job is None else job.nodes)


def fit_on_workers(
    dataset: Path,
    run: Path,
    config: TrainingConfig,
    *,
    identity: dict[str, Any],
    resume: bool,
    progress: Callable[[Progress], None],
) -> None:
    """`training.ensemble.fit_members` on `config.workers` Ray actors of this machine or job.

    When a worker dies, Ray and all workers begin again at the last checkpoint, at most
    `config.restarts` times, fewer where a job has lost a node; the model is that of a training in
    which none died (within rounding, if there were fewer).

    Raises:
        UserError: fewer GPUs than workers; workers that died too often; or as `fit` does, from
            whichever worker it came.
        Stopped: by `progress`; worker 0 has saved its last step.
    """
    gpus = cards(torch.cuda.device_count())
    if 0 < gpus < config.workers:
        raise UserError(
            f"workers = {config.workers}: there are {gpus} GPU(s), one is needed a worker",
            remedy=f"use --workers {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
        )
    for left in reversed(range(config.restarts + 1)):
        try:
            with ray_for(config.workers, config.metrics_port) as private:
                _fit(private, gpus, dataset, run, config, identity, resume, progress)
            return
        except _Lost as loss:
            if not left:
                raise UserError(
                    f"workers died {config.restarts + 1} times, the last one of: {loss}",
                    remedy="see whether the machine has memory enough (fewer workers, a smaller "
                    "batch_size), then go on from the last checkpoint with --resume",
                ) from None
            resume = True


def _fit(
    private: Path,
    gpus: int,
    dataset: Path,
    run: Path,
    config: TrainingConfig,
    identity: dict[str, Any],
    resume: bool,
    progress: Callable[[Progress], None],
) -> None:
    """One attempt, on a Ray that runs. Raises `_Lost`, or what a worker raised."""
    import ray

    begin = Progress(0, config.members * config.passes, 0, 1)
    try:
        workers = _workers(config.workers, gpus, lambda: progress(begin))
        threads, size = threads_for(config.workers), len(workers)
        places = [str(each.resolve()) for each in (private / "meeting", dataset, run)]
        arguments = (*places, config, identity, resume, threads)
        title = f"{config.task} {config.model} seed {config.seed} rank"
        fits = [
            worker.fit.options(name=f"{title} {rank}").remote(rank, size, *arguments)
            for rank, worker in enumerate(workers)
        ]
        waiting, shown = fits, None
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_POLL)
            for fit in done:
                _check(fit, fits)
            at = ray.get(workers[0].standing.remote())
            if at is None:
                progress(begin)  # that a signal ends the work while no worker has anything to save
            elif at != shown:
                shown = at
                try:
                    progress(at)
                except Stopped:
                    workers[0].stop.remote()
                    ray.wait(fits[:1], timeout=_SAVING)
                    raise
    except ray.exceptions.RayError as error:
        raise _Lost(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _workers(wanted: int, gpus: int, waiting: Callable[[], None]) -> list[Any]:
    """As many workers as are wanted, or fewer where Ray has not, or no longer, room for all.

    Args:
        waiting: called now and then; it may raise.
    """
    import ray

    kind: Any = ray.remote(num_cpus=1, num_gpus=min(gpus, 1))(_Worker)
    kind = kind.options(scheduling_strategy="SPREAD", max_concurrency=2)
    while True:
        workers = [kind.remote() for _ in range(wanted)]
        greetings = [each.standing.remote() for each in workers]
        while len(ray.wait(greetings, num_returns=wanted, timeout=_POLL)[0]) < wanted:
            waiting()
            room = max(1, sum(_places(n["Resources"], gpus) for n in ray.nodes() if n["Alive"]))
            if room < wanted:  # one of them would wait for ever
                break
        else:
            ray.get(greetings)
            return workers
        for each in workers:
            ray.kill(each)
        wanted = room


def _places(has: dict[str, float], gpus: int) -> int:
    """Workers that a node of Ray can hold: each takes a core and, where there are any, a GPU."""
    return int(min(has.get("CPU", 0), has.get("GPU", 0)) if gpus else has.get("CPU", 0))


def _check(fit: Any, fits: list[Any]) -> None:
    """Raise what a worker raised, unless that is but the echo of another one's death."""
    import ray

    try:
        ray.get(fit)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, UserError):
            for other in ray.wait(fits, num_returns=len(fits), timeout=_FAREWELL)[0]:
                try:
                    ray.get(other)
                except ray.exceptions.RayTaskError as own:
                    cause = own.cause if disk_failed(own.cause) else cause
        raise cause from None
