"""The grid: what it refuses, and that every trial runs exactly once whatever happens."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small import TINY, tiny

from ablation import perturbations
from ablation.grid import GridConfig, read_grid, trials
from ablation.run import _results, _Trainer, run_grid, run_trial
from cluster.errors import UserError
from featurization.manifest import read_manifest
from training.config import NOT_DECIDING
from training.metrics import METRICS
from training.split import Parts

HASH = "0" * 64


def toml(values):
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if k not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", toml(table)]
    return "\n".join(lines) + "\n"


def grid_file(folder, **changes):
    path = folder / "grid.toml"
    values = {"dataset": "dataset", "arms": ["none", "basis_only"], "seeds": [0, 1]}
    path.write_text(toml(values | {"training": TINY} | changes))
    return path


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sedes": [0]}, "sedes: unknown key"),
        ({"training": {"widht": 16}}, r"\[training\].*widht: unknown key"),
        ({"training": {"width": 17}}, "width = 17"),
        ({"training": {"seed": 3}}, r"training\.seed = 3.*\n.*seeds = "),
        ({"training": 3}, "training = 3"),
        ({"arms": ["none", "intensity_blurred"]}, "unknown arm intensity_blurred"),
        ({"arms": ["basis_only"]}, "reference arm none is missing"),
        ({"arms": []}, "reference arm none is missing"),
        ({"arms": ["none", "basis_only", "none"]}, "names something twice"),
        ({"seeds": [0, 1, 0]}, "names something twice"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [0, -1]}, "none below 0"),
        ({"seeds": [0.5]}, "seeds.0 = 0.5"),
        ({"processes": -1}, "processes = -1"),
    ],
)
def test_wrong_grids_are_refused_by_name(tmp_path, changes, names):
    path = grid_file(tmp_path, **changes)
    with pytest.raises(UserError, match=names) as caught:
        read_grid(path)
    assert str(path) in caught.value.problem
    assert caught.value.remedy


def test_a_grid_that_is_absent_or_not_toml_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_grid(tmp_path / "grid.toml")
    (tmp_path / "grid.toml").write_text("seeds = [")
    with pytest.raises(UserError, match="is not TOML"):
        read_grid(tmp_path / "grid.toml")
    with pytest.raises(UserError, match="is a folder"):
        read_grid(tmp_path)
    (tmp_path / "grid.toml").write_text("")
    with pytest.raises(UserError, match="dataset"):
        read_grid(tmp_path / "grid.toml")


def test_a_dataset_is_relative_to_the_grids_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert read_grid(grid_file(tmp_path)).dataset == str(tmp_path / "dataset")
    assert read_grid(grid_file(tmp_path, dataset="../x")).dataset == str(tmp_path.parent / "x")
    assert read_grid(grid_file(tmp_path, dataset="/data/x")).dataset == "/data/x"
    assert read_grid(grid_file(tmp_path), dataset="elsewhere").dataset == "elsewhere"
    assert read_grid(grid_file(tmp_path)).training == tiny()


def test_trials_are_all_pairs_with_ids_of_their_own():
    grid = GridConfig(dataset="x", seeds=(3, 1), training=tiny())
    planned = trials(grid, HASH)
    assert [(t.training.seed, t.arm) for t in planned] == [
        (seed, arm) for seed in (3, 1) for arm in grid.arms
    ]
    assert len({t.id for t in planned}) == 12
    assert [t.id for t in trials(grid, HASH)] == [t.id for t in planned]
    assert all(t.training == tiny(seed=t.training.seed) for t in planned)


CHANGES = {
    "task": "bulk_modulus",
    "model": "boosted",
    "members": 2,
    "width": 32,
    "trees": 9,
    "train_fraction": 0.5,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "warmup_fraction": 0.2,
    "weight_decay": 0.0,
    "validation_fraction": 0.3,
    "test_fraction": 0.3,
    "radiation": "neutron",
    "pose": "axis",
    "resamples": 200,
    "workers": 2,
    "checkpoint_steps": 7,
    "checkpoint_seconds": 7.0,
    "restarts": 7,
}


def test_ids_change_with_all_that_matters_and_nothing_else():
    def first(training, dataset_hash=HASH, dataset="x", processes=0):
        grid = GridConfig(dataset=dataset, processes=processes, training=training)
        return trials(grid, dataset_hash)[0].id

    base = first(tiny())
    others = set(tiny().model_dump()) - CHANGES.keys()
    assert others == {"seed", "threshold"}  # which are below
    changed = {name for name, value in CHANGES.items() if first(tiny(**{name: value})) != base}
    assert changed == CHANGES.keys() - NOT_DECIDING
    assert first(tiny(), dataset_hash="1" * 64) != base
    assert first(tiny(), dataset="y", processes=3) == base
    bulk = {"task": "bulk_modulus"}
    assert first(tiny(**bulk)) != first(tiny(**bulk, threshold=90.0))


def test_ids_are_those_of_earlier_results():
    # Frozen: a change here makes a running grid start over. Defaults that change, too.
    grid = GridConfig(dataset="x", arms=("none",), seeds=(0,), training=tiny(threshold=None))
    decides = tiny().deciding()
    assert set(decides) == {
        "task", "threshold", "radiation", "model", "members", "width", "trees", "epochs",
        "batch_size", "learning_rate", "warmup_fraction", "weight_decay", "seed",
        "validation_fraction", "test_fraction", "train_fraction", "resamples",
    }  # fmt: skip
    assert len(trials(grid, HASH)[0].id) == 16


# --- one trial -----------------------------------------------------------------------------------


def one_trial(arm="basis_only"):
    return trials(GridConfig(dataset="x", arms=("none", arm), training=tiny()), HASH)[1]


def test_a_trial_leaves_its_predictions_and_scores(clouds, tmp_path):
    row = run_trial(clouds, one_trial(), tmp_path)
    assert row["status"] == "done"
    assert row.keys() == {"status", "seconds", *METRICS}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "predictions.parquet"]
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    test = Parts.of(clouds, tiny()).rows["test"]
    assert table["id"] == clouds.ids[test].tolist()
    again = run_trial(clouds, one_trial(), tmp_path / "again")
    assert {n: again[n] for n in METRICS} == {n: row[n] for n in METRICS}
    other = run_trial(clouds, one_trial("directions_random"), tmp_path / "other")
    assert other["ece"] != row["ece"]


def test_the_trial_trains_on_the_perturbed_clouds(clouds, tmp_path, monkeypatch):
    seen = []

    def watching(data, strength, draws):
        seen.append(len(data))
        return data.subset(np.arange(len(data)))

    arm = replace(perturbations.ARMS["basis_only"], apply=watching)
    monkeypatch.setitem(perturbations.ARMS, "basis_only", arm)
    found = run_trial(clouds, one_trial(), tmp_path / "a")
    none = trials(GridConfig(dataset="x", arms=("none",), training=tiny()), HASH)[0]
    reference = run_trial(clouds, none, tmp_path / "b")
    assert seen == [len(clouds)]
    assert {n: found[n] for n in METRICS} == {n: reference[n] for n in METRICS}


def test_a_broken_arm_is_a_result_with_a_traceback(dataset, tmp_path, monkeypatch):
    def broken(data, strength, draws):
        raise ZeroDivisionError("arm is broken")

    arm = replace(perturbations.ARMS["basis_only"], apply=broken)
    monkeypatch.setitem(perturbations.ARMS, "basis_only", arm)
    threads = __import__("torch").get_num_threads()
    row = _Trainer(str(dataset), None, threads).run(one_trial(), str(tmp_path))
    assert row["status"] == "failed"
    assert "Traceback" in row["error"]
    assert "arm is broken" in row["error"]


def test_torn_and_repeated_lines_of_the_record(tmp_path):
    record = tmp_path / "results.jsonl"
    assert _results(tmp_path) == {}
    first = json.dumps({"trial": "a", "status": "failed"})
    last = json.dumps({"trial": "a", "status": "done"})
    for cut in range(1, len(last)):
        record.write_text(f"\n{first}\n{last[:cut]}")
        assert _results(tmp_path) == {"a": {"trial": "a", "status": "failed"}}
    record.write_text(f"\n{first}\n{last[:9]}\n{last}")
    assert _results(tmp_path) == {"a": {"trial": "a", "status": "done"}}


# --- a folder of another grid --------------------------------------------------------------------


def finished_by_hand(grid, out):
    """A grid whose trials all have results, without Ray: in this process."""
    out.mkdir()
    planned = trials(grid, read_manifest(Path(grid.dataset))["content_hash"])
    lines = []
    trainer = _Trainer(grid.dataset, None, 1)
    for trial in planned:
        row = trainer.run(trial, str(out / "trials" / trial.id))
        who = {"task": "crystal_system", "model": "pointnet", "arm": trial.arm, "mode": "retrain"}
        who |= {"trial": trial.id, "seed": trial.training.seed, "strength": None, "commit": "abc"}
        lines.append("\n" + json.dumps(who | row))
    return planned, "".join(lines)


def test_a_folder_belongs_to_one_grid(dataset, tmp_path, monkeypatch):
    grid = GridConfig(dataset=str(dataset), arms=("none",), seeds=(0, 1), training=tiny(epochs=1))
    out = tmp_path / "out"
    _, record = finished_by_hand(grid, out)
    with pytest.raises(UserError, match="is not empty and holds no grid"):
        run_grid(grid, out)
    (out / "trials").rename(tmp_path / "trials")
    monkeypatch.setattr("ablation.run.ray_for", None)  # from here on, a trial would fail
    with pytest.raises(TypeError):
        run_grid(grid, out)
    (tmp_path / "trials").rename(out / "trials")
    (out / "results.jsonl").write_text(record)
    assert run_grid(grid, out) == {"done": 2, "failed": 0, "skipped": 2}

    def with_training(**changes):
        return grid.model_copy(update={"training": tiny(epochs=1, **changes)})

    for changes in ({"width": 32}, {"task": "bulk_modulus", "threshold": 5.0}):
        with pytest.raises(UserError, match=r"width|no label"):
            run_grid(with_training(**changes), out)
    free = with_training(workers=2, checkpoint_steps=3)
    assert run_grid(free, out) == {"done": 2, "failed": 0, "skipped": 2}
    assert (out / "results.jsonl").read_text() == record
    with pytest.raises(UserError, match="is a file"):
        run_grid(grid, out / "grid.json")

    manifest = json.loads((dataset / "manifest.json").read_text()) | {"content_hash": "f" * 64}
    moved = tmp_path / "dataset"
    moved.mkdir()
    (moved / "shards").symlink_to(dataset / "shards")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another grid: dataset_summary: content_hash"):
        run_grid(grid.model_copy(update={"dataset": str(moved)}), out)


# --- processes and ports -------------------------------------------------------------------------


def processes():
    """Pid → (parent, start time) of all processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if state[0] not in "ZX":
            found[int(folder.name)] = (int(state[1]), state[19])
    return found


