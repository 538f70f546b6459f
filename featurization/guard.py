"""Limits on a single crystal, so that none of them stops a job.

Three lines of defence, of which the first is `max_atoms` and `max_points`. The second is an alarm
clock, which ends whatever Python code is at work. The third is for native code that never comes
back: it ends the process and leaves its mark, and the next attempt rejects the crystal. Both clocks
count the time of the processor, so that a busy machine or a suspended job harms no crystal.
"""

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from featurization.crystal import Reject


class Guard:
    """Watches the crystals of one rank; a context that holds the rank's `at-` file.

    In a thread other than the main one there are no clocks; the mark is left all the same.
    """

    def __init__(self, marker: Path, seconds: float) -> None:
        self._marker, self._seconds = marker, seconds
        self._clocks = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Guard":
        self._mark = os.open(self._marker, os.O_WRONLY | os.O_CREAT, 0o644)
        self._dump = os.open(self._marker, os.O_WRONLY | os.O_APPEND)
        if self._clocks:
            self._before = signal.signal(signal.SIGPROF, self._alarm)
            # Writes the traceback even if native code holds the interpreter's lock, and then lets
            # the signal do what it does by itself: end the process.
            faulthandler.register(signal.SIGVTALRM, file=self._dump, all_threads=False, chain=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._clocks:
            faulthandler.unregister(signal.SIGVTALRM)
            signal.signal(signal.SIGPROF, self._before)
        os.close(self._mark)
        os.close(self._dump)
        self._marker.unlink(missing_ok=True)

    def rest(self) -> None:
        """No crystal is to blame for what follows, such as writing a shard."""
        os.pwrite(self._mark, b" " * 19, 0)

    @contextmanager
    def watching(self, record: int) -> Iterator[None]:
        """While one record is worked on.

        Raises:
            Reject: it takes too long.
        """
        os.pwrite(self._mark, b"%019d\n" % record, 0)
        if not self._clocks:
            yield
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * self._seconds + 1)
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        raise Reject("guard", f"took longer than max_seconds = {self._seconds:g}")


class StopSignals:
    """Remembers SIGTERM and SIGUSR1, by which batch systems announce the end of a job."""

    def __init__(self) -> None:
        self.received = ""

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
