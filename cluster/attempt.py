"""One attempt of a batch job: `python -m cluster.attempt RESULT -- COMMAND …`.

Every command of `xtal` goes on from what is on disk, so that a job survives by being run again:

- SIGUSR1, which `sbatch --signal=B:USR1@120` sends before the time limit, is passed on; the job is
  requeued once the command has stopped. So it is after SIGTERM, by which SLURM warns of preemption,
  unless the job was cancelled; and after a command that a signal ended, as `srun` says of a step
  when a node is lost or memory runs out.
- A command that fails because the disk is full, over quota or out of reach (exit code 74), or while
  it is, is run again as soon as it is not, within `WAIT` seconds of the last progress.
- Two attempts of a job that left RESULT as they found it end the job, instead of a third.

The attempts of a job are lines of `RESULT.jobs/attempts.jsonl`. Of an element of an array, which
another program requeues, it is `cluster.attempt --no-requeue RESULT PLACE -- COMMAND …`, where
PLACE is the part of RESULT that the element works in.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from cluster.descendants import adopt_orphans, descendants, end_all
from cluster.errors import DiskFailed, RunFailed, Stopped, UserError
from cluster.files import disk_explained, temporary_folder
from cluster.marks import mark, note_attempt
from cluster.ray_session import remove_orphans
from cluster.slurm import kill_wait, look

WAIT = 600.0  # longest wait for a full disk or a file system out of reach, s
_REQUEUE = Stopped.exit_code
_DISK = DiskFailed.exit_code
_BAD_INPUT = UserError.exit_code
# What a killed step leaves on other nodes has gone by then; a new one met it and died of it.
_SETTLE = 10.0  # s
_ROOM = 1 << 22  # bytes that must fit before work goes on
_FAREWELL = 2.0  # before SLURM kills what is left of a job, s


def jobs_folder(result: Path) -> Path:
    """Beside a result: what its jobs leave, so that the result has its own files alone."""
    return result.absolute().with_name(f"{result.absolute().name}.jobs")


def trouble(folder: Path, patience: float = 20.0) -> str | None:
    """Why nothing can be written into `folder` now, or None; that nothing answers is a reason."""
    said: list[str | None] = [f"{folder} does not answer for {patience:.0f} s"]

    def probe() -> None:
        path = folder / f".probe-{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("wb") as stream:
                    stream.write(b"\0" * _ROOM)
                    stream.flush()
                    os.fsync(stream.fileno())
            finally:
                path.unlink(missing_ok=True)
            said[0] = None
        except OSError as error:
            said[0] = f"cannot write to {folder}: {error.strerror}"

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(patience)
    return said[0]


class Attempt:
    """Runs a command, passes signals on to it, and runs it again after trouble with a disk.

    Args:
        folders: where the command must be able to write.
        mark: something else once there was progress.
    """

    def __init__(
        self, folders: Sequence[Path], command: Sequence[str], mark: Callable[[], str] = str
    ) -> None:
        self._folders, self._command, self._mark = folders, command, mark
        self._child: subprocess.Popen[bytes] | None = None
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        # By which SLURM warns submitit's part of an array, and where it can every process of it.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGTERM and this_job():
            threading.Thread(target=self._leave_in_time, daemon=True).start()
        if self._child is not None:
            # Not SIGTERM, at which srun kills all ranks before they have saved.
            self._child.send_signal(signal.SIGUSR1)

    def _leave_in_time(self) -> None:
        """End the command of a job that SLURM is about to kill: its private files are removed."""
        with suppress(RunFailed, UserError):
            time.sleep(max(0.0, kill_wait() - _FAREWELL))
            if look(this_job()).state != "RUNNING" and self._child is not None:
                self._child.kill()

    def run(self) -> int:
        """The command's exit code, 128 + signal if a signal ended it.

        Raises:
            RunFailed: the disk was full, or the file system out of reach, for too long.
        """
        found, left, pause = None, 0.0, 1.0
        self.wait_for_disks()
        while True:
            if self.received:
                return 128 + self.received
            others = descendants()  # of the site's `setup`
            self._child = subprocess.Popen(self._command)
            if self.received:  # it came in between
                self._child.send_signal(signal.SIGUSR1)
            code = self._child.wait()
            end_all(but=others)  # such as Ray, whose driver was killed
            remove_orphans()
            code = code if code >= 0 else 128 - code
            if code in (0, _REQUEUE, _BAD_INPUT) or self.received:
                return code
            if code != _DISK and not self._trouble():
                return code
            self.wait_for_disks()
            # It may have given back its room, and need as much again.
            if (now := self._mark()) != found:
                found, left, pause = now, WAIT, 1.0
            if pause > left:
                return code
            say(f"the command failed for its disk (exit code {code}); again in {pause:.0f} s")
            self._rest(pause)
            left, pause = left - pause, min(2 * pause, 60.0)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.received and time.monotonic() < end:
            time.sleep(0.2)

    def _trouble(self) -> str | None:
        return next((found for each in self._folders if (found := trouble(each))), None)

    def wait_for_disks(self) -> None:
        """Return once something can be written into each folder, or a signal has come.

        Raises:
            RunFailed: it cannot for too long.
        """
        end, pause, said = time.monotonic() + WAIT, 1.0, ""
        while (found := self._trouble()) and not self.received:
            if found != said:
                said = found
                say(f"{found}; waiting up to {WAIT:.0f} s")
            if time.monotonic() + pause > end:
                raise RunFailed(
                    f"{found}, for {WAIT:.0f} s now",
                    remedy="make room, or mend the file system, and submit again: all work is safe",
                )
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def this_job() -> str:
    """The number of this job, of an element of an array with the element's; empty outside."""
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) and os.environ.get("SLURM_JOB_ID"):
        # The number of one of the elements is that of the whole array.
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def _is_running(job: str) -> bool:
    """Whether it has not been cancelled; a controller that does not answer is asked again."""
    for pause in (0, 5, 10, 20, 40):
        time.sleep(pause)
        with suppress(RunFailed):
            if (state := look(job).state) != "UNKNOWN":
                return state == "RUNNING"
    say(f"SLURM does not say what became of job {job}: submit it again")
    return False


