"""Work on the nodes of a job: one of them is lost, what is left goes on."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
from small import TINY, same_course

from training.loop import CHECKPOINT, MODEL


def start_node(token, *words):
    """One core's Ray; its process and what it says of itself."""
    node = subprocess.Popen(
        [sys.executable, "-m", "cluster.ray_node", *words],
        env=os.environ | {"SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "1024"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    node.stdin.write(token)
    node.stdin.flush()
    return node, json.loads(node.stdout.readline())


def two_nodes(folder):
    """A job's Ray on two nodes, as `job.json` in the folder tells a command; both processes."""
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token := secrets.token_hex(32))
    head, about = start_node(token)
    other, _ = start_node(token, "--head", about["address"])
    job = {"address": about["address"], "token": str(folder / "token"), "nodes": 2}
    job |= {"cores": 2, "cards": 0, "shared": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    return head, other


def kill(node):
    """SIGKILL of the node's every process at once, as when its power fails."""
    found = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    node.wait()
    node.stdout.close()
    node.stdin.close()


@pytest.mark.slow
def test_with_a_node_lost_fewer_workers_reach_the_same_result(dataset, tmp_path):
    config = TINY | {"batch_size": 19, "epochs": 20, "checkpoint_steps": 1}
    settings = [f"{name} = {json.dumps(value)}\n" for name, value in config.items()]
    (tmp_path / "config.toml").write_text("".join(settings))
    train = [sys.executable, "-m", "xtal", "train", "--config", tmp_path / "config.toml", dataset]
    subprocess.run([*train, tmp_path / "one"], check=True, capture_output=True)
    head, other = two_nodes(tmp_path)
    try:
        training = subprocess.Popen(
            [*train, tmp_path / "two", "--workers", "2"],
            env=os.environ | {"XTAL_RAY_JOB": str(tmp_path / "job.json")},
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (tmp_path / "two" / CHECKPOINT).exists():
            assert training.poll() is None, training.stderr.read()
            time.sleep(0.01)
        kill(other)
        assert not (tmp_path / "two" / MODEL).exists()  # it was under way
        _, said = training.communicate(timeout=300)
        assert training.returncode == 0, said
    finally:
        kill(head)
    assert same_course(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_trial_is_not_to_blame_for_its_node(dataset, tmp_path):
    """A trial that may fail no time at all is done again on another node."""
    (tmp_path / "grid.toml").write_text(
        f"dataset = {json.dumps(str(dataset))}\narms = ['none', 'intensity_binary']\n"
        "seeds = [0, 1]\nretries = 0\n[training]\ntask = 'crystal_system'\n"
        "epochs = 60\nwidth = 16\n"
    )
    head, other = two_nodes(tmp_path)
    try:
        grid = subprocess.Popen(
            [sys.executable, "-m", "xtal", "ablate", tmp_path / "grid.toml", tmp_path / "out"],
            env=os.environ | {"XTAL_RAY_JOB": str(tmp_path / "job.json")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(list((tmp_path / "out" / "fits").glob(f"*/{CHECKPOINT}"))) < 2:
            assert grid.poll() is None, grid.stderr.read()
            time.sleep(0.01)
        kill(other)
        _, said = grid.communicate(timeout=300)
        assert grid.returncode == 0, said
    finally:
        kill(head)
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["done"] * 4
