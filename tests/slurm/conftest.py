"""One cluster for all tests of this folder, and small results to compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import USERS, Machines, obstacle

from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize

SITE = """
cores_per_node = 2
memory_per_node = "6000"
warning_seconds = 30
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Machines]:
    """Three nodes of two cores each."""
    if reason := obstacle():
        pytest.skip(reason)
    machines = Machines()
    (machines.shared / "site.toml").write_text(SITE)
    yield machines
    machines.close()


@pytest.fixture
def place(slurm: Machines, request: pytest.FixtureRequest) -> Path:
    """A new folder that all nodes see; afterwards nothing of the test's jobs is left on them."""
    folder = slurm.shared / request.node.name.replace("[", "-").rstrip("]")
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(slurm: Machines) -> Iterator[None]:
    """After each test: no job, no process and no file of one on any node."""
    yield
    for more in (["--state=PENDING"], []):
        for user in ("root", *USERS):
            slurm.run("scancel", f"--user={user}", *more, check=False)
    slurm.until(lambda: slurm.run("squeue", "-h").stdout == "", "the queue is empty", 60)
    slurm.until(lambda: len(slurm.idle()) == len(slurm.nodes), "all nodes are idle", 60)
    for node in slurm.nodes:
        slurm.until(lambda n=node: slurm.processes(n) == [], f"no process is left on {node}", 20)
        assert slurm.left_in_tmp(node) == []
        # MPICH's own are of ranks that were killed while it began.
        shared = slurm.on(node, ["ls", "-A", "/dev/shm"]).stdout.split()
        assert [name for name in shared if not name.startswith("mpich_shm_")] == []


@pytest.fixture(scope="session")
def small(slurm: Machines) -> Path:
    """The dataset of 140 prototypes, made by one process."""
    folder = slurm.shared / "small"
    config = FeaturizationConfig(selection="miller:2", shard_structures=50)
    featurize("prototypes:140", folder, config, OneProcess())
    return folder