def requeue_if_running(job: str, *, killed: bool) -> None:
    """Put this job back into the queue, unless it was cancelled.

    Args:
        killed: its work has not ended by itself.

    Raises:
        RunFailed: SLURM refuses.
    """
    if killed:
        time.sleep(_SETTLE)
    # SLURM also warns of a preemption by SIGTERM; a cancelled job runs no more.
    if _is_running(job):
        _requeue(job)


def _requeue(job: str) -> None:
    """Put this job back into the queue, which ends this process; it returns if SLURM does not.

    Raises:
        RunFailed: SLURM refuses.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which SLURM ends this attempt
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(
            f"job {job} cannot be requeued: {done.stderr.strip()}",
            remedy="submit it again: it goes on where it stopped",
        )
    say(f"job {job} is requeued and goes on where it stopped")
    time.sleep(60)


def say(text: str) -> None:
    """A line in the log of the job."""
    with suppress(OSError):  # the log may lie on the disk that is full
        print(f"xtal: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Exit code of the command; outside of a SLURM job nothing is requeued."""
    parser = argparse.ArgumentParser(prog="python -m cluster.attempt")
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("result", type=Path)
    parser.add_argument("place", type=Path, nargs="?")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, command = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if not command:
        parser.error("give a command after --")
    adopt_orphans()
    jobs, place, job = jobs_folder(given.result), given.place or given.result, this_job()
    # Not tempfile's, which passes over a full one.
    attempt = Attempt([jobs, temporary_folder()], command, lambda: mark(place))
    try:
        attempt.wait_for_disks()
        if job and not attempt.received:
            jobs.mkdir(parents=True, exist_ok=True)
            with disk_explained(jobs):
                note_attempt(jobs, job, mark(place))
        code = attempt.run()
        stopped = code == _REQUEUE or (attempt.received and code not in (0, _BAD_INPUT))
        if job and not given.no_requeue and (stopped or code > 128):
            requeue_if_running(job, killed=not stopped)
    except (RunFailed, UserError) as error:
        say(str(error))
        sys.exit(1)
    sys.exit(code)


if __name__ == "__main__":
    main()
