"""Limits on a single crystal, so that none of them stops a job.

Memory is bounded by what is let in: 8 MiB of text (`validation.MAX_BYTES`), `max_atoms`,
`max_points`, and a tolerance that fits the cell (`cells`). With the defaults the worst crystals
that are taken need, beside the 190 MiB of a rank: 210 MiB for 8 MiB of JSON or 145 for as much
CIF, 100 for the symmetry of 2,000 atoms, 35 for 100,000 points. The most that settings allow is
2 GiB for 10,000 atoms and 190 MiB for a million points with four radiations.

Time is bounded by three lines of defence, of which the first is the same. The second is an alarm
clock, which ends whatever Python code is at work; what that code, or compiled code around it, makes
of the alarm does not matter, for after an alarm nothing that comes of the crystal is believed. The
third is for native code that never comes back: it ends the process and leaves its mark, and the
next attempt rejects the crystal. Both clocks count the time of the processor, so that a busy
machine or a suspended job harms no crystal.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from featurization.crystal import Reject

# An alarm that was lost, as in a destructor, is repeated as often, s.
_AGAIN = 1.0


class Guard:
    """Watches the crystals of one rank; a context that holds the rank's `at-` file.

    In a thread other than the main one there are no clocks; the mark is left all the same.
    """

    def __init__(self, marker: Path, seconds: float) -> None:
        self._marker, self._seconds = marker, seconds
        self._clocks = threading.current_thread() is threading.main_thread()
        self._at_work = self._late = False

    def __enter__(self) -> "Guard":
        self._mark = os.open(self._marker, os.O_WRONLY | os.O_CREAT, 0o644)
        self._dump = os.open(self._marker, os.O_WRONLY | os.O_APPEND)
        if self._clocks:
            self._before = signal.signal(signal.SIGPROF, self._alarm)
            self._unraised, sys.unraisablehook = sys.unraisablehook, self._lost
            # Writes the traceback even if native code holds the interpreter's lock, and then lets
            # the signal do what it does by itself: end the process.
            faulthandler.register(signal.SIGVTALRM, file=self._dump, all_threads=False, chain=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._clocks:
            faulthandler.unregister(signal.SIGVTALRM)
            signal.signal(signal.SIGPROF, self._before)
            sys.unraisablehook = self._unraised
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
            Reject: it takes too long, in place of whatever else it came to by then.
        """
        os.pwrite(self._mark, b"%019d\n" % record, 0)
        if not self._clocks:
            yield
            return
        self._at_work, self._late = True, False
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * self._seconds + 1)
        signal.setitimer(signal.ITIMER_PROF, self._seconds, _AGAIN)
        try:
            try:
                yield
            finally:
                self._at_work = False
        except Exception:
            if not self._late:
                raise
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        if self._late:
            raise self._reject()

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if self._at_work:
            self._late = True
            # Where it is raised decides what becomes of it: a broad `except` takes it for a fault
            # of the crystal, and compiled code comes back with a SystemError.
            raise self._reject()

    def _lost(self, unraisable: "sys.UnraisableHookArgs") -> None:
        # An alarm that struck in a destructor or a callback of the interpreter strikes again.
        if not (self._late and isinstance(unraisable.exc_value, Reject)):
            self._unraised(unraisable)

    def _reject(self) -> Reject:
        return Reject("guard", f"took longer than max_seconds = {self._seconds:g}")


class StopSignals:
    """Remembers SIGTERM and SIGUSR1, by which batch systems announce the end of a job.

    Args:
        then: also called with the signal's name, as long as it is not set to None; it may raise.
    """

    def __init__(self, then: Callable[[str], None] | None = None) -> None:
        self.received = ""
        self.then = then

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
        if self.then is not None:
            self.then(self.received)
