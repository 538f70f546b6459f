"""Processes that come of this one: none outlives it, whatever forks them and whoever is killed."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import psutil

_SUBREAPER, _DEATH_SIGNAL = 36, 1  # PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG of prctl(2)
_LOOK = 0.5  # s
_PATIENCE = 30.0  # for those that wait for a disk, which no signal ends, s


def adopt_orphans() -> None:
    """Become the parent of descendants whose own is gone, in place of the machine's first process.

    A batch system that follows parents to the processes of a job then finds them, too.
    """
    if sys.platform == "linux":
        _prctl(_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """End this process as soon as the one that forked it is gone, even if that was killed.

    A process of a pool waits for work for ever, otherwise.

    Args:
        parent: its number, seen before the fork: it may be gone already.
    """
    if sys.platform == "linux":
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants() -> set[psutil.Process]:
    """All that are there now."""
    return set(psutil.Process().children(recursive=True))


def end_all(but: Collection[psutil.Process] = ()) -> None:
    """Kill all descendants, until there are none or they do not end.

    Args:
        but: those that are left alone.
    """
    until = time.monotonic() + _PATIENCE
    while (found := descendants().difference(but)) and time.monotonic() < until:
        _kill(found)
        psutil.wait_procs(found, timeout=1)


@contextmanager
def none_without(head: str, processes: Collection[psutil.Process]) -> Iterator[None]:
    """For the duration of a `with` block: when the one of this name is gone, kill the others.

    What comes of them is killed, too.
    """
    heads = {each for each in processes if _is_named(each, head)}
    others, over = set(processes).difference(heads), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK):
            if not all(map(_lives, heads)):
                _kill(others.union(*map(_below, others)))
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _is_named(process: psutil.Process, name: str) -> bool:
    try:
        return bool(process.name() == name)
    except psutil.NoSuchProcess:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _below(process: psutil.Process) -> set[psutil.Process]:
    try:
        return set(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _kill(processes: Collection[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
