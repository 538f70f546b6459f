"""One small dataset for all tests of training and ablation; in which order tests run."""

import os
from pathlib import Path

# Tests share the cores with others, and a spinning thread pool then takes longer than one thread;
# processes that tests start inherit it, so that they round as this one does.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from training.dataset import CloudSet, load

# How long an example takes depends on who shares the cores; it is no property of the code.
settings.register_profile(
    "shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared cores")


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -n` gives one test at a time, in the order of below, to whichever process is free."""
    if getattr(config.option, "numprocesses", None):
        config.option.dist, config.option.loadscopereorder = "loadgroup", False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files go first, so that no process waits long for another at the end.

    SLURM goes last, where each process has a cluster: most of the time its tests wait.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("slurm") else item.path not in slow

    items.sort(key=place)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 prototypes, 20 of each crystal system, 63 stored points each, in three shards."""
    folder = tmp_path_factory.mktemp("prototypes") / "dataset"
    config = FeaturizationConfig(selection="miller:2", shard_structures=50)
    featurize("prototypes:140", folder, config, OneProcess())
    return folder


@pytest.fixture(scope="session")
def clouds(dataset: Path) -> CloudSet:
    return load(dataset)
