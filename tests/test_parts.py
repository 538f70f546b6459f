"""A grid in parts: each trial in one of them, and the grid ends as if it had none."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small import TINY, tiny
from test_ablation import finished_by_hand, grid_file, large_grid
from test_grid_kills import command, finish, until

from ablation import claim
from ablation.claim import CLAIM, _here, driving
from ablation.grid import GridConfig, read_grid
from ablation.parts import PARTS, Part, rows_of
from ablation.plan import fits_of, plan
from ablation.record import PREDICTIONS, RECORD, Record
from ablation.run import run_grid
from ablation.status import status
from cluster.errors import UserError
from featurization.manifest import read_manifest


@pytest.mark.parametrize("count", [1, 3, 8, 1000])
def test_each_trial_is_in_one_part_with_its_training(count):
    planned = plan(large_grid(), "0" * 64)
    parts = [Part(n, count).of(planned) for n in range(1, count + 1)]
    assert sorted(t.id for part in parts for t in part) == sorted(t.id for t in planned)
    fits = [set(fits_of(part)) for part in parts]
    assert sum(map(len, fits)) == len(fits_of(planned))
    assert max(map(len, fits)) - min(map(len, fits)) <= 2


@pytest.mark.parametrize("name", ["quick", "full"])
def test_no_part_has_most_of_the_tests(name):
    grid = read_grid(Path(name), dataset="dataset")
    planned = plan(grid, "0" * 64)
    sizes = [len(Part(n, 3).of(planned)) for n in (1, 2, 3)]
    assert max(sizes) < 1.5 * min(sizes), sizes


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(UserError, match=f"--part {text}"):
        Part.parse(text)


def results(out: Path):
    """Rows of the finished trials without what differs from run to run."""
    rows = pq.read_table(out / "results.parquet").drop_columns(["seconds", "commit"]).to_pylist()
    return rows, pq.read_table(out / "predictions-crystal_system.parquet").to_pylist()


@pytest.fixture
def grid(dataset):
    return GridConfig(
        dataset=str(dataset),
        models=("majority", "powder"),
        arms=("none", "intensity_binary"),
        modes=("retrain", "test_only"),
        seeds=(0, 3),
        training=tiny(trees=3),
    )


def divided(grid, whole: Path, out: Path, count: int):
    """Parts of a grid that have done what `whole` has."""
    done = Record(whole)
    planned = plan(grid, read_manifest(Path(grid.dataset))["content_hash"])
    for part in (Part(n, count) for n in range(1, count + 1)):
        part.folder(out).mkdir(parents=True)
        record = Record(part.folder(out))
        for trial in part.of(planned):
            record.add(done.rows[trial.id], done.probabilities(trial.id))
    return planned


def test_a_grid_takes_up_what_its_parts_have_done(grid, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished_by_hand(grid, whole)
    assert run_grid(grid, whole)["failed"] == 0
    planned = divided(grid, whole, out, 3)
    monkeypatch.setattr("ablation.run.ray_for", None)  # from here on, a trial would fail
    mine = Part(2, 3)
    counts = {"done": len(mine.of(planned)), "failed": 0, "skipped": len(mine.of(planned))}
    assert run_grid(grid, out, part=mine) == counts
    assert not (out / "results.parquet").exists()
    found = status(out)
    assert (found["done"], found["missing"], found["drivers"]) == (len(planned), 0, [])
    lost = Part(1, 3).folder(out) / RECORD
    lines = lost.read_bytes().splitlines(keepends=True)
    lost.write_bytes(b"".join(lines[1:]))
    assert status(out)["missing"] == 1
    lost.write_bytes(b"".join(lines))
    everything = {"done": len(planned), "failed": 0, "skipped": len(planned)}
    assert run_grid(grid, out) == everything
    assert results(out) == results(whole)
    record = (out / RECORD).read_bytes()
    assert run_grid(grid, out) == everything
    assert (out / RECORD).read_bytes() == record
    assert record.count(b"\n") == len(planned)


def test_what_other_parts_have_done_is_not_done_again(grid, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished_by_hand(grid, whole)
    planned = divided(grid, whole, out, 3)
    monkeypatch.setattr("ablation.run.ray_for", None)  # from here on, a trial would fail
    for number in (1, 2):
        mine = Part(number, 2)
        assert run_grid(grid, out, part=mine)["skipped"] == len(mine.of(planned))
    assert {row["status"] for row in rows_of(out).values()} == {"done"}
    late = planned[0].identity | {"status": "failed", "error": "late"}
    (another := Part(1, 2).folder(out)).mkdir()
    Record(another).add(late)
    assert rows_of(out)[planned[0].id]["status"] == "done"
    (out / PARTS).rename(tmp_path / PARTS)
    Record(out).add(planned[0].identity | {"status": "failed", "error": "early"})
    another.mkdir(parents=True)
    Record(another).add(late)
    assert rows_of(out)[planned[0].id]["error"] == "late"


def test_trainings_that_a_part_has_begun_are_gone_on_with(grid, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    planned = finished_by_hand(grid, whole)
    divided(grid, whole, out, 2)
    for name in (planned[0].fit.id, "stranger"):
        begun = Part(2, 2).folder(out) / "fits" / name
        begun.mkdir(parents=True)
        (begun / "checkpoint").touch()
    monkeypatch.setattr("ablation.run.ray_for", None)
    run_grid(grid, out)
    assert (out / "fits" / planned[0].fit.id / "checkpoint").exists()
    assert not (out / "fits" / "stranger").exists()


def test_damaged_predictions_of_a_part_are_not_taken_up(grid, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished_by_hand(grid, whole)
    divided(grid, whole, out, 2)
    values = Part(2, 2).folder(out) / PREDICTIONS
    content = bytearray(values.read_bytes())
    content[0] ^= 1
    values.write_bytes(content)
    monkeypatch.setattr("ablation.run.ray_for", None)
    with pytest.raises(TypeError):  # one is to be done again
        run_grid(grid, out)
    assert len(Record(out).rows) == len(Record(whole).rows) - 1


def test_a_part_at_work_is_left_alone(grid, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished_by_hand(grid, whole)
    divided(grid, whole, out, 2)
    monkeypatch.setattr("cluster.files.time.sleep", lambda seconds: None)
    with driving(Part(1, 2).folder(out)), pytest.raises(UserError, match="another job is at work"):
        run_grid(grid, out)
    monkeypatch.setattr(claim, "_is_dead", lambda there: False)
    monkeypatch.setattr(claim, "_BEAT", 0.05)
    with driving(out), pytest.raises(UserError, match="another driver is at work"):
        run_grid(grid, out, part=Part(1, 2))
    monkeypatch.undo()
    child = subprocess.Popen(["true"])
    child.wait()
    dead = {"token": "old", **_here(), "pid": child.pid}
    (Part(1, 2).folder(out) / CLAIM).write_text(json.dumps(dead))
    assert run_grid(grid, out)["failed"] == 0
    (out / CLAIM).write_text('{"token"')
    with pytest.raises(UserError, match=r"driver\.json is damaged"):
        run_grid(grid, out)


@pytest.mark.slow
def test_parts_run_side_by_side_one_is_killed_and_the_grid_is_whole(dataset, tmp_path):
    training = TINY | {"epochs": 60}
    path = grid_file(tmp_path, dataset=str(dataset), training=training, processes=1)
    out = tmp_path / "out"
    planned = plan(read_grid(path), read_manifest(dataset)["content_hash"])
    with (
        command("ablate", path, out, "--part", "1/2") as first,
        command("ablate", path, out, "--part", "2/2") as second,
    ):
        until(lambda: len(list(out.glob(f"{PARTS}/*/{CLAIM}"))) == 2)
        code, said = finish("ablate", path, out)
        assert code == 2, said
        assert "is at work in" in said
        until(lambda: Record(out / PARTS / "1-of-2").rows)
        os.killpg(first.pid, signal.SIGKILL)
        said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    code, said = finish("ablate", path, out)
    assert code == 0, said
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == [trial.id for trial in planned]
    assert (out / "report.html").exists()
    lines = [json.loads(line[9:]) for line in (out / RECORD).read_text().splitlines()]
    assert sorted(line["trial"] for line in lines) == sorted(trial.id for trial in planned)
