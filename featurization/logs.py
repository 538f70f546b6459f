"""One log a rank: OUT/logs/rank-00000.log. A log that cannot be written stops nothing."""

import contextlib
import os
import platform
import traceback
from datetime import UTC, datetime
from pathlib import Path

from cluster.mpi import Ranks

FOLDER = "logs"


class RankLog:
    """A context that appends to the log of this rank."""

    def __init__(self, out: Path, ranks: Ranks, attempt: int) -> None:
        self._path = out / FOLDER / f"rank-{ranks.rank:05d}.log"
        self._first = (
            f"attempt {attempt}, rank {ranks.rank} of {ranks.size}, "
            f"process {os.getpid()} on {platform.node()}"
        )

    def __enter__(self) -> "RankLog":
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self.say(self._first)
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        self.say("ends" if error is None else f"ends by {type(error).__name__}: {error}")

    def say(self, text: str) -> None:
        """A line with the time (UTC)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"{now} {text}\n")

    def say_traceback(self) -> None:
        """The exception that is being handled."""
        self.say(traceback.format_exc().rstrip())
