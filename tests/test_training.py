"""The loop: exact resumption after any interruption, what is saved, and several workers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from small import epochs_of, tiny

from cluster.errors import Stopped, UserError
from training import checkpoint, distributed, loop
from training.config import FEATURES, NetworkName
from training.distributed import fit_on_workers, whole_job
from training.ensemble import load_members
from training.evaluate import evaluate_run
from training.inputs import prepared
from training.loop import CHECKPOINT, MODEL, Alone, fit, learning_rate, predict
from training.models.build import new_network
from training.models.harmonic import Harmonic
from training.models.pointnet import PointNet
from training.progress import Stopwatch, stopping
from training.split import Parts
from training.train import train

IDENTITY = {"content_hash": "0" * 64, "features": FEATURES}


class Crash(Exception):
    pass


def run(folder, data, config, **options):
    return fit(folder, data, config, identity=IDENTITY, **options)


def contents(folder):
    """All that a finished training leaves, but for the position of bytes in files."""
    model, state = checkpoint.read(folder / MODEL)
    last, position = checkpoint.read(folder / CHECKPOINT)
    tensors = checkpoint.pack("model", model) | checkpoint.pack("checkpoint", last)
    return tensors, [state, position, (folder / "history.csv").read_text()]


def assert_same(one, other):
    (tensors, state), (other_tensors, other_state) = contents(one), contents(other)
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    for name in tensors.keys() - {"checkpoint.rng"}:  # which each step sets anew
        assert torch.equal(tensors[name], other_tensors[name]), name


@pytest.fixture(scope="module")
def steps(clouds):
    """Steps of an epoch."""
    steps = -(-len(Parts.of(clouds, tiny()).rows["train"]) // 16)
    assert steps >= 4
    return steps


@pytest.fixture(scope="module")
def whole(clouds, tmp_path_factory):
    """A training that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, clouds, tiny(checkpoint_steps=2))
    return folder


# --- resumption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["first step", "mid-epoch", "boundary", "second boundary", "end"])
def test_resumed_is_uninterrupted_bit_for_bit(clouds, whole, steps, tmp_path, place):
    stop = {
        "first step": 1,  # before any checkpoint
        "mid-epoch": steps + 3,  # after the last checkpoint
        "boundary": steps,
        "second boundary": 2 * steps,
        "end": 3 * steps - 1,
    }[place]
    config = tiny(checkpoint_steps=2)
    assert run(tmp_path, clouds, config, stop_after=stop) is None
    assert not (tmp_path / MODEL).exists()
    torch.manual_seed(int(torch.randint(1 << 30, ())))  # the new process knows nothing
    assert run(tmp_path, clouds, config, resume=True) is not None
    assert_same(tmp_path, whole)


def test_stopping_after_every_step_is_uninterrupted(clouds, whole, tmp_path):
    config = tiny(checkpoint_steps=1)
    calls = 0
    while run(tmp_path, clouds, config, resume=True, stop_after=1) is None:
        calls += 1
    assert calls > 10
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_the_step_at_work(clouds, whole, tmp_path, number):
    """Long before a checkpoint is due; what goes on from it is a training that nobody stopped."""
    handlers = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)]

    def tell(at):
        if (at.epoch, at.step) == (1, 2):
            os.kill(os.getpid(), number)

    config = tiny(checkpoint_steps=10_000)
    with stopping(tmp_path, tell) as told, pytest.raises(Stopped, match=number.name):
        run(tmp_path, clouds, config, progress=told)
    assert [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)] == handlers
    _, state = checkpoint.read(tmp_path / CHECKPOINT)
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 2)
    run(tmp_path, clouds, config, resume=True)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("where", ["open_clouds", "fit_members"])
def test_a_signal_before_the_first_step_stops_at_once(
    dataset, tmp_path, monkeypatch, number, where
):
    """Not later, when there is a step to save; what goes on is whole."""
    handlers = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)]
    passed = []

    def interrupted(*args, **options):
        os.kill(os.getpid(), number)
        passed.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(f"training.train.{where}", interrupted)
        with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
            train(dataset, tmp_path / "run", tiny(epochs=1))
    assert stopped.value.exit_code == 75
    assert not passed
    assert [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)] == handlers
    assert train(dataset, tmp_path / "run", tiny(epochs=1), resume=True)["metrics"]


