"""Where a training stands, and how fast it goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster import memory
from cluster.errors import Stopped
from featurization.guard import StopSignals


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the steps that one worker took in an epoch, since it began or went on."""

    clouds_per_second: float  # of all workers together
    data_wait: float  # part of the time in which the network had no batch, 0 to 1
    resident_gib: float  # memory of this process
    gpu_gib: float  # the most of its GPU, 0 without one


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands; `epoch` is finished when `step == steps`."""

    epoch: int
    epochs: int
    step: int
    steps: int
    record: dict[str, float] | None = None  # the epoch's row of history.csv when finished
    speed: Speed | None = None  # when finished


@dataclass
class Stopwatch:
    """Counts clouds and seconds of steps, and of these the seconds that batches took to come."""

    clouds: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """A step begins."""
        self._since = time.perf_counter()

    def has_batch(self) -> None:
        """Its batch is there."""
        self.waited += time.perf_counter() - self._since

    def stop(self, clouds: int) -> None:
        """It is over."""
        self.seconds += time.perf_counter() - self._since
        self.clouds += clouds

    def speed(self) -> Speed:
        """What was counted."""
        on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        seconds = max(self.seconds, 1e-9)
        return Speed(
            self.clouds / seconds, self.waited / seconds, memory.resident() / 2**30, on_gpu / 2**30
        )


@contextmanager
def stopping(run: Path, tell: Callable[[Progress], None]) -> Iterator[Callable[[Progress], None]]:
    """`tell`, then `Stopped` after SIGTERM or SIGUSR1; the loop has then saved its step in `run`.

    Before the first call there is no step to save, and a signal raises `Stopped` at once, wherever
    the work is. From then on it waits for the next call.
    """

    def stop(name: str) -> None:
        raise Stopped(
            f"stopped by {name}; all steps so far are saved in {run}",
            remedy="go on with --resume",
        )

    with StopSignals(then=stop) as signals:

        def told(at: Progress) -> None:
            signals.then = None
            tell(at)
            if signals.received:
                stop(signals.received)

        try:
            yield told
        except Stopped:
            raise
        except Exception:  # what compiled code makes of `Stopped`, where it breaks into it
            if signals.received and signals.then is not None:
                stop(signals.received)
            raise
