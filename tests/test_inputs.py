"""Clouds and inputs that do not fit in memory: the same training from files that are mapped."""

import os
import resource
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from small import tiny
from test_dataset import assert_equal
from test_training import assert_same, run
from tiny import SMALL
from tiny import run as featurize

from cluster import memory
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from training import dataset as module
from training.dataset import CloudSet, MappedSet, in_memory, load, map_clouds, open_clouds
from training.evaluate import evaluate_run
from training.inputs import Rows, prepared
from training.mapped import MappedColumns
from training.models.build import new_network
from training.peers import Alone
from training.portions import blocks, sample
from training.split import Parts
from training.timing import expect, timed_training
from training.train import train

GIB = 2**30


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose memory is full."""
    monkeypatch.setattr(memory, "available", lambda: 0)


# --- how much memory there is --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_limit_of_the_process_counts(kind: str) -> None:
    number = getattr(resource, kind)
    before = resource.getrlimit(number)
    status = Path("/proc/self/status").read_text()
    name = {"RLIMIT_DATA": "VmData:", "RLIMIT_AS": "VmSize:"}[kind]
    used = 1024 * int(status.partition(name)[2].split()[0])
    unlimited = memory.available()
    try:
        resource.setrlimit(number, (used + GIB, before[1]))
        assert 0.9 * GIB < memory.available() <= GIB < unlimited
    finally:
        resource.setrlimit(number, before)


def test_a_limit_of_the_job_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    for place, names in (
        (tmp_path, ("memory.max", "memory.current", "file")),
        (tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")),
    ):
        place.mkdir(exist_ok=True)
        (place / names[0]).write_text(f"{900 << 20}\n")
        (place / names[1]).write_text(f"{500 << 20}\n")
        (place / "memory.stat").write_text(f"anon 1\n{names[2]} {300 << 20}\n")
    assert memory.available() == 700 << 20
    assert 10 << 20 < memory.resident() < 8 * GIB


# --- clouds --------------------------------------------------------------------------------------


def test_mapped_clouds_are_those_in_memory(dataset: Path, clouds: CloudSet) -> None:
    mapped = map_clouds(dataset)
    assert len(set(mapped.shard_N.tolist())) == 3
    assert_equal(in_memory(mapped), clouds)
    rows = torch.tensor([5, 139, 5, 0, 77])
    for name in ("q_P3", "intensity_P", "lengths_B"):
        assert torch.equal(getattr(mapped.batch(rows), name), getattr(clouds.batch(rows), name))
    mixed = np.random.default_rng(0).permutation(len(clouds))[:90]  # in no order of shards
    assert_equal(mapped.subset(mixed), clouds.subset(mixed))
    some = np.arange(len(clouds)) % 3 == 1
    assert_equal(mapped.subset(some), clouds.subset(some))
    assert len(mapped.subset(np.array([], dtype=np.int64))) == 0


def test_few_files_are_open_at_a_time(
    dataset: Path, clouds: CloudSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.mapped._MOST_OPEN", 1)
    before = len(os.listdir("/proc/self/fd"))
    mapped = map_clouds(dataset)
    assert_equal(in_memory(mapped), clouds)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_other_radiations_are_mapped(tmp_path: Path) -> None:
    both = SMALL.model_copy(update={"also_radiation": ("neutron",)})
    featurize("prototypes:20", tmp_path / "both", both)
    mapped = map_clouds(tmp_path / "both", "neutron")
    assert_equal(in_memory(mapped), load(tmp_path / "both", "neutron"))
    assert not torch.equal(in_memory(mapped).intensity_P, load(tmp_path / "both").intensity_P)


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    featurize("prototypes:20", tmp_path / "set", FeaturizationConfig(selection="miller:1"))
    (path,) = (tmp_path / "set" / "shards").iterdir()
    with h5py.File(path, "r+") as file:
        values = file["q"][:]
        del file["q"]
        file.create_dataset("q", data=values, compression="gzip")
    with pytest.raises(UserError, match="q is compressed or chunked"):
        load(tmp_path / "set")


def test_clouds_go_to_memory_where_twice_their_size_is_free(
    dataset: Path, clouds: CloudSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = (clouds.hkl_P3, clouds.q_P3, clouds.intensity_P, clouds.multiplicity_P)
    size = sum(tensor.nbytes for tensor in tensors)
    for sharers in (1, 3):
        monkeypatch.setattr(memory, "available", lambda n=sharers: 2 * n * size)
        assert isinstance(open_clouds(dataset, None, sharers), CloudSet)
        monkeypatch.setattr(memory, "available", lambda n=sharers: 2 * n * size - 1)
        assert isinstance(open_clouds(dataset, None, sharers), MappedSet)


def test_blocks_hold_each_row_once_and_few_points(
    clouds: CloudSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randperm(len(clouds), generator=torch.Generator().manual_seed(0))
    lengths = clouds.offsets.diff()
    for most_points, most_crystals in ((1, 50), (700, 50), (1 << 21, 9), (1 << 21, 4096)):
        monkeypatch.setattr("training.portions._BLOCK_POINTS", most_points)
        monkeypatch.setattr("training.portions._BLOCK_CRYSTALS", most_crystals)
        parts = list(blocks(clouds, rows))
        assert torch.equal(torch.cat(parts), rows)
        for part in parts:
            assert len(part) == 1 or int(lengths[part].sum()) <= most_points
            assert 1 <= len(part) <= most_crystals
    assert len(parts) == 1


# --- inputs and training -------------------------------------------------------------------------


@pytest.mark.usefixtures("no_room")
def test_inputs_without_room_are_in_a_file_without_a_name(clouds: CloudSet, tmp_path: Path) -> None:
    config = tiny(model="harmonic")
    model = new_network(config, clouds, Parts.of(clouds, config).rows["train"])
    inputs = prepared(model, clouds, Alone(), tmp_path)
    assert isinstance(inputs, Rows)
    expected = model.prepare(clouds).batch(torch.arange(len(clouds)))
    assert torch.equal(inputs.batch(torch.arange(len(clouds))), expected)
    assert not list(tmp_path.iterdir())
    assert "(deleted)" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("model", ["pointnet", "harmonic"])
def test_training_from_mapped_files_is_training_in_memory(
    model: str, dataset: Path, clouds: CloudSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model=model, epochs=2)
    run(tmp_path / "memory", clouds, config)
    monkeypatch.setattr(memory, "available", lambda: 0)
    mapped = open_clouds(dataset)
    assert isinstance(mapped, MappedSet)
    run(tmp_path / "mapped", mapped, config)
    assert_same(tmp_path / "mapped", tmp_path / "memory")


def test_a_whole_run_from_mapped_files(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model="boosted", trees=5, members=2)
    answer = train(dataset, tmp_path / "memory", config)
    monkeypatch.setattr(memory, "available", lambda: 0)
    mapped = train(dataset, tmp_path / "mapped", config)
    assert answer | {"provenance": 0} == mapped | {"provenance": 0}


@pytest.mark.parametrize("model", ["pointnet", "harmonic", "attention", "powder_cnn"])
def test_no_part_of_a_training_takes_more_clouds_than_its_blocks(
    model: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 0)
    monkeypatch.setattr("training.portions._BLOCK_POINTS", 1000)
    monkeypatch.setattr("training.portions._SAMPLE_POINTS", 1000)
    taken = []
    gather = MappedColumns.gather

    def watching(
        self: MappedColumns, shard_B: np.ndarray, first_B: np.ndarray, length_B: np.ndarray
    ) -> dict[str, np.ndarray]:
        taken.append(int(length_B.sum()))
        return gather(self, shard_B, first_B, length_B)

    monkeypatch.setattr(MappedColumns, "gather", watching)
    train(dataset, tmp_path / "run", tiny(model=model, epochs=1, batch_size=8))
    assert 0 < max(taken) <= 1000


def test_a_sample_is_spread_evenly_and_takes_few_points(
    clouds: CloudSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(0, len(clouds), 2)
    assert torch.equal(sample(clouds, rows), rows)
    lengths = clouds.offsets.diff()
    monkeypatch.setattr("training.portions._SAMPLE_POINTS", int(lengths[rows].sum()) // 3)
    some = sample(clouds, rows)
    assert len(rows) // 8 <= len(some) <= len(rows) // 2
    assert int(lengths[some].sum()) <= int(lengths[rows].sum()) // 3
    assert (some[0], some[-1]) == (rows[0], rows[-1])
    assert int(some.diff().max() - some.diff().min()) <= 2
    monkeypatch.setattr("training.portions._SAMPLE_POINTS", 1)
    assert len(sample(clouds, rows)) == 1


def test_a_forecast_and_an_audit_of_leaks_take_no_more_memory_than_a_training(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model="boosted", trees=5)
    train(dataset, tmp_path, config)
    leaks = evaluate_run(tmp_path, leaks=True)["leakage"]
    monkeypatch.setattr(memory, "available", lambda: 0)
    monkeypatch.setattr("training.portions._BLOCK_POINTS", 1000)
    monkeypatch.setattr(module, "in_memory", None)  # nobody asks for all clouds
    taken = []
    subset = MappedSet.subset

    def watching(self: MappedSet, rows: np.ndarray) -> CloudSet:
        taken.append(len(rows))
        return subset(self, rows)

    monkeypatch.setattr(MappedSet, "subset", watching)
    assert evaluate_run(tmp_path, leaks=True)["leakage"] == leaks
    assert max(taken) * 63 <= 1000
    monkeypatch.setattr("training.timing._SAMPLE", 70)
    expect(dataset, config)
    assert max(taken) <= 70


def test_a_forecast_of_several_questions_counts_the_crystals_of_all(
    clouds: CloudSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model="harmonic", task="bulk_modulus", also=("crystal_system",), epochs=6)
    known = np.arange(len(clouds)) % 4 == 0
    labels = {"bulk_modulus": np.where(known, np.arange(len(clouds)) % 8 * 40.0, np.nan)}
    data = replace(clouds, labels=labels)
    parts = Parts.of(data, config)
    others = parts.others["crystal_system"]
    assert len(parts.rows["train"]) < len(others.rows["train"]) == len(parts.learned)
    ticks = count()  # a second between any two looks at the clock, and so for each step
    monkeypatch.setattr(
        "training.timing.time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    )
    validated = len(parts.rows["validation"]) + len(others.rows["validation"])
    steps = (len(parts.learned) + validated / 3) / config.batch_size
    assert timed_training(data, config, parts).training == pytest.approx(6 * steps)


def test_a_dataset_is_opened_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counting(*given: object) -> MappedSet:
        opened.append(given)
        return map_clouds(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "map_clouds", counting)
    train(dataset, tmp_path / "run", tiny(epochs=1))
    assert len(opened) == 1
