"""Ray for a piece of work, and on a node of a job."""

import json
import os
import secrets
import socket
import subprocess
import sys

import pytest

from cluster.errors import RunFailed
from cluster.ray_session import local_ray


def test_a_ray_that_did_not_start_is_started_again(monkeypatch):
    with local_ray(1):
        import ray

        start = ray.init
    fails = [True, True, False]

    def sometimes(**options):
        start(**options)
        if fails.pop(0):
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", sometimes)
    with local_ray(1) as folder:
        assert ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote()) == 42
    assert not fails
    assert not folder.exists()
    fails += [True] * 3
    with pytest.raises(RunFailed, match="3 times: The current node timed out"), local_ray(1):
        pass
    assert not ray.is_initialized()


# A neighbour takes the first port of each kind between its choice and Ray's start.
CLASHING = """
import sys
from cluster import ray_node
free, taken, seen = ray_node._free_port, int(sys.argv.pop()), []
def clashing(address):
    seen.append(address)
    return taken if seen == ["127.0.0.1"] else free(address)
ray_node._free_port = lambda address: clashing(address) if address == "127.0.0.1" else free(address)
ray_node.main()
"""


def test_a_node_whose_port_is_taken_starts_with_another():
    with socket.create_server(("127.0.0.1", 0)) as neighbour:
        taken = neighbour.getsockname()[1]
        node = subprocess.Popen(
            [sys.executable, "-c", CLASHING, str(taken)],
            env=os.environ | {"SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "1024"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        token = secrets.token_hex(32)
        node.stdin.write(token)
        node.stdin.flush()
        told = json.loads(node.stdout.readline())
        assert told["dashboard"] not in (0, taken)
        ask = [sys.executable, "-m", "cluster.ray_node", "--token", f"{told['folder']}/token"]
        ask += ["--answers", str(told["dashboard"])]
        said = subprocess.run(ask, capture_output=True, text=True, check=False)
        node.communicate(timeout=60)
    assert said.stdout == "HTTP/1.0 200 OK\n"
    assert not os.path.exists(told["folder"])
