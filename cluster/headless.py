"""Requeues a job whose first node is lost: `python -m cluster.headless JOB LOG`, on another one.

With --no-kill SLURM takes a lost node out of a job and lets the others go on. If it was the first,
which has the batch step, nobody is left to work or to requeue, and the others would be held until
the time limit.
"""

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.attempt import requeue_if_running
from cluster.errors import RunFailed
from cluster.files import append_line
from cluster.slurm import first_node_lost

_PERIOD = 15.0  # s between two questions to the controller
# Ray sets the limits of a step by its own counts; none must wait for the end of another.
_SRUN = ("srun", "--nodes=1", "--ntasks=1", "--overlap", "--mem=0", "--quiet")


def step(node: str, cpus: int, words: Sequence[str], **more: Any) -> "subprocess.Popen[bytes]":
    """A step of the job on one node, that reads from a pipe and whose end is ordered by it."""
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_CPU_BIND"}
    return subprocess.Popen(
        [*_SRUN, f"--nodelist={node}", f"--cpus-per-task={cpus}", *words],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        **more,
    )


class Guard:
    """The first node's side: one on another node, on the next one if that is lost.

    Args:
        names: nodes of the job.
        log: what the guard has to say, in the shared folder; the job's own log has nobody to write.
    """

    def __init__(self, job: str, names: Sequence[str], log: Path) -> None:
        self._job, self._names, self._log = job, list(names[1:]), log
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", __name__, self._job, str(self._log)]
        return step(self._names[0], 1, words)

    def lose(self, name: str) -> None:
        """Take note of a lost node."""
        here = self._names[0]
        self._names.remove(name)
        if name == here and self._names:
            self.end()
            self._process = self._start()

    def end(self) -> None:
        """Tell it that all is well."""
        try:
            self._process.communicate(b"end\n", timeout=5)
        except (subprocess.TimeoutExpired, OSError):
            self._process.terminate()
            self._process.wait()


def main() -> None:
    """Return once told to by a line on standard input, whose end alone says nothing."""
    job, log = sys.argv[1], Path(sys.argv[2])
    listening = True
    while True:
        if select.select([sys.stdin.fileno()] if listening else [], [], [], _PERIOD)[0]:
            if os.read(sys.stdin.fileno(), 64):
                return
            listening = False  # the first node may be gone
            continue
        with suppress(RunFailed):  # the controller does not answer: it is asked again
            if lost := first_node_lost(job):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                append_line(log, f"{now}: {lost}, where job {job} began, is lost; it is requeued")
                requeue_if_running(job, killed=True)


if __name__ == "__main__":
    main()
