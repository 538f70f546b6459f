"""One small dataset for all tests of training and ablation."""

import os
from pathlib import Path

# Tests share the cores with others, and a spinning thread pool then takes longer than one thread;
# processes that tests start inherit it, so that they round as this one does.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from training.dataset import CloudSet, load


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
