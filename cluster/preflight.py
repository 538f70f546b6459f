"""Looks before a job is submitted, on the login node: what would fail later, with its remedy."""

import fcntl
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.attempt import trouble
from cluster.errors import RunFailed, UserError
from cluster.site import Site
from cluster.slurm import Kind, ask, node_kinds, partition_limits, recorded, seconds_of
from cluster.submit import clean_environment

# Folders of these kinds are seen by one machine alone.
_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_LOCAL = {"overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs"}  # unless others mount them
_COUNTED = {"nodes", "constraint", "cores", "memory", "gpus"}
_PROBE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found; `remedy` is empty if all is well."""

    what: str
    said: str
    remedy: str = ""
    fatal: bool = False  # the job would fail for certain

    @property
    def lack(self) -> bool:
        """Too few nodes are like that, in whatever state."""
        return bool(self.remedy) and self.what in _COUNTED


def preflight(site: Site, verb: str, jobs: Path, nodes: int, time: str) -> Iterator[Finding]:
    """Check the folder, the file system, the limits of the partition and the Python of the jobs."""
    if (found := trouble(jobs)) is not None:
        yield Finding("folder", found, "give a folder that you may write to, or make room", True)
        return
    yield _file_system(jobs)
    yield _locks(jobs)
    # Of several partitions SLURM takes one: it is enough that one of them suits.
    names = (site.partition or "").split(",")
    each = [list(_limits(site, name or None, verb, nodes, time)) for name in names]
    yield from next((found for found in each if not any(one.remedy for one in found)), each[0])
    if site.metrics and nodes == 1 and verb != "featurize":
        said = "a job of one node has Ray for itself, without dashboard and numbers for Prometheus"
        yield Finding("metrics", said, "give --nodes 2, or follow it by xtal watch")
    yield _python()


def living_job(folders: Sequence[Path], after: str | None) -> Finding | None:
    """A job of these folders of jobs that would be at work beside a new one.

    Args:
        after: the job that the new one waits for; older ones of the folders end before it, too.
    """
    rows = [(row["job"], each) for each in folders for row in recorded(each)]
    if not rows:
        return None
    states = "--states=PENDING,RUNNING,SUSPENDED"
    alive = set(ask(["squeue", "--noheader", states, "--format=%F"]).split())  # of arrays: once
    job, folder = max(rows, key=lambda row: (row[0] in alive, int(row[0])))
    if job not in alive or (after is not None and after.partition("_")[0] == job):
        return None
    result = folder.with_name(folder.name.removesuffix(".jobs"))
    remedy = f"wait until it has ended, end it by xtal cancel {shlex.quote(str(result))}, "
    said = f"job {job} of {result} waits or runs"
    return Finding("jobs", said, f"{remedy}or give --after {job}", True)


def probe_node(site: Site, jobs: Path, setup: dict[str, str]) -> Finding:
    """Start two tasks on a compute node: are folder and Python there, do the ranks of MPI meet?

    It waits for a node at most two minutes.
    """
    script = (
        'echo began; if [ -n "${XTAL_SETUP:-}" ]; then . "$XTAL_SETUP"; fi; '
        'in=${XTAL_CONTAINER:+"$XTAL_CONTAINER"}; ${in:+"$in"} true || exit 6; '
        '${in:+"$in"} test -d "$0" || exit 3; '
        'place=${TMPDIR:-/tmp}; { mkdir -p "$place" && test -w "$place"; } || exit 5; '
        "${in:+\"$in\"} python -c 'from cluster.mpi import ranks; ranks()' || exit 4; "
        '${in:+"$in"} xtal --help >/dev/null || exit 4'
    )
    tasks = min(2, site.cores_per_node)
    words = ["srun", "--nodes=1", f"--ntasks={tasks}", "--time=5", "--quiet", f"--mpi={site.mpi}"]
    words += site.where()
    try:
        done = subprocess.Popen(
            [*words, "bash", "-c", script, str(jobs)],
            env=clean_environment() | site.environment() | setup,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        return Finding("compute node", "there is no srun here", "run this on a login node", True)
    try:
        said, complaint = done.communicate(timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        done.terminate()  # not killed: srun gives its nodes back
        said, complaint = done.communicate()
        if not said:
            waited = f"none was free within {_PROBE_SECONDS} s"
            return Finding("compute node", waited, "submit anyway")
        done.returncode = 4
    remedies = {
        3: ("does not see the folder", "give a folder on the shared file system"),
        5: ("cannot write temporary files", "set scratch to a folder that you may write to there"),
        6: ("cannot start the container", "see what it says; container in the site file"),
        4: (
            "cannot import this package or its MPI",
            "put the virtual environment on the shared file system and activate it in setup; build "
            "mpi4py for the site's MPI (pip install --no-binary=mpi4py mpi4py), or choose another "
            'mpi = "pmix" or "pmi2" in the site file (srun --mpi=list)',
        ),
    }
    if done.returncode == 0:
        return Finding("compute node", "sees the folder, this package and MPI")
    what, remedy = remedies.get(done.returncode, ("refuses", "see what srun says"))
    return Finding("compute node", f"{what}: {complaint.strip()[-400:]}", remedy, True)


def _file_system(jobs: Path) -> Finding:
    kind = ""
    longest = -1
    target = str(jobs.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, found = line.split(" ")[:3]
        place = place.encode().decode("unicode_escape")
        if (target + "/").startswith(place.rstrip("/") + "/") and len(place) > longest:
            kind, longest = found, len(place)
    said = f"{jobs} is on {kind or 'an unknown one'}"
    remedy = "give a folder on the shared file system"
    if kind in _MEMORY and _other_hosts():
        return Finding("file system", f"{said}, which compute nodes do not see", remedy, True)
    if kind in _MEMORY or jobs.resolve().is_relative_to(tempfile.gettempdir()):
        return Finding("file system", said, f"compute nodes do not see it: {remedy}")
    if kind in _LOCAL and _other_hosts():
        remedy = f"--probe tells whether compute nodes see it; if not, {remedy}"
        return Finding("file system", f"{said}, which looks like one machine's disk", remedy)
    return Finding("file system", said)


def _other_hosts() -> bool:
    """Whether there are nodes besides this machine."""
    try:
        nodes = ask(["sinfo", "--noheader", "--Node", "--format=%n"]).split()
    except (RunFailed, UserError):
        return False  # which another check says
    here = platform.node().partition(".")[0]
    return any(node.partition(".")[0] != here for node in nodes)


def _locks(jobs: Path) -> Finding:
    descriptor = os.open(jobs, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Finding("locks", "the file system has them")
    except BlockingIOError:
        return Finding("locks", "the file system has them")
    except OSError as error:
        remedy = "two jobs in one folder are not kept apart: submit one at a time"
        return Finding("locks", f"none: {error.strerror}", remedy)
    finally:
        os.close(descriptor)


def _limits(
    site: Site, partition: str | None, verb: str, nodes: int, time: str
) -> Iterator[Finding]:
    name = partition or "the default partition"
    # Another than the default may be chosen by the site, from the constraint or the qos.
    chosen = partition is not None
    try:
        found = partition_limits(partition)
        kinds = node_kinds(found.get("PartitionName"))
    except (RunFailed, UserError) as error:
        yield Finding("SLURM", error.problem, error.remedy, True)
        return
    if not found:
        yield Finding("partition", f"there is no {name}", "see sinfo -s", chosen)
        return
    if seconds_of(time) <= site.warning_seconds:
        said = f"--time {time} is over before warning_seconds = {site.warning_seconds}"
        yield Finding("time", said, "ask for more, or lower it in the site file", True)
    most = found.get("MaxTime", "UNLIMITED")
    if seconds_of(time) > seconds_of(most):
        said = f"--time {time} is over the {most} of {name}"
        yield Finding("time", said, "ask for less", chosen)
    have, limit = int(found.get("TotalNodes", 0)), found.get("MaxNodes", "UNLIMITED")
    least = min(have, int(limit)) if limit.isdigit() else have
    if nodes > least:
        said, remedy = f"{name} gives at most {least}", f"use --nodes {least}"
        yield Finding("nodes", said, remedy, chosen)
        return
    caps = {"cores": found.get("MaxCPUsPerNode", ""), "memory": found.get("MaxMemPerNode", "")}
    capped = {what: int(text) for what, text in caps.items() if text.isdigit()}
    lack = _size(site, verb, nodes, name, kinds, capped)
    if lack is not None:
        yield replace(lack, fatal=chosen)
    else:
        yield Finding("partition", f"{name}: {have} nodes, at most {most}")


def _size(
    site: Site, verb: str, nodes: int, name: str, kinds: list[Kind], capped: dict[str, int]
) -> Finding | None:
    """What of a node is asked for that too few nodes have, even if all were free.

    Args:
        capped: most of a node that the partition gives to a job.
    """
    remedy = "change {} in the site file, choose another partition, or ask for fewer nodes"
    if (wanted := site.constraint) and wanted.isidentifier():  # else an expression of them
        kinds = [kind for kind in kinds if wanted in kind.features]
        if (count := sum(kind.nodes for kind in kinds)) < nodes:
            said = f"{count} of the nodes of {name} have constraint = {wanted}"
            return Finding("constraint", said, remedy.format("constraint"), True)
    for what, key, least in (
        ("cores", "cores_per_node", site.cores_per_node),
        ("memory", "memory_per_node", site.memory),
        ("gpus", "gpus_per_node", 0 if verb == "featurize" else site.gpus),
    ):
        has = {kind: min(getattr(kind, what), capped.get(what, 1 << 62)) for kind in kinds}
        kinds = [kind for kind in kinds if has[kind] >= least]
        if (count := sum(kind.nodes for kind in kinds)) < nodes:
            most = max(has.values(), default=0)
            said = f"{count} of the nodes of {name} have {key} = {least}; the most is {most}"
            return Finding(what, said, remedy.format(key), True)
    return None


def _python() -> Finding:
    place = Path(sys.prefix)
    if place.is_relative_to(tempfile.gettempdir()):
        remedy = "compute nodes do not see it: make the virtual environment on the shared one"
        return Finding("python", f"{place} is a temporary folder", remedy)
    return Finding("python", str(place))
