"""A private Ray on this machine: loopback, authenticated, and gone when the work is done."""

import fcntl
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

# Ray listens on all interfaces unless the node's address is exactly this one, and on Linux it
# replaces this one by another unless it is told that there is no cluster.
_LOOPBACK = "127.0.0.1"
# Ray reads these once, when it is imported.
_AT_IMPORT = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_PREFIX = "xtal-ray-"


@cache
def _token() -> str:
    # Ray's client keeps the first token that a process uses, hence one for all its sessions.
    return secrets.token_hex(32)


@contextmanager
def local_ray(cpus: int) -> Iterator[Path]:
    """Start Ray with `cpus` CPUs for the duration of a `with` block.

    All services listen on the loopback network and ask for a token of this process alone, which
    lies in a private folder (0700, token 0600) under a short temporary path and is removed at the
    end with everything else that Ray wrote; what a killed process left is removed by the next
    session. Inside the block `import ray` gives that session; the value of the block is the folder.
    """
    if "ray" in sys.modules and any(os.environ.get(n) != v for n, v in _AT_IMPORT.items()):
        raise RuntimeError(f"ray was imported before {_AT_IMPORT} was set: Ray reads it only once")
    os.environ.update(_AT_IMPORT)
    import ray

    _remove_orphans()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(_token())
    settings = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    in_main = threading.current_thread() is threading.main_thread()
    terminated = signal.getsignal(signal.SIGTERM)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=_LOOPBACK,
            _temp_dir=str(folder / "ray"),  # Ray opens its own folder to everybody
        )
        if in_main:
            # Ray's own handler aborts with a stack trace; a batch system sends this at the limit.
            signal.signal(signal.SIGTERM, _leave)
        yield folder
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, terminated)
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _remove_orphans() -> None:
    """Remove the folders of sessions whose process is gone: the kernel has dropped its lock."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
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