def family(root):
    """(pid, start time) of a process and all its descendants."""
    table = processes()
    known, grown = {root}, True
    while grown:
        more = {pid for pid, (parent, _) in table.items() if parent in known} - known
        known |= more
        grown = bool(more)
    return {(pid, table[pid][1]) for pid in known if pid in table}


def living(identities):
    table = processes()
    return {pid for pid, start in identities if table.get(pid, (0, ""))[1] == start}


def listening(pids):
    """Hex addresses on which some processes listen for TCP."""
    inodes = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A":
                inodes[f"socket:[{columns[9]}]"] = columns[1].partition(":")[0]
    found = set()
    for pid in pids:
        try:
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                found.add(inodes.get(os.readlink(descriptor)))
        except OSError:
            continue
    return found - {None}


def is_loopback(address):
    if len(address) == 32:
        mapped = address.startswith("0000000000000000FFFF0000") and address.endswith("7F")
        return mapped or address == "00000000000000000000000001000000"
    return address.endswith("7F")


def test_the_check_of_ports_finds_an_open_one():
    for host, local in (("127.0.0.1", True), ("0.0.0.0", False)):
        with socket.socket() as server:
            server.bind((host, 0))
            server.listen()
            found = listening([os.getpid()])
            assert found
            assert all(map(is_loopback, found)) == local


