"""One node's part of a job's Ray: started by `cluster.ray_cluster` through srun, ends with it.

The token comes by standard input, so that it lies in no environment, command line or shared file.
Ray's processes become children of this one, whatever forks them, and are gone when it ends.
"""

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.descendants import adopt_orphans, end_all
from cluster.errors import RunFailed, UserError
from cluster.memory import available
from cluster.ray_session import cores, job_metrics, metrics_settings, private_folder

_RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")
_STORE = (1 << 27, 1 << 31)  # least and most bytes of the object store: trials share no objects
_STORE_SHARE = 0.1  # of the node's memory
_ATTEMPTS = 3  # Ray gives its parts 30 s to start, which a node under load or cold files exceed
# Two endpoints of fixed ports, on all interfaces and without a token, where neighbours on a node
# would meet: at a port that there is not, Ray goes on without them.
_UNHEARD = {"AUTOSCALER_METRIC_PORT": "65536", "DASHBOARD_METRIC_PORT": "65536"}
# A lost node is noticed after about this long: period × failures + timeout, s.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "10000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "6000",
    "RAY_health_check_failure_threshold": "4",
}


def resources(environment: Mapping[str, str]) -> dict[str, int]:
    """What SLURM gave this job of the node: cores, cards (GPUs), memory and object store in bytes.

    The host may have more: nothing is asked of it that SLURM or a control group answers.
    """
    processors = cores()
    visible = [n for n in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    cards = int(environment.get("SLURM_GPUS_ON_NODE") or len(visible))
    mebibytes = int(environment.get("SLURM_MEM_PER_NODE") or 0)
    mebibytes = mebibytes or int(environment.get("SLURM_MEM_PER_CPU") or 0) * processors
    memory = mebibytes << 20 or available()
    store = min(max(_STORE[0], int(_STORE_SHARE * memory)), _STORE[1])
    if Path("/dev/shm").is_dir():
        store = min(store, int(0.9 * shutil.disk_usage("/dev/shm").free))
    return {"cores": processors, "cards": cards, "memory": memory, "store": store}


def own_address(peer: str) -> tuple[str, str]:
    """The address, and its interface, by which this node reaches another one.

    `XTAL_RAY_INTERFACE` in the environment chooses the interface.
    """
    cards = {
        name: [each.address for each in found if each.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    if wanted := os.environ.get("XTAL_RAY_INTERFACE"):
        if not cards.get(wanted):
            raise UserError(
                f"interface {wanted!r} has no IPv4 address on {socket.gethostname()}",
                remedy=f"set interface in the site file to one of {', '.join(sorted(cards))}",
            )
        return cards[wanted][0], wanted
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # asks the routing table; nothing is sent
        address = str(probe.getsockname()[0])
    return address, next(name for name, found in cards.items() if address in found)


def _start(folder: Path, head: str | None, peer: str) -> dict[str, Any]:
    has = resources(os.environ)
    address, interface = own_address(peer)
    # Ray's endpoint for Prometheus listens on all interfaces and asks for no token.
    metrics = job_metrics()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # what one machine's Ray has set to 0
        "RAY_worker_niceness": "0",  # of 15: workers are the work itself
        "TMPDIR": str(folder),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        **_UNHEARD,
        **_HEALTH,
        **metrics_settings(metrics),
    }
    for attempt in range(_ATTEMPTS):
        own, log = folder / str(attempt), folder / f"start{attempt}.log"
        # Ports that are free now; should a neighbour take one first, the next attempt has others.
        ports = {"metrics-export-port": _free_port(address)} if metrics else {}
        if head is None:
            ports["ray-client-server-port"] = _free_port(address)
            ports["dashboard-port"] = _free_port("127.0.0.1")
        words = _words(address, has, head) + [f"--{name}={port}" for name, port in ports.items()]
        with log.open("wb") as stream:
            done = subprocess.run(
                [*words, f"--temp-dir={own}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                check=False,
            )
        said = log.read_text(errors="replace").strip()
        # Without the port of its dashboard, Ray starts without a dashboard.
        taken = "Failed to bind to" in said
        if not taken and (done.returncode == 0 or "timed out during startup" not in said):
            break
        end_all()
    if done.returncode or taken:
        lines = "\n".join(said.splitlines()[-15:])
        raise RunFailed(f"ray start failed:\n{lines}", remedy="see these lines")
    current = own / "ray_current_cluster"
    return has | {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "address": current.read_text().strip() if head is None else head,
        "folder": str(folder),
        "dashboard": ports.get("dashboard-port", 0),
        "metrics": f"{address}:{ports['metrics-export-port']}" if metrics else None,
    }


def _words(address: str, has: Mapping[str, int], head: str | None) -> list[str]:
    words = [*_RAY, "start", f"--node-ip-address={address}"]
    words += [f"--num-cpus={has['cores']}", f"--num-gpus={has['cards']}"]
    words += [f"--object-store-memory={has['store']}", f"--memory={has['memory'] - has['store']}"]
    words += ["--disable-usage-stats"]
    # The kernel chooses most ports, so that neighbours on a node never meet.
    words += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    if head is not None:
        return [*words, f"--address={head}"]
    return [*words, "--head", "--port=0", "--dashboard-host=127.0.0.1"]


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _answer(port: int, token: str) -> str:
    request = f"GET /api/version HTTP/1.0\r\nAuthorization: Bearer {token}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as stream:
        stream.sendall(request.encode())
        return stream.recv(200).decode(errors="replace").partition("\r\n")[0]


def _wait_for_the_end() -> None:
    """Return once the batch step is gone (end of standard input) or Ray on this node is."""
    ours = [p for p in psutil.Process().children(recursive=True) if p.name() == "raylet"]
    while ours and all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ours):
        if select.select([sys.stdin.fileno()], [], [], 1.0)[0]:
            return  # nothing but its end comes after the token
    raise RunFailed("Ray's raylet is gone", remedy="see the job's log for its reason")


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    """A line of JSON on standard output says that this node has joined."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", help="host:port to join; without it this node is the head")
    parser.add_argument("--cores", help="what SLURM gave the job of this node")
    parser.add_argument("--peer", default="127.0.0.1", help="name or address of another node")
    parser.add_argument("--answers", type=int, help="say only what the dashboard at a port answers")
    parser.add_argument("--token", type=Path, help="file with the token, for --answers")
    given = parser.parse_args()
    if given.answers is not None:
        print(_answer(given.answers, given.token.read_text()))
        return
    if given.cores is not None:  # SLURM 22.05 tells each step those of the first node
        os.environ["SLURM_CPUS_ON_NODE"] = given.cores
    adopt_orphans()
    signal.signal(signal.SIGTERM, _leave)
    token = os.read(sys.stdin.fileno(), 4096).decode().strip()
    try:
        with private_folder(token) as folder:
            try:
                print(json.dumps(_start(folder, given.head, given.peer)), flush=True)
                _wait_for_the_end()
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                end_all()
    except (RunFailed, UserError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
