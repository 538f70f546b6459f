"""Two users, of whom neither is root, side by side: on nodes of jobs and on the login node."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import USERS, Machines
from test_ray_jobs import ray_job, told

pytestmark = pytest.mark.slurm
ALONE = """
import json, os, stat, sys, time
from pathlib import Path
from cluster.ray_session import ray_for

with ray_for(1) as folder:
    import ray

    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    told = {"held": token, "address": ray.get_runtime_context().gcs_address, "user": os.getuid(),
            "worker": ray.get(ray.remote(num_cpus=1)(lambda: os.getuid()).remote()),
            "nodes": len(ray.nodes()), "token": oct(stat.S_IMODE(os.stat(token).st_mode)),
            "folder": oct(stat.S_IMODE(folder.stat().st_mode))}
    Path(sys.argv[1] + ".tmp").write_text(json.dumps(told))
    Path(sys.argv[1] + ".tmp").rename(sys.argv[1])
    while not Path(sys.argv[2]).exists():
        time.sleep(0.2)
"""
# With the token of one's own, or none, at somebody's Ray; then at one's own.
KNOCK = """
import os, sys
from ray._raylet import GcsClient

try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
except Exception as error:
    print(type(error).__name__)
"""


@pytest.fixture
def homes(slurm: Machines, place: Path) -> Iterator[dict[str, Path]]:
    """A folder of each user that nobody else may enter."""
    for host in ("login", *slurm.nodes):
        slurm.open_to_all(host)
    found = {}
    for name, uid in USERS.items():
        found[name] = place / name
        found[name].mkdir(mode=0o700)
        os.chown(found[name], uid, uid)
    yield found
    for folder in found.values():  # so that none waits for ever
        (folder / "go").touch()


def kept_apart(slurm: Machines, host: str, seen: dict[str, dict[str, Any]]) -> None:
    """Each user's files are closed to the other, and so is each Ray; one's own is open."""
    (a, one), (b, other) = seen.items()
    assert one["address"] != other["address"]
    for me, mine, theirs in ((a, one, other), (b, other, one)):
        assert mine["user"] == USERS[me]
        assert (mine["folder"], mine["token"]) == ("0o700", "0o600")
        assert slurm.as_user(me, host, ["cat", mine["held"]]).stdout
        for look in (["cat", theirs["held"]], ["ls", Path(theirs["held"]).parent]):
            done = slurm.as_user(me, host, look, check=False)
            assert done.returncode != 0
            assert "Permission denied" in done.stderr
        knock = ["python", "-c", KNOCK]
        mode = ["env", "RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={mine['held']}"]
        own = slurm.as_user(me, host, [*mode, *knock, mine["address"]])
        assert own.stdout.strip() == str(mine["nodes"])
        for how in (mode, ["env", "RAY_AUTH_MODE=disabled"]):
            done = slurm.as_user(me, host, [*how, *knock, theirs["address"]])
            assert done.stdout.strip() == "AuthenticationError", done.stdout


def test_jobs_of_two_users_on_the_same_nodes(slurm: Machines, homes: dict[str, Path]) -> None:
    jobs = {
        name: ray_job(slurm, home, "told", str(home / "go"), nodes=2, user=name)
        for name, home in homes.items()
    }
    seen = {name: told(slurm, home, "told") for name, home in homes.items()}
    assert all(each["names"] == slurm.nodes[:2] for each in seen.values())
    assert all(each["resources"]["CPU"] == 2 for each in seen.values())  # type: ignore[index]
    kept_apart(slurm, "node1", seen)
    for name, home in homes.items():
        (at,) = (home / "told.jobs").glob("dashboard-*.json")
        port = str(json.loads(at.read_text())["port"])
        for who in USERS:
            words = ["python", "-m", "cluster.ray_node", "--answers", port]
            words += ["--token", str(seen[who]["held"])]
            said = slurm.as_user(who, "node1", words).stdout
            assert ("200 OK" in said) == (who == name), said
    for name, home in homes.items():
        (home / "go").touch()
        assert slurm.ended(jobs[name]) == "COMPLETED", (home / "told.log").read_text()


def test_two_users_on_the_login_node(slurm: Machines, homes: dict[str, Path]) -> None:
    daemons = slurm.processes("login")
    for name, home in homes.items():
        (home / "alone.py").write_text(ALONE)
        run = 'exec python "$0/alone.py" "$0/told" "$0/go" >"$0/log" 2>&1 </dev/null &'
        slurm.as_user(name, "login", ["sh", "-c", run, home])
    told = {name: home / "told" for name, home in homes.items()}
    slurm.until(lambda: all(path.exists() for path in told.values()), "both are at work", 120)
    seen = {name: json.loads(path.read_text()) for name, path in told.items()}
    assert all(each["worker"] == each["user"] for each in seen.values())
    assert all(each["nodes"] == 1 for each in seen.values())
    kept_apart(slurm, "login", seen)
    for home in homes.values():
        (home / "go").touch()
    slurm.until(lambda: slurm.processes("login") == daemons, "no process is left", 60)
    assert slurm.left_in_tmp("login") == []
    assert slurm.on("login", ["ls", "-A", "/dev/shm"]).stdout == ""
