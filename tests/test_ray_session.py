"""Ray for a piece of work, and on a node of a job."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import pytest

from cluster.descendants import descendants
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


def test_what_ray_says_of_dead_workers_is_not_on_stdout(capsys):
    """There a program reads the result."""
    with local_ray(1):
        import ray

        task = ray.remote(num_cpus=1, max_retries=0)(lambda: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(task.remote())
        out, err, end = "", "", time.monotonic() + 60
        while "(raylet)" not in out + err and time.monotonic() < end:
            time.sleep(0.2)
            said = capsys.readouterr()
            out, err = out + said.out, err + said.err
    out += capsys.readouterr().out
    assert "(raylet)" in err
    assert out == ""


def alive(processes):
    """Those that have not ended; one that nobody has waited for has."""
    return [each for each in processes if each.is_running() and each.status() != "zombie"]


def test_ctrl_c_while_ray_starts_leaves_no_process(monkeypatch):
    with local_ray(1):
        from ray._private.node import Node

    start, started, others = Node.start_ray_processes, set(), descendants()

    def interrupted(node):
        start(node)
        end = time.monotonic() + 60
        while not any("agent" in " ".join(each.cmdline()).lower() for each in started):
            assert time.monotonic() < end
            time.sleep(0.1)
            started.update(descendants() - others)
        raise KeyboardInterrupt

    monkeypatch.setattr(Node, "start_ray_processes", interrupted)
    with pytest.raises(KeyboardInterrupt), local_ray(1):
        pass
    assert alive(started) == []


def test_a_signal_while_ray_starts_is_ours(monkeypatch):
    """Ray's own handler, which it sets before it starts, would exit with 15 or 1."""
    with local_ray(1):
        import ray

        start = ray.init
    starts, seen = [], []

    def interrupted(**options):
        starts.append(1)
        if len(starts) == 1:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)
        start(**options)

    monkeypatch.setattr(ray, "init", interrupted)
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with local_ray(1):
            assert seen == [signal.SIGTERM]
        assert len(starts) == 2
        starts.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit) as left, local_ray(1):
            pass
        assert left.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


# A process of its own: whoever still waits for a dead head is ended by Ray a minute later.
BEHEADED = """
import sys, time
from cluster.descendants import descendants
from cluster.ray_session import local_ray

class Actor:
    def answer(self):
        return 42

others, end = descendants(), time.monotonic() + 45
with local_ray(1):
    import ray
    actor = ray.remote(num_cpus=1)(Actor).remote()
    assert ray.get(actor.answer.remote()) == 42
    (victim,) = [each for each in descendants() - others if each.name() == "gcs_server"]
    victim.kill()
    try:
        while time.monotonic() < end:
            ray.get(actor.answer.remote())
            time.sleep(0.1)
        sys.exit("nobody noticed")
    except ray.exceptions.RayError:
        pass
with local_ray(1):
    assert ray.get(ray.remote(num_cpus=1)(Actor).remote().answer.remote()) == 42
print("and again")
"""


def test_ray_without_a_head_is_noticed_and_another_can_follow():
    done = subprocess.run(
        [sys.executable, "-c", BEHEADED], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "and again\n"), done.stderr


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
