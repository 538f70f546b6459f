"""A private Ray on this machine: loopback, authenticated, and gone when the work is done."""

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# Ray binds its services to the node's address; it replaces 127.0.0.1 by another interface's
# address, but keeps any other address of the loopback network.
LOOPBACK = "127.0.0.11"
_MODE = "RAY_AUTH_MODE"


@cache
def _token() -> str:
    # Ray's client keeps the first token that a process uses, hence one for all its sessions.
    return secrets.token_hex(32)


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """Start Ray with `cpus` CPUs for the duration of a `with` block.

    All services listen on the loopback network and ask for a token of this process alone, which
    lies in a private folder (0700, token 0600) under a short temporary path and is removed at the
    end with everything else that Ray wrote. Inside the block `import ray` gives that session.
    """
    if "ray" in sys.modules and os.environ.get(_MODE) != "token":
        raise RuntimeError(f"ray was imported before {_MODE}=token was set: Ray reads it only once")
    os.environ[_MODE] = "token"
    import ray

    folder = Path(tempfile.mkdtemp(prefix="xtal-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(_token())
    settings = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(folder),
        )
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
