"""What Prometheus sees of trainings."""

from collections.abc import Callable
from dataclasses import asdict

from cluster.gauges import Gauges
from training.config import TrainingConfig
from training.objective import standing
from training.progress import Progress


class TrainingGauges:
    """Of one process that trains, one training after the other.

    Args:
        rank: among the workers that share its batches.
    """

    def __init__(self, rank: int = 0) -> None:
        self._gauges, self._rank = Gauges(), str(rank)

    def following(self, config: TrainingConfig, arm: str = "none") -> Callable[[Progress], None]:
        """A progress callback of one training.

        It tells `epoch` and `step`; of a finished epoch its losses, metrics and speed, and
        `best_validation`: the best so far of what chooses the epoch (AUROC, of a number −loss).
        """
        best = float("-inf")
        about = {"task": config.task, "model": config.model, "arm": arm}

        def show(at: Progress) -> None:
            nonlocal best
            numbers = {"epoch": float(at.epoch), "step": float(at.step)} | (at.record or {})
            numbers |= asdict(at.speed) if at.speed else {}
            self._gauges.set(numbers, rank=self._rank)
            if at.record and self._rank == "0":
                best = max(best, standing(at.record, config)[0])
                self._gauges.set({"best_validation": best}, **about)

        return show
