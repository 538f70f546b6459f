"""What trees see of each crystal is kept block by block, until the run is evaluated."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import random_set
from tiny import ROOT

from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from training import checkpoint, described
from training.config import TrainingConfig
from training.described import Kept, descriptions
from training.ensemble import fit_members, load_members
from training.evaluate import evaluate_run

IDENTITY = {"content_hash": "0" * 64}
EVERY = torch.arange(8)


@pytest.fixture
def blocks_of_three(monkeypatch):
    monkeypatch.setattr("training.portions._BLOCK_CRYSTALS", 3)


@pytest.fixture
def asked(monkeypatch):
    """How many crystals each call described."""
    counts, honest = [], described.description

    def counting(kind, some):
        counts.append(len(some))
        return honest(kind, some)

    monkeypatch.setattr(described, "description", counting)
    return counts


@pytest.fixture
def clouds():
    return random_set(1, [20, 21, 22, 23, 24, 25, 26, 27])


def test_blocks_that_are_done_are_not_done_again(blocks_of_three, asked, clouds, tmp_path):
    kept = Kept(tmp_path, IDENTITY)
    whole = descriptions("boosted", clouds, EVERY)
    assert asked == [3, 3, 2]
    assert np.array_equal(whole, described.description("boosted", clouds), equal_nan=True)
    del asked[:]
    assert np.array_equal(descriptions("boosted", clouds, EVERY, kept), whole, equal_nan=True)
    files = sorted(tmp_path.iterdir())
    assert (len(files), asked) == (3, [3, 3, 2])
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"?")
    del asked[:]
    assert np.array_equal(descriptions("boosted", clouds, EVERY, kept), whole, equal_nan=True)
    assert asked == [3, 2]
    assert sorted(tmp_path.iterdir()) == files


def test_some_crystals_are_read_where_they_are_kept(blocks_of_three, asked, clouds, tmp_path):
    kept = Kept(tmp_path, IDENTITY)
    whole = descriptions("boosted", clouds, EVERY, kept)
    del asked[:]
    rows = torch.tensor([7, 0, 2, 3])
    some = descriptions("boosted", clouds, rows, kept)
    assert asked == []
    assert np.array_equal(some, whole[rows], equal_nan=True)
    sorted(tmp_path.iterdir())[0].unlink()
    some = descriptions("boosted", clouds, rows, kept)
    assert asked == [2]  # of the block that is gone those two, which are no block to keep
    assert np.array_equal(some, whole[rows], equal_nan=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_blocks_of_other_crystals_or_models_are_not_taken(blocks_of_three, asked, clouds, tmp_path):
    kept = Kept(tmp_path, IDENTITY)
    descriptions("boosted", clouds, EVERY, kept)
    del asked[:]
    descriptions("boosted", clouds, EVERY, replace(kept, identity={"content_hash": "1" * 64}))
    descriptions("boosted", replace(clouds, ids=clouds.ids[::-1]), EVERY, kept)
    descriptions("majority", clouds, EVERY, kept)
    assert asked == 3 * [3, 3, 2]


def test_what_is_done_at_once_is_not_kept(asked, clouds, tmp_path):
    descriptions("boosted", clouds, EVERY, Kept(tmp_path / "kept", IDENTITY))
    descriptions("boosted", clouds, EVERY)
    assert asked == [8, 8]
    assert not (tmp_path / "kept").exists()


def test_nothing_is_described_twice(blocks_of_three, asked, clouds, tmp_path):
    config = TrainingConfig(
        task="crystal_system", model="boosted", members=2, trees=3,
        validation_fraction=0.3, test_fraction=0.3,
    )  # fmt: skip
    kept = Kept.of(tmp_path, IDENTITY)
    fit_members(tmp_path, clouds, config, identity=IDENTITY)
    assert asked == [3, 3, 2]
    grown = {path: path.read_bytes() for path in tmp_path.glob("member-*/*")}
    logits = load_members(tmp_path, config).logits(clouds, torch.tensor([1, 4, 6]), kept)
    (tmp_path / "member-1" / "model.safetensors").unlink()
    fit_members(tmp_path, clouds, config, identity=IDENTITY, resume=True)
    assert asked == [3, 3, 2]
    assert {path: path.read_bytes() for path in tmp_path.glob("member-*/*")} == grown

    # Grown trees need no description, nor is one missing once it is discarded.
    kept.discard()
    fit_members(tmp_path, clouds, config, identity=IDENTITY, resume=True)
    assert asked == [3, 3, 2]
    again = load_members(tmp_path, config).logits(clouds, torch.tensor([1, 4, 6]), kept)
    assert np.array_equal(again, logits)
    assert asked == [3, 3, 2, 1, 1, 1]
    with pytest.raises(UserError, match="belongs to another training"):
        fit_members(tmp_path, clouds, config, identity={"content_hash": "1" * 64}, resume=True)


@pytest.fixture(scope="module")
def sphere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described") / "sphere"
    featurize("prototypes:90", folder, FeaturizationConfig(selection="sphere:1.2"), OneProcess())
    return folder


# As `xtal train`, with small blocks and processes that share one.
TRAIN = """
import sys
import torch
import xtal
from training import portions
from training.models import atoms
portions._BLOCK_CRYSTALS, atoms._SHARE = 16, 8
torch.set_num_threads(2)
xtal.main()
"""


@pytest.mark.slow
def test_an_interrupted_solution_goes_on_where_it_was(sphere, tmp_path, monkeypatch):
    (tmp_path / "few.toml").write_text('task = "crystal_system"\ntrees = 5\n')
    options = ["--config", str(tmp_path / "few.toml"), "--model", "solved"]
    run, whole = tmp_path / "run", tmp_path / "whole"

    def started(folder, *more):
        command = [sys.executable, "-c", TRAIN, "train", str(sphere), str(folder), *options, *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        # What a dead parent leaves would hold the pipe open.
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def kept():
        return {path: path.stat().st_mtime_ns for path in (run / "described").glob("[!.]*")}

    for name, code, blocks, more in (("SIGUSR1", 75, 1, []), ("SIGKILL", -9, 3, ["--resume"])):
        before = kept()
        with started(run, *more) as victim:
            deadline = time.monotonic() + 120
            while len(kept()) < blocks:
                assert victim.poll() is None, victim.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            victim.send_signal(signal.Signals[name])
            _, said = victim.communicate(timeout=120)
        assert victim.returncode == code, said
        assert before.items() <= kept().items()
    for folder, more in ((run, ["--resume"]), (whole, [])):
        with started(folder, *more) as done:
            assert done.communicate(timeout=300)[1] is not None
        assert done.returncode == 0
    assert not (run / "described").exists()
    monkeypatch.setattr("training.portions._BLOCK_CRYSTALS", 1)
    evaluate_run(run)  # on its own it keeps nothing
    assert not (run / "described").exists()
    one, other = (checkpoint.read(folder / "model.safetensors")[0] for folder in (run, whole))
    assert one["trees"].equal(other["trees"])
