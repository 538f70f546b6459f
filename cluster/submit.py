"""Jobs of a result: what will be submitted, exactly, and its submission.

Where srun, MPI or Ray own the allocation a template of `slurm/` is the job. Trainings that differ
in their seed alone, and parts of a grid, are an array of Python callables, by submitit, which this
file alone imports.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.attempt import jobs_folder, requeue_if_running, this_job
from cluster.errors import RunFailed, Stopped, UserError
from cluster.provenance import provenance
from cluster.site import Site, check_time, describe, write_setup
from cluster.slurm import record, seconds_of, start_of, submit

TEMPLATES = Path(__file__).resolve().parent.parent / "slurm"
_TIMEOUTS = 20  # as often submitit takes an element of an array up again after its time limit


@dataclass(frozen=True, slots=True)
class Plan:
    """One job: words for sbatch, of which no shell reads any."""

    verb: str
    result: Path
    words: tuple[str, ...]  # of the verb
    site: Site
    nodes: int
    time: str
    after: str | None = None  # a job that must have succeeded
    gathers: str | None = None  # an array that must have ended
    stamp: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f"))

    @property
    def jobs(self) -> Path:
        return jobs_folder(self.result)

    @property
    def log(self) -> Path:
        return self.jobs / f"{self.verb}-{self.stamp}.log"

    def sbatch(self) -> list[str]:
        """The command, word by word."""
        found = ["sbatch", "--parsable", "--export=ALL"]  # a site's custom may be NONE
        found += [f"--nodes={self.nodes}", f"--time={check_time(self.time)}"]
        found += [*self.site.sbatch_options(self.verb), f"--output={_literally(self.log)}"]
        found += self._dependencies()
        return [*found, str(TEMPLATES / f"{self.verb}.sbatch"), *self.words]

    def shown(self, array: int | None = None) -> str:
        """The command and what it finds in its environment, as a shell would take them.

        Args:
            array: elements that submitit submits instead.
        """
        names = [f"{k}={shlex.quote(v)}" for k, v in self.site.environment().items()]
        words = self.sbatch() if array is None else self.array_sbatch(array)
        lines = [" ".join([*names, shlex.join(words)])]
        if array is not None:
            each = [shlex.join(["xtal", self.verb, *words]) for words in self.elements(array)]
            lines += ["by submitit, whose elements run:", *(f"  {line}" for line in each)]
        if self.site.container:
            lines += [f"in the container of: {shlex.join(self.site.container)}"]
        if self.site.setup:
            lines += ["before the work, from the site file:", *(f"  {s}" for s in self.site.setup)]
        return "\n".join(lines)

    def start(self, array: int | None = None) -> str:
        """When SLURM expects to start it; nothing is submitted.

        Raises:
            UserError: SLURM would refuse it.
        """
        words = self.sbatch() if array is None else [*self.array_sbatch(array), "--wrap=true"]
        return start_of(words, clean_environment())

    def submit(self) -> str:
        """Submit it and note it in the folder of jobs; the job's number.

        Raises:
            UserError: SLURM refuses it.
        """
        self.jobs.mkdir(parents=True, exist_ok=True)
        more = self.site.environment() | write_setup(self.site, self.jobs)
        job = submit(self.sbatch(), clean_environment() | more)
        self._record(job, self.log)
        return job

    def elements(self, count: int) -> list[tuple[str, ...]]:
        """Words of the verb for each element of an array, which has one node.

        Trainings have the seeds 0 … `count` − 1, a grid has so many parts.
        """
        if self.verb == "ablate":
            return [(*self.words, "--part", f"{n}/{count}") for n in range(1, count + 1)]
        dataset, run, *rest = self.words
        seeds = range(count)
        return [(dataset, f"{run}/seed-{n}", *rest, "--seed", f"{n}", "--resume") for n in seeds]

    def place_of(self, words: Sequence[str]) -> str:
        """Where the work of an element is seen: of a part of a grid, its own folder."""
        if self.verb != "ablate":
            return words[1]
        number, _, count = words[-1].partition("/")
        return f"{words[1]}/parts/{number}-of-{count}"  # as ablation.parts has it

    def array_sbatch(self, count: int) -> list[str]:
        """What submitit tells sbatch of an array, in words for sbatch itself."""
        minutes = max(1, round(seconds_of(check_time(self.time)) / 60))
        words = self.site.sbatch_options(self.verb)
        return [
            "sbatch",
            f"--array=0-{count - 1}%{count}",
            "--nodes=1",
            f"--time={minutes}",
            f"--signal=USR2@{self.site.warning_seconds}",
            "--requeue",  # which some sites do not by themselves
            *(word for word in words if not word.startswith("--signal=")),
            *self._dependencies(),
        ]

    def submit_array(self, count: int) -> str:
        """Submit its `elements` as an array; its number.

        Raises:
            UserError: SLURM refuses it, or would read more into the name of a folder than a name.
        """
        import submitit

        if found := sorted({c for c in str(self.jobs) if c in "%'\"\\" or not c.isprintable()}):
            raise UserError(
                f"{str(self.jobs)!r}: an array cannot work below a folder with {found} in its name",
                remedy="give another folder, or leave out --array",
            )
        self.jobs.mkdir(parents=True, exist_ok=True)
        self.jobs.chmod(0o700)  # submitit keeps the callables in it
        more = write_setup(self.site, self.jobs)
        executor = submitit.SlurmExecutor(folder=self.jobs / "%j", max_num_timeout=_TIMEOUTS)
        options = dict(_split(word) for word in self.array_sbatch(count)[1:])
        for own in ("array", "signal"):  # which submitit words itself
            options.pop(own)
        cores = options.pop("cpus_per_task")
        executor.update_parameters(
            job_name=f"xtal-{self.verb}",
            nodes=int(options.pop("nodes")),
            time=int(options.pop("time")),
            ntasks_per_node=int(options.pop("ntasks_per_node")),
            cpus_per_task=int(cores),
            array_parallelism=count,
            # Since SLURM 22.05 a step does not have the CPUs of its job by itself.
            srun_args=[f"--cpus-per-task={cores}"],
            stderr_to_stdout=True,
            signal_delay_s=self.site.warning_seconds,
            setup=[
                *(f"export {k}={shlex.quote(v)}" for k, v in self.site.environment().items()),
                *self.site.setup,
            ],
            additional_parameters=options,
        )
        run = ["xtal"] if not self.site.container else [more["XTAL_CONTAINER"], "xtal"]
        chunks = [
            Element(words[1], self.place_of(words), (*run, self.verb, *words))
            for words in self.elements(count)
        ]
        try:
            with _outside():
                jobs = executor.map_array(run_element, chunks)
        except submitit.core.utils.FailedJobError as error:
            raise UserError(
                f"SLURM refuses the job: {error}", remedy="change the site file or the call"
            ) from None
        job = jobs[0].job_id.partition("_")[0]
        self._record(job, self.jobs / f"{job}_0" / f"{job}_0_0_log.out")
        return str(job)

    def _dependencies(self) -> list[str]:
        """Words for sbatch."""
        found = [f"afterok:{self.after}"] if self.after is not None else []
        found += [f"afterany:{self.gathers}"] if self.gathers is not None else []
        if not found:
            return []
        # A job whose condition can never be met would wait for ever.
        return [f"--dependency={','.join(found)}", "--kill-on-invalid-dep=yes"]

    def _record(self, job: str, log: Path) -> None:
        row: dict[str, Any] = {
            "job": job,
            "verb": self.verb,
            "result": str(self.result),
            "words": list(self.words),
            "nodes": self.nodes,
            "time": self.time,
            "after": self.after,
            "log": str(log),
            "site": describe(self.site),
            "provenance": provenance(),
        }
        record(self.jobs, row)


@dataclass(frozen=True, slots=True)
class Element:
    """What one element of an array runs, and where its work is seen."""

    result: str
    place: str
    words: tuple[str, ...]


class _Run:
    """What submitit calls, and asks for what to do after a time limit or a preemption."""

    def __call__(self, element: Element) -> int:
        # Requeueing is submitit's part; an attempt's to wait for a full disk, and to end a loop.
        words = [sys.executable, "-m", "cluster.attempt", "--no-requeue", element.result]
        self._child = subprocess.Popen([*words, element.place, "--", *element.words])
        code = self._child.wait()
        # Preempted by SIGTERM, to which submitit does not listen, or killed.
        if (code == Stopped.exit_code or code > 128) and (job := this_job()):
            requeue_if_running(job, killed=code > 128)
        if code:
            raise RunFailed(f"{shlex.join(element.words)} ended with {code}", remedy="see above")
        return code

    def checkpoint(self, element: Element) -> Any:
        """The same again, once the work has saved: it goes on from what is on disk."""
        import submitit

        self._child.send_signal(signal.SIGUSR1)
        with suppress(ChildProcessError):  # it has ended
            # Not Popen.wait, which this interrupts and whose lock it would wait for.
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(_Run(), element)


run_element = _Run()


def clean_environment() -> dict[str, str]:
    """This environment without what a surrounding job would tell the new one.

    What is the site file's to say does not come from here either: what is shown is all there is.
    """
    told = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|SBATCH_|XTAL_")
    return {name: value for name, value in os.environ.items() if not told.match(name)}


@contextmanager
def _outside() -> Iterator[None]:
    """Have `clean_environment`, where submitit runs sbatch."""
    before = dict(os.environ)
    try:
        for name in before.keys() - clean_environment().keys():
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def _literally(path: Path) -> str:
    # To SLURM, %j is a job's number and %% a percent sign; a backslash in the name ends that, and
    # is itself two.
    text = str(path)
    return text.replace("\\", "\\\\") if "\\" in text else text.replace("%", "%%")


def _split(word: str) -> tuple[str, Any]:
    name, given, value = word.removeprefix("--").partition("=")
    return name.replace("-", "_"), value if given else True
