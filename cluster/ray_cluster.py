"""Ray on all nodes of a SLURM job: `python -m cluster.ray_cluster RESULT -- COMMAND …`.

The first node's Ray is the head, each other one joins it by its address, all by one srun a node;
then COMMAND runs on the first node, and finds Ray by `cluster.ray_session.ray_for`. In a job of one
node COMMAND runs as it is. When it ends, so does all of Ray.
"""

import json
import os
import re
import resource
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

from cluster.attempt import jobs_folder, say
from cluster.errors import RunFailed, Stopped, UserError
from cluster.files import disk_explained, write_text
from cluster.headless import Guard, step
from cluster.ray_session import JOB, JobRay

GRAFANA = Path(__file__).with_name("grafana")
PROMETHEUS, TARGETS = "prometheus.yml", "targets.json"
ADDRESS, OF_JOB = "dashboard-{}.json", "targets-{}.json"  # by the number of the job
_JOINING = 180.0  # time for a node to join, s
_ENDING = 15.0  # time for a node to end what it started, s


def hostnames() -> list[str]:
    """Names of the job's nodes; the first is the one that the batch script runs on.

    Raises:
        UserError: outside of a job.
    """
    if not (nodes := os.environ.get("SLURM_JOB_NODELIST")):
        raise UserError("this is no SLURM job", remedy="run it by sbatch, or without ray_cluster")
    words = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def cpus_of(text: str) -> list[int]:
    """CPUs of each node in what SLURM says of a job: 128(x2),64 is 128, 128, 64."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


class _Node:
    """Ray on one node, by an srun of its own, whose log is a file in the shared folder."""

    def __init__(
        self, name: str, cpus: int, log: Path, token: str, arguments: Sequence[str]
    ) -> None:
        self.name, self._log = name, log
        self.report: dict[str, Any] | None = None
        self._said = b""
        container = os.environ.get("XTAL_CONTAINER")
        words = [container, "python"] if container else [sys.executable]
        words += ["-m", "cluster.ray_node", f"--cores={cpus}", *arguments]
        with log.open("ab") as stream:
            self._process = step(name, cpus, words, stdout=subprocess.PIPE, stderr=stream)
        assert self._process.stdin is not None
        self._process.stdin.write(token.encode() + b"\n")
        self._process.stdin.flush()

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    @property
    def output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def read(self) -> None:
        """Take what it has said; whole, that is its report."""
        self._said += os.read(self.output.fileno(), 65536)
        if self._said.endswith(b"\n"):
            self.report = json.loads(self._said)

    def complaint(self, what: str) -> str:
        """A sentence with the end of its log."""
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-8:]
        except OSError as error:
            lines = [str(error)]
        return "\n  ".join([f"node {self.name} {what}; {self._log} ends:", *(lines or ["(empty)"])])

    def close(self) -> None:
        """Let it end what it started: the end of its input tells it to."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone already
            self._process.stdin.close()

    def wait(self, until: float) -> None:
        try:
            self._process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.terminate()  # srun then ends the step
            self._process.wait()


def _joined(nodes: list[_Node], until: float) -> None:
    """Wait until all have reported, one is gone, or the time is over."""
    while time.monotonic() < until:
        waiting = [node for node in nodes if node.report is None and not node.gone]
        if not waiting:
            return
        with selectors.DefaultSelector() as those:  # select() knows no more than 1,024 files
            for node in waiting:
                those.register(node.output, selectors.EVENT_READ, node)
            for key, _ in those.select(0.5):
                key.data.read()


