"""Data-parallel training: long-lived Ray actors that share each batch over torch.distributed.

Own actors rather than Ray Train: a two-worker fit starts in about 3 s instead of 11 to 14, and the
loop is the one of a single worker, so that both give the same result within rounding.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from cluster.ray_session import cards, cores, ray_for
from training.config import TrainingConfig
from training.dataset import open_clouds
from training.ensemble import fit_members
from training.progress import Progress
from training.tensorboard import log_epochs


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
    def fit(
        self,
        rank: int,
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
        store = dist.FileStore(meeting, config.workers)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=config.workers)
        try:
            with log_epochs(Path(run), rank == 0) as log:
                fit_members(
                    Path(run),
                    open_clouds(Path(dataset), config.radiation, config.workers),
                    config,
                    identity=identity,
                    resume=resume,
                    peers=Group(),
                    progress=log,
                )
        finally:
            dist.destroy_process_group()


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

    Raises:
        UserError: fewer GPUs than workers; or as `fit` does, from whichever worker it came.
    """
    gpus = cards(torch.cuda.device_count())
    if 0 < gpus < config.workers:
        raise UserError(
            f"workers = {config.workers}: there are {gpus} GPU(s), one is needed a worker",
            remedy=f"use --workers {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
        )
    with ray_for(config.workers) as private:
        import ray

        kind: Any = ray.remote(num_cpus=1, num_gpus=min(gpus, 1))(_Worker)
        kind = kind.options(scheduling_strategy="SPREAD")
        workers = [kind.remote() for _ in range(config.workers)]
        threads = max(1, cores() // config.workers)
        places = [str(each.resolve()) for each in (private / "meeting", dataset, run)]
        arguments = (*places, config, identity, resume, threads)
        waiting = [w.fit.remote(rank, *arguments) for rank, w in enumerate(workers)]
        shown = 0
        while waiting:
            done, waiting = ray.wait(waiting, timeout=0.5)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            shown = _show(run, config, shown, progress)


def _show(
    run: Path, config: TrainingConfig, shown: int, progress: Callable[[Progress], None]
) -> int:
    """Report the epochs that worker 0 has written since `shown`."""
    try:
        with (run / "history.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        return shown
    for row in rows[shown:]:
        record = {name: float(value) for name, value in row.items()}
        progress(Progress(int(record["epoch"]), config.epochs, 1, 1, record))
    return len(rows)
