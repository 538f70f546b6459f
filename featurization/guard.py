"""Limits on a single crystal, so that none of them stops a job.

Three lines of defence, of which the first is `max_atoms` and `max_points`. The second is an alarm
clock, which ends whatever Python code is at work. The third is for native code that hangs: a
watchdog ends the process and leaves its mark, and the next attempt rejects the crystal.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from featurization.crystal import Reject


class Guard:
    """Watches the crystals of one rank; a context that holds the rank's `at-` file.

    In a thread other than the main one there are no alarms; the mark is left all the same.
    """

    def __init__(self, marker: Path, seconds: float) -> None:
        self._marker, self._seconds = marker, seconds
        self._armed = float("-inf")
        self._alarms = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Guard":
        self._mark = os.open(self._marker, os.O_WRONLY | os.O_CREAT, 0o644)
        self._dump = os.open(self._marker, os.O_WRONLY | os.O_APPEND)
        if self._alarms:
            self._before = signal.signal(signal.SIGALRM, self._alarm)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._alarms:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, self._before)
        os.close(self._mark)
        os.close(self._dump)
        self._marker.unlink(missing_ok=True)

    def rest(self) -> None:
        """What follows, such as reading and writing files, may take as long as it takes."""
        os.pwrite(self._mark, b" " * 19, 0)
        if self._alarms:
            faulthandler.cancel_dump_traceback_later()
            self._armed = float("-inf")

    @contextmanager
    def watching(self, record: int) -> Iterator[None]:
        """While one record is worked on.

        Raises:
            Reject: it takes too long.
        """
        os.pwrite(self._mark, b"%019d\n" % record, 0)
        if not self._alarms:
            yield
            return
        if (now := time.monotonic()) - self._armed > self._seconds:
            self._armed = now
            # Not before the alarm clock, whenever it was armed.
            faulthandler.dump_traceback_later(3 * self._seconds + 5, exit=True, file=self._dump)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
