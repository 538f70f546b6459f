"""A grid on real Ray processes: whatever is killed, each trial is there once in the end."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small import TINY
from test_ablation import grid_file

import xtal
from ablation.grid import read_grid
from ablation.plan import plan
from ablation.record import RECORD, Record
from ablation.run import run_grid
from ablation.worker import Shared, Worker
from featurization.manifest import read_manifest
from training.metrics import METRICS
from training.split import Parts

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
def test_a_killed_grid_ends_with_each_trial_once(dataset, clouds, tmp_path, monkeypatch, capsys):
    path = grid_file(tmp_path, dataset=str(dataset), training=TINY | {"epochs": 25})
    grid, out = read_grid(path), tmp_path / "out"
    planned = plan(grid, read_manifest(dataset)["content_hash"])
    record = out / RECORD

    # 1. Kill the whole process group once the first trial has a result.
    with command("ablate", path, out) as first:
        until(lambda: first.poll() is not None or any((out / "fits").glob("*/history.csv")))
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
        until(lambda: first.poll() is not None or Record(out).rows)
        relatives |= family(first.pid)
        os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    until(lambda: not living(relatives), seconds=60)
    done = {t for t, row in Record(out).rows.items() if row["status"] == "done"}
    assert 1 <= len(done) < len(planned)
    lines_before = record.read_text()

    # 2. A torn line, and a trial that cannot work: it fails, the others go on.
    record.write_text(lines_before + '0123abcd {"trial": "' + planned[0].id[:4])
    victim = next(t for t in reversed(planned) if t.id not in done)
    broken = out / "fits" / victim.fit.id / "checkpoint.safetensors"
    shutil.rmtree(broken.parent, ignore_errors=True)  # it may have been trained, only not recorded
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    code, output = finish("ablate", path, out)
    assert code == 1, output
    assert "1 trials failed" in output
    assert "Traceback" not in output
    assert not folder.exists()  # what the killed session left is gone, too
    results = Record(out).rows
    assert {t.id for t in planned} == results.keys()
    assert [t for t, row in results.items() if row["status"] != "done"] == [victim.id]
    assert "Traceback" in results[victim.id]["error"]
    assert "is no checkpoint" in results[victim.id]["error"]
    assert pq.read_table(out / "results.parquet").num_rows == len(planned) - 1
    assert record.read_text().startswith(lines_before)  # nothing was done again

    # 3. The next call tries it again, and only it.
    broken.unlink()
    lines = len(record.read_text().splitlines())
    code, output = finish("ablate", path, out)
    assert code == 0, output
    assert len(record.read_text().splitlines()) == lines + 1
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == [t.id for t in planned]
    assert [(row["seed"], row["arm"]) for row in rows] == [
        (t.training.seed, t.arm) for t in planned
    ]
    assert {row["status"] for row in rows} == {"done"}
    predictions = pq.read_table(out / "predictions-crystal_system.parquet")
    test = Parts.of(clouds, grid.training).rows["test"]
    assert predictions.num_rows == len(planned) * len(test)
    assert (out / "report.html").stat().st_size > 10_000

    # 4. A finished grid does nothing, and its results are those of a trial on its own.
    whole = record.read_bytes()
    assert run_grid(grid, out) == {"done": 4, "failed": 0, "skipped": 4}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["xtal", "ablate", str(path), str(out), "--json"])
    with pytest.raises(SystemExit) as stopped:
        xtal.main()
    told = json.loads(capsys.readouterr().out)
    assert (stopped.value.code or 0, told["done"], told["skipped"]) == (0, 4, 4)
    assert Path(told["report"]).exists()
    assert record.read_bytes() == whole
    assert not list((out / "fits").iterdir())
    worker = Worker(tmp_path / "alone", 1, 1 << 30)
    (reference,) = worker.train(victim.fit, [victim], *[Shared.of("base", clouds)] * 2)
    (found_row,) = [row for row in rows if row["trial"] == victim.id]
    for name in METRICS:  # threads differ between machines, hence no equality
        assert found_row[name] == pytest.approx(reference.row[name], abs=5e-3), name


KILLED_AT = """
import os, signal, sys
import xtal
from ablation import layout

def end(*words):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(layout, sys.argv.pop(1), end)
xtal.main()
"""


@pytest.mark.parametrize("where", ["prediction_table", "write_text"])
def test_a_driver_killed_before_there_is_a_grid_is_no_stranger(dataset, tmp_path, where):
    training = TINY | {"model": "majority"}
    path, out = grid_file(tmp_path, dataset=str(dataset), training=training), tmp_path / "out"
    words = [sys.executable, "-c", KILLED_AT, where, "ablate", str(path), str(out)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    left = {entry.name for entry in out.iterdir()}
    assert "driver.json" in left
    assert "grid.json" not in left
    assert any(name.endswith(".parquet") for name in left) == (where == "write_text")
    grid = read_grid(path)
    assert run_grid(grid, out)["failed"] == 0
    assert {row["status"] for row in pq.read_table(out / "results.parquet").to_pylist()} == {"done"}
