"""One driver a grid: a lock where the file system has locks, and a sign of life for all others.

The lock of `cluster.files.exclusive` does not reach other nodes on every parallel file system. The
driver therefore also writes `driver.json` every few seconds, in which `xtal ablate status` reads
how things stand. Another driver that finds it watches it for a while, by no clock but its own, and
goes on only if it stays the same; the old one, should it wake up, sees that and stops.
"""

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from cluster.files import exclusive, write_text

CLAIM = "driver.json"
_BEAT = 5.0  # s between signs of life
_SILENCE = 30.0  # s without one after which a driver is taken for dead


class Claim:
    """A driver's hold on a folder."""

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, out / CLAIM
        self._token = secrets.token_hex(8)
        self._news: dict[str, Any] = {}
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._live, daemon=True)

    def say(self, **news: Any) -> None:
        """What the next sign of life tells."""
        self._news = news

    def check(self) -> None:
        """Called before each line of the record.

        Raises:
            RunFailed: another driver has taken over.
        """
        there = read_claim(self._out)
        if there is not None and there["token"] != self._token:
            raise RunFailed(
                f"another driver has taken over {self._out}: {_name(there)}",
                remedy="let that one finish; this one had given no sign of life",
            )

    def _begin(self) -> None:
        self._write()
        self._beats.start()

    def _end(self) -> None:
        self._ended.set()
        if self._beats.ident is not None:
            self._beats.join()
            there = read_claim(self._out)
            if there is not None and there["token"] == self._token:
                self._path.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._ended.wait(_BEAT):
            there = read_claim(self._out)
            if there is not None and there["token"] != self._token:
                return
            with suppress(OSError):  # a full disk; the next beat may find room
                self._write()

    def _write(self) -> None:
        claim = {"token": self._token, **_here(), "at": round(time.time(), 3), **self._news}
        write_text(self._path, json.dumps(claim))


def read_claim(out: Path) -> dict[str, Any] | None:
    """What the driver at work in a folder last said; None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    try:
        claim = json.loads((out / CLAIM).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        claim = None
    if not isinstance(claim, dict) or not {"token", "host", "place", "pid"} <= claim.keys():
        raise UserError(
            f"{out / CLAIM} is damaged: it does not say which driver is at work",
            remedy="see that none is, then remove the file",
        )
    return claim


@contextmanager
def driving(out: Path) -> Iterator[Claim]:
    """Hold a grid's folder for this driver; make it if it is not there.

    Raises:
        UserError: another driver is at work there.
    """
    with exclusive(out):
        refuse_driven(out)
        claim = Claim(out)
        try:
            claim._begin()
            yield claim
        finally:
            claim._end()


def refuse_driven(out: Path) -> None:
    """Return if no driver is at work in a folder; one that may be dead is watched for a while.

    Raises:
        UserError: one is.
    """
    there = read_claim(out)
    if there is not None and not _is_dead(there):
        _watch(out, there)


def _watch(out: Path, there: dict[str, Any]) -> None:
    """Return when a driver has been silent for long enough."""
    deadline = time.monotonic() + _SILENCE
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = read_claim(out)
        if now is None:
            return
        if now != there:
            raise UserError(
                f"another driver is at work in {out}: {_name(now)}",
                remedy="wait until it ends, or end it; xtal ablate status shows how far it is",
            )


def _here() -> dict[str, Any]:
    """Where this process is: the pid means something only in the same place."""
    try:
        place = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place += os.readlink("/proc/self/ns/pid")
    except OSError:
        place = ""
    return {"host": platform.node(), "place": place, "pid": os.getpid()}


def _is_dead(there: dict[str, Any]) -> bool:
    """Whether a driver of this machine has ended, for certain."""
    here = _here()
    if not here["place"] or (there["host"], there["place"]) != (here["host"], here["place"]):
        return False
    return not Path(f"/proc/{there['pid']}").exists()


def _name(claim: dict[str, Any]) -> str:
    return f"process {claim['pid']} on {claim['host']}"