def run(shared: Path, command: Sequence[str]) -> int:
    """Start Ray on all nodes of the job, run the command, end Ray; returns its exit code.

    Args:
        shared: a folder that all nodes see, for their logs and what the command's workers share.

    Raises:
        RunFailed: Ray's head does not start.
        Stopped: it is gone before the command ends.
    """
    names = hostnames()
    if len(names) == 1:
        return _attend(subprocess.Popen(command))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two files a node
    job = os.environ["SLURM_JOB_ID"]
    common = shared / f"ray-{job}"
    shutil.rmtree(common, ignore_errors=True)  # of an attempt that was killed
    common.mkdir(parents=True, mode=0o700)
    token = secrets.token_hex(32)
    cpus = dict(zip(names, cpus_of(os.environ["SLURM_JOB_CPUS_PER_NODE"]), strict=True))

    def node(name: str, *arguments: str) -> _Node:
        return _Node(name, cpus[name], shared / f"ray-{job}-{name}.log", token, arguments)

    nodes: list[_Node] = []
    guard = Guard(job, names, shared / f"ray-{job}-{names[0]}.log")
    try:
        nodes.append(head := node(names[0], f"--peer={names[1]}"))
        until = time.monotonic() + _JOINING
        _joined(nodes, until)
        if head.report is None:
            raise RunFailed(head.complaint("did not start Ray"), remedy="mend what the log says")
        address = str(head.report["address"])
        peer = address.rpartition(":")[0]
        nodes += [node(name, f"--peer={peer}", f"--head={address}") for name in names[1:]]
        _joined(nodes, until)
        have = [each.report for each in nodes if each.report is not None]
        for each in nodes:
            if each.report is None:
                limit = "" if each.gone else f" within {_JOINING:.0f} s"
                say(each.complaint(f"did not join{limit}"))
        private = Path(head.report["folder"])
        found = JobRay(
            address,
            str(private / "token"),
            len(have),
            sum(report["cores"] for report in have),
            sum(report["cards"] for report in have),
            str(common.resolve()),
        )
        write_text(private / "job.json", json.dumps(asdict(found)))
        seen = {"job": job, "node": names[0], "port": head.report["dashboard"]}
        seen["token"] = found.token  # where it lies, not what it is
        write_text(shared / ADDRESS.format(job), json.dumps(seen))
        _offer(shared, job, [report["metrics"] for report in have if report["metrics"]])
        store = min(report["store"] for report in have) >> 20
        say(
            f"Ray on {found.nodes} of {len(names)} nodes: {found.cores} cores, {found.cards} GPUs, "
            f"object store {store} MiB a node"
        )
        child = subprocess.Popen(command, env=os.environ | {JOB: str(private / "job.json")})
        return _attend(child, nodes[0], nodes[1:], guard)
    finally:
        guard.end()
        for each in nodes[1:] + nodes[:1]:
            each.close()
        until = time.monotonic() + _ENDING
        for each in nodes:
            each.wait(until)
        for name in (ADDRESS.format(job), OF_JOB.format(job)):
            (shared / name).unlink(missing_ok=True)
        shutil.rmtree(common, ignore_errors=True)


def _offer(shared: Path, job: str, endpoints: list[str]) -> None:
    """Lay what Prometheus needs into the folder of jobs: its configuration, where the nodes are."""
    if not endpoints:
        return
    labels = {"run": shared.name.removesuffix(".jobs"), "slurm_job": job}
    write_text(shared / PROMETHEUS, (GRAFANA / PROMETHEUS).read_text(encoding="utf-8"))
    write_text(shared / OF_JOB.format(job), json.dumps([{"targets": endpoints, "labels": labels}]))


def _attend(
    child: subprocess.Popen[bytes],
    head: _Node | None = None,
    workers: Sequence[_Node] = (),
    guard: Guard | None = None,
) -> int:
    """Wait for the command; pass signals on to it, and say which nodes are lost meanwhile."""

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        left = list(workers)
        while child.poll() is None:
            time.sleep(0.2)
            for each in [each for each in left if each.gone]:
                left.remove(each)
                if each.report is not None:  # else it has never joined, as was said
                    say(each.complaint("is lost, the work goes on without it"))
                if guard is not None:
                    guard.lose(each.name)
            if head is not None and head.gone:
                child.kill()
                child.wait()
                # Not the work's fault: the job is requeued.
                raise Stopped(head.complaint("lost Ray's head"), remedy="submit the job again")
        return child.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Exit code of the command; 128 + signal if one ended it."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit("usage: python -m cluster.ray_cluster RESULT -- COMMAND …")
    try:
        with disk_explained():
            code = run(jobs_folder(Path(sys.argv[1])), sys.argv[3:])
    except (RunFailed, UserError) as error:
        say(str(error))
        sys.exit(error.exit_code)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
