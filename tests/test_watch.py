"""How far work is, from files alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny import SMALL, command, document, run, write_lines

from ablation.watch import Standing, line, look, watch
from cluster.attempt import jobs_folder
from cluster.errors import UserError
from cluster.slurm import record
from featurization import worker
from training.config import ModelName, TrainingConfig


def test_a_dataset_at_work_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [document(f"m{i}", 4 + i / 90) for i in range(200)]
    source = write_lines(tmp_path / "s.jsonl", lines)
    one = worker.entry_of

    def interrupted(crystal: object, index: int, config: object) -> object:
        if index == 150:
            raise KeyboardInterrupt
        return one(crystal, index, config)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "entry_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", SMALL.model_copy(update={"shard_structures": 64}))
    (at,) = look(tmp_path / "out")
    assert (at.kind, at.done, at.total, at.unit) == ("dataset", 128, 200, "records")
    assert "128 structures in 2 shards" in at.said
    monkeypatch.undo()
    run(source, tmp_path / "out", SMALL.model_copy(update={"shard_structures": 64}))
    (at,) = look(tmp_path / "out")
    assert (at.done, at.total, at.finished) == (200, 200, True)


def training(
    folder: Path, epochs: int, done: int, *, model: bool = False, kind: ModelName = "pointnet"
) -> Path:
    folder.mkdir(parents=True)
    config = TrainingConfig(task="crystal_system", epochs=epochs, model=kind)
    (folder / "config.json").write_text(json.dumps({"training": config.model_dump()}))
    rows = [f"{epoch},{1 / epoch:.6f}\n" for epoch in range(1, done + 1)]
    (folder / "history.csv").write_text("epoch,train_loss\n" + "".join(rows))
    if model:
        (folder / "model.safetensors").touch()
        (folder / "metrics.json").touch()
    return folder


def test_a_training(tmp_path: Path) -> None:
    (at,) = look(training(tmp_path / "a", 5, 2))
    assert (at.kind, at.done, at.total, at.finished) == ("training", 2, 5, False)
    assert "train_loss 0.5" in at.said
    (at,) = look(training(tmp_path / "b", 5, 5))
    assert not at.finished  # without its model it is still at work
    (at,) = look(training(tmp_path / "c", 5, 5, model=True))
    assert at.finished


def test_a_blend_is_finished_with_the_last_of_its_models(tmp_path: Path) -> None:
    run = training(tmp_path / "run", 3, 0, kind="blend")
    for number, finished in enumerate((False, True)):
        (run / f"member-{number}").mkdir()
        (run / f"member-{number}" / "model.safetensors").touch()
        (at,) = look(run)
        assert at.finished is finished


def test_the_rate_and_silence(tmp_path: Path) -> None:
    before = Standing("dataset", tmp_path, 100, 700, "records", "s", 0.0)
    now = Standing("dataset", tmp_path, 160, 700, "records", "s", 0.0)
    text = line(now, before, 30.0)
    assert "160 of 700 records, 2 records/s, 4.5 min left, silent for" in text
    assert "records/s" not in line(now, now, 30.0)


def test_a_chain_is_watched_to_its_end(tmp_path: Path) -> None:
    for name in ("dataset", "train"):
        record(jobs_folder(tmp_path / "run" / name), {"job": "1"})
    (first, _), (second, text) = watch(tmp_path / "run", 0.01, once=True)
    assert [first.folder.name, second.folder.name] == ["dataset", "train"]
    assert text.startswith(
        f"waiting for {tmp_path}/run/train: no file yet; xtal jobs {tmp_path}/run"
    )
    training(tmp_path / "run" / "train", 3, 3, model=True)
    told = watch(tmp_path / "run", 0.01)
    assert "training" in next(told)[1]
    assert "waiting for" in next(told)[1]
    shutil.rmtree(jobs_folder(tmp_path / "run" / "dataset"))  # no longer expected
    assert list(told) == []


def test_an_array_is_watched_to_its_end(tmp_path: Path) -> None:
    record(jobs_folder(tmp_path / "runs"), {"job": "1", "verb": "train"})
    (at,) = look(tmp_path / "runs")
    assert (at.folder, at.finished) == (tmp_path / "runs", False)
    for seed in (0, 1, 10):
        training(tmp_path / "runs" / f"seed-{seed}", 3, 3, model=seed < 10)
    element = jobs_folder(tmp_path / "runs") / "1_11"  # as submitit has it
    element.mkdir()
    names = [(at.folder.name, at.finished) for at in look(tmp_path / "runs")]
    assert names == [("seed-0", True), ("seed-1", True), ("seed-10", False), ("seed-11", False)]
    element.rmdir()
    (tmp_path / "runs" / "seed-10" / "model.safetensors").touch()
    assert len(list(watch(tmp_path / "runs", 0.01))) == 3


def test_a_grid_whose_driver_has_but_begun(tmp_path: Path) -> None:
    (tmp_path / "driver.json").write_text("{}")
    (at,) = look(tmp_path)
    assert (at.kind, at.finished) == ("awaited", False)


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="holds no dataset, training or grid yet"):
        look(tmp_path)
    training(tmp_path / "train", 4, 1)
    assert command(monkeypatch, "watch", tmp_path, "--once") == 0
    said = capsys.readouterr().out
    assert re.search(r"training .*/train: 1 of 4 epochs; .*train_loss 1", said)
