"""What SLURM knows of jobs: squeue, scontrol and, where there is accounting, sacct."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from cluster.files import append_line, whole_lines

RECORD = "jobs.jsonl"
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN",
}  # fmt: skip
_SECONDS = 60  # a controller under load answers slowly
_FIELDS = ("JobID", "State", "Elapsed", "NodeList", "Reason", "ExitCode")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as SLURM sees it."""

    id: str
    state: str  # as SLURM spells it; UNKNOWN once nothing remembers it
    elapsed: str = ""
    nodes: str = ""
    reason: str = ""
    exit_code: str = ""
    restarts: str = ""

    @property
    def over(self) -> bool:
        return self.state in _OVER


def ask(words: Sequence[str]) -> str:
    """What a SLURM command prints.

    Raises:
        UserError: there is no SLURM here.
        RunFailed: the command fails.
    """
    try:
        done = _run(words)
    except FileNotFoundError:
        raise UserError(
            f"there is no {words[0]} here", remedy="run this on a login node of a SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{words[0]} does not answer", remedy="try again later") from None
    if done.returncode:
        raise RunFailed(f"{words[0]}: {done.stderr.strip()}", remedy="see what SLURM says")
    return done.stdout


def _run(words: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    # srun would take in the rest of a loop's input.
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
        **more,
    )


def look(id: str) -> Job:
    """A job's state, from whoever still remembers it: the controller, then the accounting.

    Raises:
        RunFailed: neither answers.
    """
    try:
        return parse_show_job(ask(["scontrol", "show", "job", id, "--oneliner"]))
    except RunFailed as error:
        controller = error
    try:
        words = ["sacct", "-n", "-P", "-X", "-j", id, f"--format={','.join(_FIELDS)}"]
        return parse_sacct(ask(words), id)
    except (RunFailed, UserError):  # no accounting
        if "Invalid job id" not in controller.problem:  # as of one forgotten after MinJobAge
            raise controller from None
        return Job(id, "UNKNOWN")


def parse_sacct(text: str, id: str) -> Job:
    """A job in what sacct says of it; of an array, `_telling`'s."""
    rows = [line.split("|") for line in text.splitlines()]
    rows = [row for row in rows if len(row) == len(_FIELDS)]
    rows = [row for row in rows if id in (row[0], row[0].partition("_")[0])]
    if not rows:
        return Job(id, "UNKNOWN")
    # A state may have more words: CANCELLED by 1000.
    states = [row[1].split()[0] for row in rows]
    at = _telling(states)
    state, (_, _, elapsed, nodes, reason, exit_code) = states[at], rows[at]
    return Job(id, state, elapsed, nodes, "" if reason == "None" else reason, exit_code)


def parse_show_job(text: str) -> Job:
    """The first job of `scontrol show job --oneliner`; of an array, `_telling`'s."""
    # A path in it may have line breaks.
    parts = re.split(r"^(?=JobId=\d)", text, flags=re.MULTILINE)[1:]
    rows = [_pairs(part.partition(" Command=")[0]) for part in parts]
    if not rows:
        raise RunFailed("scontrol says nothing", remedy="give the number of a job")
    row = rows[_telling([row["JobState"] for row in rows])]
    reason = row.get("Reason", "")
    begun = row.get("StartTime") != "Unknown"  # else its RunTime is since 1970
    return Job(
        row.get("ArrayJobId", row["JobId"]),
        row["JobState"],
        row.get("RunTime", "") if begun else "",
        row.get("NodeList", "").replace("(null)", ""),
        "" if reason == "None" else reason,
        row.get("ExitCode", ""),
        row.get("Restarts", ""),
    )


def _telling(states: Sequence[str]) -> int:
    """Which of several elements tells most: the first that runs, is not over, or went wrong."""
    return min(
        range(len(states)),
        key=lambda at: (
            states[at] != "RUNNING",
            Job("", states[at]).over,
            states[at] == "COMPLETED",
        ),
    )


def _pairs(line: str) -> dict[str, str]:
    return {str(name): str(value) for name, value in re.findall(r"(\w+)=(\S*)", line)}


def first_node_lost(id: str) -> str:
    """The node that had the batch step of a job, if SLURM has taken it out of the job; else empty.

    Raises:
        RunFailed: the controller does not answer.
    """
    row = _pairs(ask(["scontrol", "show", "job", id, "--oneliner"]).partition(" Command=")[0])
    first, nodes = row.get("BatchHost", ""), row.get("NodeList", "")
    if row.get("JobState") != "RUNNING" or not first:
        return ""
    return "" if first in ask(["scontrol", "show", "hostnames", nodes]).split() else first


