"""Ray for a piece of work: that of the batch job, or a private one on this machine.

Either asks for a token and is gone when the work is done; the private one listens on the loopback
network alone.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.descendants import descendants, end_all, none_without
from cluster.errors import RunFailed
from cluster.files import temporary_folder

# Ray listens on all interfaces unless the node's address is exactly this one, and on Linux it
# replaces this one by another unless it is told that there is no cluster.
_LOOPBACK = "127.0.0.1"
# Ray reads these once, when it is imported.
_AT_IMPORT = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Without it Ray goes on as if nothing had happened, and after a minute ends this process.
_HEAD = "gcs_server"
_PREFIX = "xtal-ray-"
_STARTS = 3  # tries; on a busy machine Ray gives up on itself after 30 s now and then
# In the environment of a command whose batch job started Ray (`cluster.ray_cluster`): a file.
JOB = "XTAL_RAY_JOB"


@dataclass(frozen=True, slots=True)
class JobRay:
    """The Ray of a batch job, as the file that `JOB` names describes it."""

    address: str  # host:port
    token: str  # file that holds it
    nodes: int
    cores: int  # of all nodes
    cards: int  # GPUs of all nodes
    shared: str  # folder that all nodes see


def job_ray() -> JobRay | None:
    """The Ray of this batch job, or None."""
    if not (path := os.environ.get(JOB)):
        return None
    return JobRay(**json.loads(Path(path).read_text(encoding="utf-8")))


def job_metrics() -> bool:
    """Whether Prometheus may read metrics from the nodes of this batch job."""
    return os.environ.get("XTAL_RAY_METRICS") == "1"


def cores() -> int:
    """Processor cores for the work: of the job's Ray, else those that this process may use."""
    if (job := job_ray()) is not None:
        return job.cores
    linux = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return min(allowed, int(os.environ.get("SLURM_CPUS_ON_NODE") or allowed))


def threads_for(processes: int) -> int:
    """Threads of each of so many processes that share the work; no more than a node has cores."""
    job = job_ray()
    here = cores() if job is None else job.cores // job.nodes
    return max(1, min(cores() // processes, here))


def cards(here: int) -> int:
    """GPUs for the work: of the job's Ray, else those `here`."""
    job = job_ray()
    return here if job is None else job.cards


def this_node() -> str:
    """Ray's id of the node that this process, one of Ray's, is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


@contextmanager
def ray_for(cpus: int, metrics_port: int | None = None) -> Iterator[Path]:
    """Ray for the duration of a `with` block: the batch job's, or else a private one.

    Inside the block `import ray` gives that session. The value of the block is a private folder
    (0700) that all its nodes see, removed at the end.

    Args:
        cpus: of the private one; a job's Ray has all cores of the job (`cores`).
        metrics_port: as in `local_ray`; a job's Ray has its own.
    """
    job = job_ray()
    if job is None:
        with local_ray(cpus, metrics_port) as folder:
            yield folder
        return
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=job.token)
    os.environ.update(metrics_settings(job_metrics()))
    folder = Path(tempfile.mkdtemp(prefix="meeting-", dir=job.shared))
    try:
        host = job.address.rpartition(":")[0]
        with _session(address=job.address, _node_ip_address=host):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def process_token() -> str:
    """The token of all private sessions of this process."""
    # Ray's client keeps the first token that a process uses, hence one for all its sessions.
    return secrets.token_hex(32)


@contextmanager
def private_folder(token: str) -> Iterator[Path]:
    """A folder (0700) under a short path, with the token (0600); removed with all that is in it.

    What a killed process left is removed by the next one.
    """
    remove_orphans()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_temporary()))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(token)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def metrics_settings(collected: bool, milliseconds: int = 5000) -> dict[str, str]:
    """Environment of Ray's processes and of those that tell it numbers, so often."""
    return {
        "RAY_enable_metrics_collection": str(int(collected)),
        "RAY_metrics_report_interval_ms": str(milliseconds),
        "RAY_enable_open_telemetry": "0",  # with it, none of a worker's own metrics arrive
    }


@contextmanager
def local_ray(cpus: int, metrics_port: int | None = None) -> Iterator[Path]:
    """Start Ray with `cpus` CPUs for the duration of a `with` block.

    All services listen on the loopback network and ask for a token of this process alone, which
    lies in a private folder (0700, token 0600) under a short temporary path and is removed at the
    end with everything else that Ray wrote; what a killed process left is removed by the next
    session. Inside the block `import ray` gives that session; the value of the block is the folder.
    Whatever of Ray dies there, whoever waits for a task or an actor gets a `RayError`.

    Args:
        metrics_port: on the loopback network, where Prometheus may read metrics without a token,
            as it does everywhere; None: Ray collects none.
    """
    if "ray" in sys.modules and any(os.environ.get(n) != v for n, v in _AT_IMPORT.items()):
        raise RuntimeError(f"ray was imported before {_AT_IMPORT} was set: Ray reads it only once")
    os.environ.update(_AT_IMPORT)
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # of 15: workers are the work itself
        **metrics_settings(metrics_port is not None, 1000),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    before = {name: os.environ.get(name) for name in (*settings, "RAY_AUTH_TOKEN_PATH")}
    others = descendants()
    with private_folder(process_token()) as folder:
        os.environ.update(settings, RAY_AUTH_TOKEN_PATH=str(folder / "token"))
        try:
            with (
                _session(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _metrics_export_port=metrics_port,
                    _node_ip_address=_LOOPBACK,
                    _temp_dir=str(folder / "ray"),  # Ray opens its own folder to everybody
                ),
                none_without(_HEAD, descendants().difference(others)),
            ):
                yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _session(**options: Any) -> Iterator[None]:
    import ray

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    # Ray's own handler aborts with a stack trace; a batch system sends this at the limit.
    ours = before if callable(before) else _leave
    try:
        # Ray prints what becomes of its workers on stdout, which is for the result.
        with redirect_stdout(sys.stderr):
            try:
                _start(ours, **options)
                yield
            finally:
                ray.shutdown()
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _start(terminated: Callable[[int, FrameType | None], Any], **options: Any) -> None:
    import ray

    left, others = _STARTS, descendants()
    while True:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)
            return
        except SystemExit:  # of the handler of SIGTERM that Ray sets before it starts
            signal.signal(signal.SIGTERM, terminated)
            ray.shutdown()
            terminated(signal.SIGTERM, None)
        except KeyboardInterrupt:  # what Ray has started of a node would stay for a minute
            end_all(but=others)
            raise
        except Exception as error:  # Ray has no kind of its own for a node that does not start
            ray.shutdown()
            left -= 1
            if not left:
                raise RunFailed(
                    f"Ray did not start, {_STARTS} times: {error}",
                    remedy="see whether the machine is overloaded, or /tmp or /dev/shm is full",
                ) from error


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _temporary() -> Path:
    """TMPDIR if it is short enough: the path of a socket has 107 bytes, of which Ray wants 91."""
    wanted = temporary_folder()
    return wanted if len(os.fsencode(wanted)) <= 16 else Path("/tmp")


def remove_orphans() -> None:
    """Remove the folders of sessions whose process is gone: the kernel has dropped its lock."""
    for folder in _temporary().glob(f"{_PREFIX}*"):
        try:
            # The token is written under the lock, so a folder without one may still be starting.
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / "token").exists():
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # alive
        finally:
            os.close(lock)