def until(condition, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@contextmanager
def command(*arguments):
    """`xtal` in a process group of its own, which nothing outlives."""
    started = subprocess.Popen(
        [sys.executable, "-m", "xtal", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def finish(*arguments):
    with command(*arguments) as started:
        output = started.communicate(timeout=300)[0]
    return started.returncode, output


def session_folder(pids):
    """The private folder of the Ray session that some processes belong to."""
    names = set()
    for pid in pids:
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        head = b"RAY_AUTH_TOKEN_PATH="
        names |= {entry.removeprefix(head) for entry in content if entry.startswith(head)}
    (name,) = names
    return Path(os.fsdecode(name)).parent


@pytest.mark.slow
def test_a_killed_grid_ends_with_each_trial_once(dataset, clouds, tmp_path):
    path = grid_file(tmp_path, dataset=str(dataset), training=TINY | {"epochs": 40})
    grid, out = read_grid(path), tmp_path / "out"
    planned = trials(grid, read_manifest(dataset)["content_hash"])
    record = out / "results.jsonl"

    # 1. Kill the whole process group once the first trial has a result.
    with command("ablate", path, out) as first:
        until(lambda: first.poll() is not None or any((out / "trials").glob("*/history.csv")))
        relatives = family(first.pid)
        assert len(relatives) > 4
        found = listening(pid for pid, _ in relatives)
        assert found
        assert all(map(is_loopback, found)), found
        folder = session_folder(pid for pid, _ in relatives)
        token = folder / "token"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        secret = token.read_text()
        assert len(secret) == 64
        for pid, _ in relatives:
            for name in ("cmdline", "environ"):
                try:
                    assert secret.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:
                    continue
        until(lambda: first.poll() is not None or _results(out))
        relatives |= family(first.pid)
        os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    until(lambda: not living(relatives), seconds=60)
    done = {t for t, row in _results(out).items() if row["status"] == "done"}
    assert 1 <= len(done) < len(planned)
    lines_before = record.read_text()

    # 2. A torn line, and a trial that cannot work: it fails, the others go on.
    record.write_text(lines_before + '\n{"trial": "' + planned[0].id[:4])
    victim = next(t for t in reversed(planned) if t.id not in done)
    broken = out / "trials" / victim.id / "checkpoint.safetensors"
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_bytes(b"no checkpoint")
    code, output = finish("ablate", path, out)
    assert code == 1, output
    assert "1 trials failed" in output
    assert "Traceback" not in output
    assert not folder.exists()  # what the killed session left is gone, too
    results = _results(out)
    assert {t.id for t in planned} == results.keys()
    assert [t for t, row in results.items() if row["status"] != "done"] == [victim.id]
    assert "Traceback" in results[victim.id]["error"]
    assert "is no checkpoint" in results[victim.id]["error"]
    assert not (out / "results.parquet").exists()
    assert record.read_text().startswith(lines_before)  # nothing was done again

    # 3. The next call tries it again, and only it.
    broken.unlink()
    lines = len(record.read_text().splitlines())
    code, output = finish("ablate", path, out)
    assert code == 0, output
    assert len(record.read_text().splitlines()) == lines + 1
    table = pq.read_table(out / "results.parquet")
    assert table.column_names == [
        "trial", "task", "model", "arm", "strength", "mode", "seed", "status", "auroc",
        "average_precision", "balanced_accuracy", "f1", "mcc", "ece", "seconds", "commit",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [row["trial"] for row in rows] == [t.id for t in planned]
    assert [(row["seed"], row["arm"]) for row in rows] == [
        (t.training.seed, t.arm) for t in planned
    ]
    assert {row["status"] for row in rows} == {"done"}
    predictions = pq.read_table(out / f"predictions-{grid.training.task}.parquet")
    test = Parts.of(clouds, grid.training).rows["test"]
    assert predictions.num_rows == len(planned) * len(test)
    assert (out / "report.html").stat().st_size > 10_000

    # 4. A finished grid does nothing, and its results are those of a trial on its own.
    whole = record.read_bytes()
    assert run_grid(grid, out) == {"done": 4, "failed": 0, "skipped": 4}
    assert record.read_bytes() == whole
    reference = run_trial(clouds, victim, tmp_path / "alone")
    (found_row,) = [row for row in rows if row["trial"] == victim.id]
    for name in METRICS:  # threads differ between machines, hence no equality
        assert found_row[name] == pytest.approx(reference[name], abs=5e-3), name