def kill_wait() -> float:
    """Seconds between the SIGTERM that ends a job and the SIGKILL.

    Raises:
        RunFailed: the controller does not answer.
    """
    found = re.search(r"^KillWait\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    return float(found[1]) if found else 30.0


def cancel(ids: Sequence[str]) -> None:
    """End jobs; those that have ended are left alone."""
    if ids:
        ask(["scancel", *ids])


def submit(words: Sequence[str], environment: dict[str, str]) -> str:
    """Run sbatch; the job's number.

    Raises:
        UserError: SLURM refuses it.
        RunFailed: it does not answer.
    """
    said = _sbatch(words, environment).stdout.strip()
    # A site may greet first; with several clusters SLURM names this one after the number.
    job = said.rpartition("\n")[2].partition(";")[0]
    if not job.isdigit():
        remedy = "see squeue whether the job is there; else try again"
        raise RunFailed(f"sbatch gives no number of a job: {said!r}", remedy=remedy)
    return job


def start_of(words: Sequence[str], environment: dict[str, str]) -> str:
    """When SLURM expects to start the job of an sbatch line, which is not submitted by this.

    Raises:
        UserError: SLURM would refuse it: account, quality of service, limits, licences, ….
        RunFailed: it does not answer.
    """
    done = _sbatch([words[0], "--test-only", *words[1:]], environment)
    found = re.search(r"to start at (\S+)", done.stderr)
    return found[1] if found else ""


def _sbatch(words: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        done = _run(words, env=environment)
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch here", remedy="run this on a login node of a SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailed(
            "sbatch does not answer", remedy="see squeue whether the job is there; else try again"
        ) from None
    if done.returncode:
        said = re.sub("^(sbatch: error|allocation failure): ", "", done.stderr.strip(), flags=re.M)
        raise UserError(f"SLURM refuses the job: {said}", remedy="change the site file or the call")
    return done


def partition_limits(name: str | None) -> dict[str, str]:
    """Limits of a partition, of the default one if `name` is None; empty if SLURM has none."""
    for line in ask(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        found = _pairs(line)
        if found.get("PartitionName") == name or (name is None and found.get("Default") == "YES"):
            return found
    return {}


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes of a partition that are alike."""

    nodes: int
    cores: int  # as SLURM counts CPUs
    memory: int  # MiB
    gpus: int
    features: frozenset[str]  # that a constraint can ask for


def node_kinds(partition: str | None) -> list[Kind]:
    """What the nodes of a partition have, whatever their state."""
    if partition is None:
        return []
    rows = ask(["sinfo", "-h", "-e", "-p", partition, "-o", "%D %c %m %G %f"]).splitlines()
    return [parse_kind(row) for row in rows if row.strip()]


def parse_kind(row: str) -> Kind:
    """A line of `sinfo -o "%D %c %m %G %f"`."""
    nodes, cores, memory, gres, features = row.split(maxsplit=4)
    known = frozenset(features.split(","))
    # A + after a number says that there are larger ones.
    return Kind(int(nodes), int(cores.rstrip("+")), int(memory.rstrip("+")), gpus_of(gres), known)


def gpus_of(gres: str) -> int:
    """GPUs in a list of generic resources: gpu:a100:4(S:0-1),nvme:1 has 4, gpu has 1, (null) 0."""
    kinds = [each.partition("(")[0].split(":") for each in gres.split(",")]
    counts = [kind[-1] for kind in kinds if kind[0] == "gpu"]
    return sum(int(count) if count.isdigit() else 1 for count in counts)


def seconds_of(time: str) -> float:
    """Seconds of a time limit as SLURM writes it: MM, MM:SS, HH:MM:SS, D-HH:MM:SS, UNLIMITED."""
    if time in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts += [0] * (3 - len(parts))  # D-HH
    elif len(parts) == 1:
        parts = [0, *parts, 0]  # minutes
    elif len(parts) == 2:
        parts = [0, *parts]
    hours, minutes, seconds = parts
    return int(days or 0) * 86400.0 + hours * 3600 + minutes * 60 + seconds


def record(jobs: Path, row: dict[str, Any]) -> None:
    """Note a submitted job in a folder of jobs."""
    jobs.mkdir(parents=True, exist_ok=True)
    append_line(jobs / RECORD, json.dumps(row))


def recorded(jobs: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted, oldest first."""
    path = jobs / RECORD
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []
