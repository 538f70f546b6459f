"""The command line: exit codes, messages, and output that programs can read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import TINY
from test_ablation import grid_file

import xtal
from cluster.errors import UserError
from training import train as training_run

VERBS = ("featurize", "inspect", "verify", "train", "evaluate", "ablate", "report", "demo")


@pytest.fixture
def call(monkeypatch, capsys):
    """`xtal WORDS` in this process → exit code, stdout, stderr; on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["xtal", *map(str, words)])
        capsys.readouterr()
        try:
            xtal.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run


def settings_file(folder: Path, **changes):
    path = folder / "training.toml"
    given = TINY | changes
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    return path


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run folder and what `xtal train --json` printed, from a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "xtal", "train", dataset, folder / "run", "--json"]
    command += ["--config", settings_file(folder, epochs=1)]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done


# --- help and bad requests -----------------------------------------------------------------------


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_there_and_fits(call, verb):
    code, out, _ = call(*filter(None, [verb]), "--help")
    assert code == 0
    assert "Usage" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    if verb is None:
        assert all(name in out for name in VERBS)


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "dataset"],
        ["train", "dataset", "run", "--epoch", "3"],
        ["train", "dataset", "run", "--epochs", "three"],
        ["train", "dataset", "run", "--debug", "--nonsense"],
        ["evaluate"],
        ["ablate", "grid.toml"],
        ["report"],
        ["fly"],
    ],
)
def test_wrong_usage_is_exit_code_2(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_the_help_is_shown(call):
    code, out, err = call()
    assert code == 2
    assert "Usage" in out + err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train", "nowhere", "run"], "nowhere is no finished dataset"),
        (["evaluate", "nowhere"], "nowhere is no training run"),
        (["ablate", "nowhere.toml", "out"], "nowhere.toml: no such file"),
        (["verify", "nowhere"], "nowhere is no finished dataset"),
        (["inspect", "nowhere"], "nowhere is no finished dataset"),
        (["inspect", "nowhere", "mp-1"], "nowhere is no finished dataset"),
        (["train", "x", "run", "--config", "absent.toml"], "absent.toml: no such file"),
        (["train", "x", "run", "--task", "colour"], "task = 'colour'"),
        (["train", "x", "run", "--epochs", "0"], "epochs = 0"),
        (["train", "x", "run", "--workers", "100"], "100 workers cannot share batch_size = "),
        (
            ["train", "x", "run", "--task", "crystal_system", "--threshold", "3"],
            "crystal_system has no threshold",
        ),
        (["train", "[/red]", "run"], "[/red] is no finished dataset"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_bad_request_names_problem_and_remedy(call, words, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2
    assert err.startswith("error: ") or "\nerror: " in err
    assert problem in err
    assert "remedy: " in err
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback(call, tmp_path, position):
    words: list[str | Path] = ["train", tmp_path / "nowhere", tmp_path / "run"]
    words.insert(position, "--debug")
    with pytest.raises(ValueError, match="is no finished dataset") as caught:
        call(*words)
    assert any(entry.name == "read_manifest" for entry in caught.traceback)


def test_a_failure_of_ours_is_exit_code_1(call, dataset, tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise RuntimeError("[/bold] inside :warning:")

    monkeypatch.setattr(training_run, "load", fails)
    code, _, err = call("train", dataset, tmp_path / "run")
    assert code == 1
    assert "failed: RuntimeError: [/bold] inside :warning:" in err
    assert "--debug" in err
    assert "Traceback" not in err


# --- results -------------------------------------------------------------------------------------


def test_json_is_all_of_stdout(finished):
    folder, done = finished
    answer = json.loads(done.stdout)
    assert answer == json.loads((folder / "metrics.json").read_text())
    assert answer["task"] == "crystal_system"
    assert "━" not in done.stderr  # no bar


def test_evaluate_prints_the_metrics_again(finished, call):
    folder, done = finished
    before = json.loads(done.stdout)
    code, out, _ = call("evaluate", folder, "--json")
    assert code == 0
    assert json.loads(out) | {"provenance": 0} == before | {"provenance": 0}


def test_metrics_are_readable_at_80_columns_without_colour(finished, call):
    folder, done = finished
    code, out, err = call("evaluate", folder)
    assert code == 0
    answer = json.loads(done.stdout)
    for name, interval in answer["metrics"].items():
        assert name in out
        assert f"{interval['value']:.3f}" in out
    for side, counts in answer["class_counts"].items():
        assert side in out
        assert all(name in out for name in counts)
    assert "…" not in out.replace(" … ", "")  # nothing is cut off
    assert "\x1b" not in out + err
    assert max(len(line) for line in out.splitlines() if "written:" not in line) <= 80


def test_an_unfinished_folder_can_only_be_resumed(finished, call, dataset):
    folder, _ = finished
    settings = folder.parent / "training.toml"
    code, _, err = call("train", dataset, folder, "--config", settings)
    assert code == 2
    assert "--resume" in err
    code, out, _ = call("train", dataset, folder, "--config", settings, "--resume", "--json")
    assert code == 0
    assert json.loads(out)["task"] == "crystal_system"
    code, _, err = call("train", dataset, folder, "--config", settings, "--resume", "--seed", "4")
    assert code == 2
    assert "seed = 0 there, 4 now" in err


def test_flags_go_before_the_file(call, dataset, tmp_path):
    words = ["--config", settings_file(tmp_path), "--epochs", "1", "--seed", "9", "--json"]
    code, _, err = call("train", dataset, tmp_path / "run", *words)
    assert code == 0, err
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (recorded["epochs"], recorded["seed"], recorded["width"]) == (1, 9, 16)


# Verb → its words before --config, a key, its value in the file, the function that gets it.
WITH_OPTIONS = {
    "verify": (["DATASET"], "sample", 3, "featurization.verify.verify"),
    "inspect": (
        ["DATASET", "aflow-000000"],
        "top",
        4,
        "featurization.inspection_tables.show_crystal",
    ),
    "evaluate": (["run"], "dataset", "there", "training.evaluate.evaluate_run"),
    "report": (["grid"], "dataset", "there", "ablation.report.write_report"),
    "demo": (["out"], "task", "band_gap", "ablation.demo.run_demo"),
}


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_options_come_from_a_file_and_flags_go_before_it(
    call, dataset, tmp_path, monkeypatch, verb
):
    words, key, value, target = WITH_OPTIONS[verb]
    words = [str(dataset) if word == "DATASET" else word for word in words]
    seen = []

    def record(*arguments, **keywords):
        seen.extend(map(str, [*arguments, *keywords.values()]))
        raise UserError("seen", remedy="none")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, record)
    (tmp_path / "options.toml").write_text(f"{key} = {json.dumps(value)}\n")
    flag = [f"--{key}", "9" if isinstance(value, int) else "elsewhere"]
    for order, expected in (
        (["--config", "options.toml"], str(value)),
        (["--config", "options.toml", *flag], flag[1]),
        ([*flag, "--config", "options.toml"], flag[1]),
    ):
        seen.clear()
        code, _, err = call(verb, *words, *order)
        assert code == 2
        assert "error: seen" in err
        assert expected in seen
        assert ({str(value), flag[1]} - {expected}).isdisjoint(seen)


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_a_wrong_file_of_options_is_explained(call, tmp_path, monkeypatch, verb):
    words, key, value, _ = WITH_OPTIONS[verb]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "options.toml"
    wrong = str(value) if isinstance(value, int) else 3
    kind = type(value).__name__
    for text, problem in (
        (f"{key} = {json.dumps(wrong)}", f"{key} = {wrong!r}: must be {kind}"),
        (f"{key} = true", f"{key} = True: must be {kind}"),
        (f"{key} = [1]", f"{key} = [1]: must be {kind}"),
        ("colour = 1", "colour: unknown key"),
        ("config = 'a'", "config: unknown key"),
        ("as_json = true", "as_json: unknown key"),
        ("= 1", "options.toml is not TOML"),
        (None, "options.toml: no such file"),
    ):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        code, out, err = call(verb, *words, "--config", "options.toml")
        assert (code, out) == (2, "")
        assert err.startswith("error: options.toml")
        assert problem in err
        assert "remedy: " in err
        if "options.toml: " in err and text is not None:
            assert "valid keys are " in err
            assert key in err.partition("valid keys are ")[2]
    path.unlink(missing_ok=True)
    assert list(tmp_path.iterdir()) == []


def test_a_flag_without_value_comes_from_a_file_too(call, dataset, tmp_path):
    (tmp_path / "options.toml").write_text("json = true\nsample = 0\n")
    code, out, _ = call("verify", dataset, "--config", tmp_path / "options.toml")
    assert code == 0
    assert json.loads(out)["ok"] is True
    (tmp_path / "options.toml").write_text("sample = -1\n")
    assert call("verify", dataset, "--config", tmp_path / "options.toml")[0] == 2


def test_dry_run_lists_the_trials_and_writes_nothing(call, dataset, tmp_path):
    path = grid_file(tmp_path, dataset=os.path.relpath(dataset, tmp_path))
    code, out, _ = call("ablate", path, tmp_path / "out", "--dry-run")
    assert code == 0
    assert "4 trials; nothing was run" in out
    assert out.count("basis_only") == out.count("none") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["grid.toml"]
    assert max(map(len, out.splitlines())) <= 80
    elsewhere = grid_file(tmp_path, dataset="absent")
    assert call("ablate", elsewhere, tmp_path / "out", "--dry-run")[0] == 2
    code, _, _ = call("ablate", elsewhere, tmp_path / "out", "--dry-run", "--dataset", dataset)
    assert code == 0