def test_a_signal_within_compiled_code_is_no_fault_of_it(tmp_path):
    """Numba's dispatcher makes a SystemError of what a handler raises in it."""

    def compiled():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except Stopped as stopped:
            raise SystemError("returned a result with an exception set") from stopped

    with pytest.raises(Stopped, match="SIGUSR1"), stopping(tmp_path, lambda at: None):
        compiled()
    with pytest.raises(SystemError), stopping(tmp_path, lambda at: None):
        raise SystemError("its own")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cluster.ray_session._start", "training.distributed._workers"])
def test_a_signal_while_workers_start_is_not_lost(dataset, tmp_path, monkeypatch, where):
    """Before any of them has told of a step."""
    owner, _, name = where.rpartition(".")
    real = getattr(sys.modules[owner], name)

    def interrupted(*args, **options):
        answer = real(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setattr(sys.modules[owner], name, interrupted)
    start = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        train(dataset, tmp_path / "run", SHARED.model_copy(update={"epochs": 1000}))
    assert stopped.value.exit_code == 75
    assert json.loads((tmp_path / "run" / "config.json").read_text())["identity"]
    assert time.monotonic() - start < 120
    assert not (tmp_path / "run" / MODEL).exists()


@pytest.mark.parametrize("victim", ["checkpoint.save", "write_text"])
def test_a_crash_at_any_write_loses_nothing(clouds, whole, tmp_path, monkeypatch, victim):
    owner, name = (checkpoint, "save") if victim == "checkpoint.save" else (loop, victim)
    write = getattr(owner, name)
    writes = 0
    for doomed in range(100):
        folder, count = tmp_path / str(doomed), 0

        def crashing(path, *content, doomed=doomed):
            nonlocal count
            count += 1
            if count == doomed + 1:
                raise Crash
            write(path, *content)

        monkeypatch.setattr(owner, name, crashing)
        try:
            run(folder, clouds, tiny(checkpoint_steps=3))
            break
        except Crash:
            writes += 1
        monkeypatch.setattr(owner, name, write)
        run(folder, clouds, tiny(checkpoint_steps=3), resume=True)
        assert_same(folder, whole)
    assert writes == {"checkpoint.save": 7, "write_text": 3}[victim]


def test_a_finished_training_resumes_to_itself(clouds, whole, tmp_path):
    run(tmp_path, clouds, tiny())
    before = contents(tmp_path)[0]
    model = run(tmp_path, clouds, tiny(), resume=True)
    assert all(torch.equal(before[f"model.{n}"], t) for n, t in model.state_dict().items())
    assert_same(tmp_path, whole)  # checkpoint_steps does not decide the result


def test_the_comparison_finds_another_seed(clouds, whole, tmp_path):
    run(tmp_path, clouds, tiny(checkpoint_steps=2, seed=1))
    with pytest.raises(AssertionError):
        assert_same(tmp_path, whole)


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_model(dataset, tmp_path):
    config = tiny(epochs=30, checkpoint_steps=1)
    settings = tmp_path / "training.toml"
    given = config.model_dump(exclude_none=True)
    settings.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in given.items()))
    train(dataset, tmp_path / "reference", config)

    command = [sys.executable, "-m", "xtal", "train", str(dataset), str(tmp_path / "killed")]
    command += ["--config", str(settings), "--json"]
    history = tmp_path / "killed" / "history.csv"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as victim:
        deadline = time.monotonic() + 120
        while not (history.exists() and len(history.read_text().splitlines()) > 3):
            assert victim.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / MODEL).exists()

    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "killed", tmp_path / "reference")
    ours, reference = (
        json.loads((tmp_path / name / "metrics.json").read_text())
        for name in ("killed", "reference")
    )
    assert json.loads(done.stdout) == ours
    ours.pop("provenance"), reference.pop("provenance")
    assert ours == reference


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"width": 32}, "width = 16 there, 32 now"),
        ({"seed": 5}, "seed = 0 there, 5 now"),
        ({"learning_rate": 1e-3}, "learning_rate = 0.002 there, 0.001 now"),
        ({"epochs": 9}, "epochs = 3 there, 9 now"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(clouds, whole, change, names):
    with pytest.raises(UserError, match=names):
        run(whole, clouds, tiny(checkpoint_steps=2, **change), resume=True)


def test_a_checkpoint_of_another_dataset_is_refused(clouds, whole):
    with pytest.raises(UserError, match=r"content_hash = '000.*' there, 'other' now"):
        fit(whole, clouds, tiny(), identity={"content_hash": "other"}, resume=True)


@pytest.mark.parametrize("left", [0, 5, 8, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_a_user_error(clouds, whole, tmp_path, left):
    content = (whole / CHECKPOINT).read_bytes()
    size = left if isinstance(left, int) else int(left * len(content))
    (tmp_path / CHECKPOINT).write_bytes(content[:size])
    with pytest.raises(UserError, match="is no checkpoint"):
        run(tmp_path, clouds, tiny(), resume=True)


def test_checkpoints_are_safetensors_and_foreign_ones_are_refused(whole, tmp_path):
    for name in (CHECKPOINT, MODEL):
        with safe_open(whole / name, framework="np") as file:
            assert "state" in file.metadata()
            assert all(np.isfinite(file.get_tensor(k)).all() for k in file.keys())  # noqa: SIM118
        head = (whole / name).read_bytes()[:64]
        assert not head.startswith((b"\x80", b"PK"))  # neither a pickle nor torch's zip of one
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint.read(tmp_path / "pickle.safetensors")
    with pytest.raises(UserError, match="no such file"):
        checkpoint.read(tmp_path / "absent.safetensors")


def test_a_training_that_diverges_says_so(clouds, tmp_path):
    with pytest.raises(UserError, match=r"diverged in epoch 0.*\n.*lower learning_rate"):
        run(tmp_path, clouds, tiny(learning_rate=1e30))


# --- what the network sees -----------------------------------------------------------------------


def seen_clouds(monkeypatch, folder, data, config):
    """(is training, batch) of each call of the network."""
    seen = []
    forward = PointNet.forward

    def watching(self, batch):
        seen.append((self.training, batch))
        return forward(self, batch)

    monkeypatch.setattr(PointNet, "forward", watching)
    run(folder, data, config)
    monkeypatch.setattr(PointNet, "forward", forward)
    return seen


def test_training_alone_is_rotated_and_every_crystal_comes_once_an_epoch(
    clouds, tmp_path, monkeypatch
):
    # The intensity at the origin tells which crystal a cloud is.
    marks = torch.arange(1.0, len(clouds) + 1)
    intensity = clouds.intensity_P.clone()
    intensity[clouds.multiplicity_P == 1] = marks
    data = replace(clouds, intensity_P=intensity)
    parts = Parts.of(data, tiny())
    seen = seen_clouds(monkeypatch, tmp_path, data, tiny(epochs=2, batch_size=13))
    rows = {True: [], False: []}
    angles = []
    for training, batch in seen:
        for q, i in zip(
            batch.q_P3.split(batch.lengths_B.tolist()),
            batch.intensity_P.split(batch.lengths_B.tolist()),
            strict=True,
        ):
            row = int(i[(q == 0).all(dim=1)].item()) - 1
            rows[training].append(row)
            stored = data.batch(torch.tensor([row])).q_P3
            if training:
                turn = torch.linalg.lstsq(stored.double(), q.double()).solution.T
                assert torch.allclose(turn @ turn.T, torch.eye(3).double(), atol=1e-4)
                assert torch.linalg.det(turn) > 0
                angles.append(float(torch.trace(turn)))
            else:
                assert torch.equal(q, stored)
    train_rows = sorted(parts.rows["train"].tolist())
    half = len(rows[True]) // 2
    assert sorted(rows[True][:half]) == sorted(rows[True][half:]) == train_rows
    assert rows[True][:half] != rows[True][half:]  # in another order
    assert rows[False] == 2 * parts.rows["validation"].tolist()  # never a test crystal
    assert len({round(a, 4) for a in angles}) > 0.9 * len(angles)  # each turned by its own
    assert np.mean(angles) == pytest.approx(0, abs=5 / len(angles) ** 0.5)


@pytest.mark.parametrize("model", get_args(NetworkName))
def test_networks_compute_in_float32_wherever_they_are(clouds, tmp_path, monkeypatch, model):
    # Rounded to bfloat16, a crystal that is turned gets another answer.
    monkeypatch.setattr(torch, "autocast", None)
    fit(tmp_path, clouds, tiny(model=model, epochs=1), identity={})


def test_predictions_do_not_depend_on_the_batch_size_and_keep_the_order(clouds, whole):
    model = load_members(whole, tiny()).members[0]
    rows = torch.tensor([5, 3, 100, 7, 7, 0, 88])
    whole_batch = predict(model, clouds, rows, 64)
    assert np.allclose(predict(model, clouds, rows, 2), whole_batch, atol=1e-6)
    assert np.allclose(predict(model, clouds, rows.flip(0), 3), whole_batch[::-1], atol=1e-6)
    assert np.array_equal(whole_batch[3], whole_batch[4])


def test_the_best_epoch_is_kept_and_the_rate_falls_to_zero(clouds, tmp_path):
    config = tiny(epochs=8, learning_rate=2e-2)
    run(tmp_path, clouds, config)
    history = epochs_of(tmp_path)
    assert [row["epoch"] for row in history] == list(range(8))
    best = max(history, key=lambda row: (row["validation_auroc"], -row["validation_loss"]))
    trained = load_members(tmp_path, config)
    model = trained.members[0]
    assert trained.states[0]["best_epoch"] == best["epoch"]
    parts = Parts.of(clouds, config)
    rows = parts.rows["validation"]
    logits = torch.from_numpy(predict(model, clouds, rows, 16))
    loss = torch.nn.functional.cross_entropy(logits, parts.target_N[rows])
    assert float(loss) == pytest.approx(best["validation_loss"], rel=1e-6)
    rates = [learning_rate(i, 100, config) for i in range(100)]
    assert max(rates) == pytest.approx(2e-2)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] <= 2e-3
    assert rates[-1] < 1e-4


# --- the folder of a run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "run"
    return folder, train(dataset, folder, tiny())


def test_a_reloaded_model_gives_the_same_metrics(finished, dataset):
    folder, answer = finished
    before = pq.read_table(folder / "predictions.parquet")
    assert json.loads((folder / "metrics.json").read_text()) == answer
    again = evaluate_run(folder)
    assert answer | {"provenance": 0} == again | {"provenance": 0}
    assert pq.read_table(folder / "predictions.parquet").equals(before)
    assert set(answer["metrics"]) == {
        "auroc", "average_precision", "balanced_accuracy", "f1", "mcc", "ece"
    }  # fmt: skip


def test_predictions_are_of_the_held_out_crystals(finished, clouds):
    table = pq.read_table(finished[0] / "predictions.parquet").to_pydict()
    parts = Parts.of(clouds, tiny())
    expected = [clouds.ids[r] for s in ("validation", "test") for r in parts.rows[s].tolist()]
    assert table["id"] == expected
    p = np.array([table[f"p{c}"] for c in range(7)])
    assert np.allclose(p.sum(axis=0), 1)
    assert set(table["split"]) == {"validation", "test"}


def test_a_folder_in_use_is_refused(finished, dataset, tmp_path):
    with pytest.raises(UserError, match=r"holds a training already\n.*--resume"):
        train(dataset, finished[0], tiny())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        train(dataset, tmp_path, tiny())
    with pytest.raises(UserError, match="is a file"):
        train(dataset, tmp_path / "notes.txt", tiny())


def test_a_lock_keeps_two_trainings_of_one_folder_apart(dataset, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []

    def second(at):
        if not seen:
            monkeypatch.setattr("cluster.files.time.sleep", lambda seconds: None)
            with pytest.raises(UserError, match=f"another job is at work in {run}\n.*wait until"):
                train(dataset, run, tiny(), resume=True)
            monkeypatch.undo()
        seen.append(at)

    train(dataset, run, tiny(epochs=1), progress=second)
    assert seen
    train(dataset, run, tiny(epochs=1), resume=True)  # nobody holds it any more


def test_a_run_that_failed_before_its_first_checkpoint_can_change_its_mind(dataset, tmp_path):
    with pytest.raises(UserError, match="no label bulk_modulus"):
        train(dataset, tmp_path / "run", tiny(task="bulk_modulus"))
    answer = train(dataset, tmp_path / "run", tiny(epochs=1), resume=True)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert answer["task"] == recorded["training"]["task"] == "crystal_system"


def test_another_dataset_is_not_evaluated(finished, dataset, tmp_path):
    manifest = json.loads((dataset / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"content_hash": "f" * 64}))
    with pytest.raises(UserError, match=r"content hash ffff.*, the model was trained on"):
        evaluate_run(finished[0], tmp_path)
    with pytest.raises(UserError, match="is no training run"):
        evaluate_run(tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(finished[0], moved)
    said = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(said | {"dataset": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone, the dataset of the training, is no longer") as told:
        evaluate_run(moved)
    assert "--dataset" in told.value.remedy
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    with pytest.raises(UserError, match="has not finished"):
        evaluate_run(tmp_path, dataset)


# --- several workers -----------------------------------------------------------------------------


class Share(Alone):
    """One of `size` workers, driven by hand: collects what it is asked to sum."""

    def __init__(self, rank, size):
        self.rank, self.size, self.sums = rank, size, []

    def sum(self, tensors):
        self.sums.append([t.clone() for t in tensors])


@pytest.mark.parametrize("name", get_args(NetworkName))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_of_a_batch_add_up_to_its_gradient(clouds, tmp_path, size, name):
    """With the masks of dropout, and for a worker that has no crystals."""
    config = tiny(model=name)
    parts = Parts.of(clouds, config)
    rows = parts.rows["train"][:4]  # fewer crystals than five workers

    def summed(peers):
        model = new_network(config, clouds, parts.rows["train"])
        if isinstance(model, Harmonic):
            torch.nn.init.normal_(model.learned[2].weight)  # which begins at zero
        inputs = prepared(model, clouds, Alone(), tmp_path)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        random = torch.Generator().manual_seed(0)
        loop._step(model, optimizer, inputs, parts, config, rows, random, peers, Stopwatch())
        return peers.sums[0]

    alone = summed(Share(0, 1))
    shares = [summed(Share(rank, size)) for rank in range(size)]
    for tensor, *pieces in zip(alone, *shares, strict=True):
        assert torch.allclose(sum(pieces), tensor, rtol=1e-4, atol=1e-6)
    assert alone[-1] > 0  # the loss


SHARED = tiny(batch_size=19, epochs=3, workers=2, checkpoint_steps=1)


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    """A training of two workers that nobody disturbs."""
    folder = tmp_path_factory.mktemp("workers") / "two"
    seen = []
    tokens = set()
    terminated = signal.getsignal(signal.SIGTERM)

    def progress(at):
        seen.append((at.epoch, at.step))
        tokens.add(Path(os.environ["RAY_AUTH_TOKEN_PATH"]))
        with pytest.raises(SystemExit):  # a batch system's SIGTERM tidies up
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    fit_on_workers(dataset, folder, SHARED, identity=IDENTITY, resume=False, progress=progress)
    assert seen == sorted(seen)
    assert seen[-1][0] == SHARED.epochs - 1
    (token,) = tokens
    assert not token.parent.exists()  # of Ray nothing is left
    assert signal.getsignal(signal.SIGTERM) == terminated
    return folder


@pytest.mark.slow
def test_two_workers_give_the_result_of_one(clouds, two, tmp_path):
    config = SHARED.model_copy(update={"workers": 1})
    parts = Parts.of(clouds, config)
    assert len(parts.rows["train"]) % 19 % 2 or len(parts.rows["validation"]) % 2  # odd tails
    fit(tmp_path / "one", clouds, config, identity=IDENTITY)
    one, other = (checkpoint.read(folder / MODEL) for folder in (tmp_path / "one", two))
    assert one[1] == other[1]
    for name, tensor in one[0].items():
        assert torch.allclose(other[0][name], tensor, rtol=1e-3, atol=1e-5), name
    for a, b in zip(epochs_of(tmp_path / "one"), epochs_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    # One worker may go on where two stopped: the checkpoint is the same.
    shutil.copytree(two, tmp_path / "two")
    model = fit(tmp_path / "two", clouds, config, identity=IDENTITY, resume=True)
    assert all(torch.equal(other[0][n], t) for n, t in model.state_dict().items())


def descendants(name):
    """Processes under this one whose command begins so."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().split(b"\0")[0].decode()
            above = int(place.name)
            while above not in (0, 1, os.getpid()):
                stat = Path(f"/proc/{above}/stat").read_text()
                above = int(stat.rpartition(")")[2].split()[1])
        except OSError:
            continue
        if above == os.getpid() and Path(command.strip()).name.startswith(name):
            found.append(int(place.name))
    return found


def kill_at_checkpoint(folder, name, killed):
    """SIGKILL one of the processes of this name as soon as there is a checkpoint."""
    while not (folder / CHECKPOINT).exists():
        time.sleep(0.005)
    os.kill(descendants(name)[0], signal.SIGKILL)
    killed.append((folder / MODEL).exists())


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", ["ray::crystal_system pointnet seed 0 rank 1", "raylet", "gcs_server"]
)
def test_a_killed_worker_or_ray_changes_nothing(dataset, two, tmp_path, victim):
    killed = []
    folder = tmp_path / "run"
    hunter = threading.Thread(target=kill_at_checkpoint, args=(folder, victim, killed))
    hunter.start()
    fit_on_workers(
        dataset, folder, SHARED, identity=IDENTITY, resume=False, progress=lambda at: None
    )
    hunter.join()
    assert killed == [False]  # it was under way
    assert_same(folder, two)


@pytest.mark.slow
def test_stopped_workers_save_the_step_at_work(dataset, tmp_path):
    seen = []

    def progress(at):
        if at.epoch >= 1 and 0 < at.step < at.steps:
            seen.append((at.epoch, at.step))
            raise Stopped("stopped by SIGUSR1", remedy="")

    config = SHARED.model_copy(update={"checkpoint_steps": 10_000, "epochs": 100_000})
    with pytest.raises(Stopped, match="SIGUSR1"):
        fit_on_workers(
            dataset, tmp_path, config, identity=IDENTITY, resume=False, progress=progress
        )
    _, state = checkpoint.read(tmp_path / CHECKPOINT)
    # The epochs' own checkpoints are of step 0.
    assert [(state["position"]["epoch"], state["position"]["step"])] >= seen
    assert not (tmp_path / MODEL).exists()


class Seen(Exception):
    pass


@pytest.mark.slow
def test_prometheus_finds_the_training_on_the_loopback_network(dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = {f"ray_xtal_{name}" for name in ("step", "train_loss", "clouds_per_second")}
    wanted |= {"ray_xtal_data_wait", "ray_xtal_resident_gib", "ray_xtal_validation_auroc"}

    def progress(at):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return  # not there yet
        of = {rank: {x.split("{")[0] for x in lines if f'rank="{rank}"' in x} for rank in (0, 1)}
        if all(wanted <= names for names in of.values()):
            listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
            places = re.findall(rf"(\w+):{port:04X} 0+:0000 0A", listening)
            assert places == ["0100007F"]  # 127.0.0.1, and nowhere else
            raise Seen

    config = SHARED.model_copy(update={"metrics_port": port, "epochs": 100_000})
    with pytest.raises(Seen):
        fit_on_workers(
            dataset, tmp_path, config, identity=IDENTITY, resume=False, progress=progress
        )


def test_workers_that_die_too_often_are_a_user_error(dataset, tmp_path, monkeypatch):
    attempts = []

    @contextmanager
    def session(cpus, metrics_port):
        yield tmp_path

    def dying(*given):
        attempts.append(given[-2])  # resume
        raise distributed._Lost("ActorDiedError: killed")

    monkeypatch.setattr(distributed, "ray_for", session)
    monkeypatch.setattr(distributed, "_fit", dying)
    config = SHARED.model_copy(update={"restarts": 2})
    with pytest.raises(UserError, match=r"workers died 3 times.*killed\n.*--resume"):
        fit_on_workers(
            dataset, tmp_path, config, identity=IDENTITY, resume=False, progress=lambda at: None
        )
    assert attempts == [False, True, True]


def test_checkpoints_come_by_time_too(clouds, tmp_path, monkeypatch):
    steps = []
    save = loop._save

    def watching(path, at, *rest):
        steps.append((at.epoch, at.step))
        save(path, at, *rest)

    monkeypatch.setattr(loop, "_save", watching)
    run(tmp_path / "often", clouds, tiny(epochs=1, checkpoint_seconds=1e-9))
    often = len(steps)
    run(tmp_path / "seldom", clouds, tiny(epochs=1))
    assert len(steps) == often + 1  # the end of the epoch alone
    assert often > 3
    assert steps[:often] == [(0, step) for step in range(1, often)] + [(1, 0)]


def test_the_whole_job_is_its_gpus_or_its_nodes(tmp_path, monkeypatch):
    told = {"address": "h:1", "token": "t", "nodes": 3, "cores": 12, "shared": str(tmp_path)}
    monkeypatch.setenv("XTAL_RAY_JOB", str(tmp_path / "job.json"))
    for gpus, workers in ((0, 3), (4, 4)):
        (tmp_path / "job.json").write_text(json.dumps(told | {"cards": gpus}))
        assert whole_job() == workers
    monkeypatch.delenv("XTAL_RAY_JOB")
    assert whole_job() == max(1, torch.cuda.device_count())
