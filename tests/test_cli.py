"""The command line: exit codes, messages, and output that programs can read."""

import gzip
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from small import TINY, tiny
from test_ablation import finished_by_hand, grid_file
from tiny import ROOT, broken, contents, document, write_lines

import xtal
from ablation.grid import GridConfig, read_grid
from ablation.record import Record
from ablation.report import write_report
from cluster import terminal
from cluster.config import names
from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization import featurize as driver
from featurization import forecast, worker
from featurization.config import CellName, FeaturizationConfig, RadiationName
from featurization.featurize import featurize
from featurization.index import build_index
from featurization.inspection import read_diffraction
from featurization.manifest import read_manifest
from featurization.published import JARVIS, MATBENCH
from featurization.sources import open_source
from training import train as training_run
from training.config import ModelName, TrainingConfig
from training.dataset import load
from training.tasks import TASKS


def commands(command, *names):
    """("ablate", "run") → command, of all that are none but groups."""
    for name, each in command.commands.items():
        if hasattr(each, "commands"):
            yield from commands(each, *names, name)
        else:
            yield (*names, name), each


XTAL = typer.main.get_command(xtal.app)
COMMANDS = dict(commands(XTAL))


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


@pytest.mark.parametrize("words", [(), ("fetch",), ("ablate",), *COMMANDS], ids=" ".join)
def test_help_is_there_and_fits(call, words):
    code, out, _ = call(*words, "--help")
    assert code == 0
    assert "Usage" in out
    assert max(map(len, out.splitlines())) <= 80
    if not words:
        assert all(name in out for name in XTAL.commands)


@pytest.mark.parametrize("verb", COMMANDS, ids=" ".join)
def test_a_paragraph_of_help_is_as_wide_as_the_terminal(call, verb):
    text = call(*verb, "--help")[1].partition("Arguments ─")[0].partition("Options ─")[0]
    said = [line.strip() for line in text.partition("Usage")[2].splitlines()[1:]]
    for line, after in itertools.pairwise(said):
        if line and after:  # a word more would not have fitted
            assert len(line) + 1 + len(after.split()[0]) > 76, line


def test_arguments_are_shown_in_upper_case():
    arguments = [p for c in COMMANDS.values() for p in c.params if p.param_type_name == "argument"]
    assert len(arguments) > 10
    odd = [p.metavar for p in arguments if not re.fullmatch(r"[A-Z]+(\.toml|…)?", str(p.metavar))]
    assert odd == []


GRIDS = [path.stem for path in Path(xtal.ablation.__file__).parent.glob("grids/*.toml")]
# Words → the option or argument that takes one of these names.
NAMED = {
    "train --task": TASKS,
    "train --model": names(ModelName),
    "featurize --radiation": names(RadiationName),
    "featurize --cell": names(CellName),
    "fetch matbench": MATBENCH,
    "fetch jarvis": JARVIS,
    "ablate run": GRIDS,
}


@pytest.mark.parametrize("words", NAMED)
def test_help_and_completion_have_every_name(call, words):
    verb = [word for word in words.split() if not word.startswith("-")]
    assert set(NAMED[words]) <= set(re.findall(r"\w+", call(*verb, "--help")[1]))
    command = COMMANDS[tuple(verb)]
    asked = next(p for p in command.params if words.endswith(p.opts[0]) or (verb[1:] and p.metavar))
    for begun in ("", next(iter(NAMED[words]))[:2]):
        found = {each.value for each in asked.shell_complete(typer.Context(command), begun)}
        assert found >= {name for name in NAMED[words] if name.startswith(begun)}
        assert all(name.startswith(begun) for name in found)


@pytest.mark.parametrize("part", ["featurize", "train", "ablate", "all"])
def test_the_help_of_a_submission_has_the_options_that_go_to_the_verb(call, part):
    text = call("submit", part, "--help")[1]
    if part == "all":
        assert set(TASKS) <= set(re.findall(r"\w+", text))
        return
    theirs = COMMANDS[(part, "run") if part == "ablate" else (part,)].params
    options = {p.opts[0] for p in theirs if p.param_type_name == "option"}
    assert options <= set(re.findall(r"--[\w-]+", text))
    known = {"train": (*TASKS, *names(ModelName)), "featurize": names(RadiationName)}
    assert set(known.get(part, ())) <= set(re.findall(r"\w+", text))


def test_the_help_of_a_group_says_where_the_options_are(call):
    assert "xtal ablate run --help" in " ".join(call("ablate", "--help")[1].split())


def test_no_option_has_a_twin_that_nobody_asked_for():
    twins = [p.secondary_opts for c in COMMANDS.values() for p in c.params if p.secondary_opts]
    assert twins == []


@pytest.mark.parametrize(
    ("verb", "kind"), [("train", TrainingConfig), ("featurize", FeaturizationConfig)]
)
def test_the_help_says_what_an_option_is_by_default(call, verb, kind):
    out = " ".join(re.sub("[│╭╮╰╯─]", " ", call(verb, "--help")[1]).split())
    options = {f"--{name.replace('_', '-')}": getattr(kind(), name) for name in kind.model_fields}
    options["--label"] = options.pop("--id-prop-label", None)
    said = dict(re.findall(r"(--[\w-]+) <\w+> (.*?)(?= --|$)", out))
    known = {name: options[name] for name in said if options.get(name) is not None}
    assert len(known) > 5
    for name, value in known.items():
        value = f"{value:g}" if isinstance(value, float) else value
        assert re.search(rf"[Dd]efault: {value}\.( |$)", said[name]), name


def on_a_terminal(words, folder, **environment):
    """What `xtal WORDS` writes to a terminal of its own, and its exit code."""
    here, there = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "xtal", *words],
        cwd=folder,
        env=kept | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment,
        stdin=there,
        stdout=there,
        stderr=there,
    ) as process:
        os.close(there)
        said = b""
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(here, 4096):
                said += piece
        os.close(here)
    return said.decode(), process.returncode


COLOUR = r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[\d;]*)?m"


@pytest.mark.parametrize(("last", "code"), [("--help", 0), ("nowhere", 2)])
def test_a_terminal_is_coloured_unless_no_colour_is_asked(last, code, tmp_path):
    said, ended = on_a_terminal(["inspect", last], tmp_path)
    assert ended == code
    assert re.search(COLOUR, said)
    plain, ended = on_a_terminal(["inspect", last], tmp_path, NO_COLOR="1")
    assert ended == code
    assert not re.search(COLOUR, plain)
    styles = r"\x1b\[[\d;]*m"
    assert re.sub(styles, "", plain) == re.sub(styles, "", said)


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
        (["train", "x", "run", "--task", "colour"], "--task colour: must be "),
        (["train", "x", "run", "--epochs", "0"], "--epochs 0: must be ≥ 1"),
        (["train", "x", "run", "--workers", "100"], "100 workers cannot share batch_size = "),
        (
            ["train", "x", "run", "--task", "crystal_system", "--threshold", "3"],
            "crystal_system has no threshold",
        ),
        (["ablate", "quick", "out"], "give --dataset DATA"),
        (["train", "[/red]", "run"], "[/red] is no finished dataset"),
        (["report", "nowhere"], "nowhere"),
        (["propensity", "x", "nowhere", "--out", "y"], "nowhere/config.json is missing"),
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
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback_and_changes_no_exit_code(call, tmp_path, position):
    words: list[str | Path] = ["train", tmp_path / "nowhere", tmp_path / "run"]
    words.insert(position, "--debug")
    code, _, err = call(*words)
    assert code == 2
    assert "Traceback" in err
    assert "in read_manifest" in err
    assert "is no finished dataset" in err.rpartition("error: ")[2]


def test_a_failure_of_ours_is_exit_code_1(call, dataset, tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise RuntimeError("[/bold] inside :warning:")

    monkeypatch.setattr(training_run, "open_clouds", fails)
    code, _, err = call("train", dataset, tmp_path / "run")
    assert code == 1
    assert "failed: RuntimeError: [/bold] inside :warning:" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_an_interruption_is_said(tmp_path):
    # Where the tests run in the background, SIGINT is ignored, by their children too.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    words = ["featurize", "prototypes:20000", str(tmp_path / "out")]
    command = [sys.executable, "-c", f"{heard}import xtal; xtal.main()", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("out/shards/*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"


def test_an_interruption_that_native_code_meets_is_said(call, monkeypatch):
    def met(*arguments, **keywords):
        error = SystemError("returned a result with an exception set")
        error.__cause__ = KeyboardInterrupt()
        raise SystemError("returned a result with an exception set") from error

    monkeypatch.setattr("featurization.featurize.featurize", met)
    assert call("featurize", "prototypes:7", "out") == (130, "", "interrupted\n")


C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "terminal", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, C]
)
def test_a_terminal_without_our_letters_shows_the_others(dataset, terminal):
    done = subprocess.run(
        [sys.executable, "-m", "xtal", "inspect", dataset],
        env=os.environ | terminal,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"| 140 " in done.stdout


@pytest.mark.parametrize("every", [-1.0, 30.0])
def test_a_log_has_the_end_of_work_once(every, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_LINE_EVERY", every)
    with terminal.bar("crystals", None) as update:
        update(1, total=2)
        update(2)
    said = capsys.readouterr().err.splitlines()
    told = [line.partition(" in ")[0] for line in said]
    assert told == ["crystals: 1 of 2", "crystals: 2 of 2"][every > 0 :]


def test_a_wrong_question_is_told_all_that_may_be_asked(dataset, call):
    code, _, said = call("train", dataset, "nowhere", "--task", "al")
    assert code == 2
    assert {*TASKS, "all"} <= set(re.findall(r"\w+", said))


def test_the_same_in_python_with_folders_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    featurize("prototypes:70", "data", FeaturizationConfig(selection="miller:1"), OneProcess())
    assert read_diffraction("data", load("data").ids[0]).formula
    training_run.train("data", "run", TrainingConfig(task="crystal_system", model="majority"))
    assert write_report("run", dataset="data") == Path("run/report.html")
    Path("grid.toml").write_text('dataset = "data"\narms = ["none"]\n')
    assert read_grid("grid.toml").dataset == str(tmp_path / "data")


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


def test_metrics_are_readable_at_80_columns(finished, call):
    folder, done = finished
    code, out, _ = call("evaluate", folder)
    assert code == 0
    answer = json.loads(done.stdout)
    for name, interval in answer["metrics"].items():
        assert name in out
        assert f"{interval['value']:.3f}" in out
    for side, counts in answer["class_counts"].items():
        assert side in out
        assert all(name in out for name in counts)
    assert "…" not in out.replace(" … ", "")  # nothing is cut off
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
    "propensity": (
        ["DATASET", "run", "--out", "x"],
        "members",
        3,
        "ablation.propensity.propensity",
    ),
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


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        (["fetch", "mp", "x.jsonl"], 'from = ["my.jsonl"]', "--from my.jsonl: no such file"),
        (["fetch", "mp", "x.jsonl"], 'from = "my.jsonl"', "'my.jsonl': must be a list of str"),
        (["fetch", "mp", "x.jsonl"], "from = [1]", "from = [1]: must be a list of str"),
        (["verify", "data"], 'source = ["a", "b"]', "data is no finished dataset"),
        (["watch", "nowhere", "--once"], "every = 5", "nowhere"),
        (["watch", "nowhere", "--once"], "every = true", "every = True: must be float"),
        (["ablate", "run", "nowhere.toml"], 'part = "1/2"', "nowhere.toml: no such file"),
        (["inspect", "nowhere"], "picture = 1979-05-27", "must be str"),
    ],
)
def test_a_file_has_options_of_any_type(call, tmp_path, monkeypatch, words, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.toml").write_text(text + "\n")
    code, _, err = call(*words, "--config", "options.toml")
    assert code == 2
    assert said in err
    assert ("options.toml: " in err) == ("must be" in said)


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


def test_dry_run_of_a_grid_counts_and_writes_nothing(call, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("training.dataset.in_memory", None)  # nobody asks for all clouds
    path = grid_file(tmp_path, dataset=os.path.relpath(dataset, tmp_path))
    for words in ((tmp_path / "out", "--dry-run"), ("--dry-run",)):
        code, out, _ = call("ablate", path, *words)
        assert code == 0
        assert "4, of which 0 are done" in out
        assert "basis_only" in out
        assert "pointnet" in out
        assert "hours of one process" in out
        assert "MiB" in out
        assert [p.name for p in tmp_path.iterdir()] == ["grid.toml"]
        assert max(map(len, out.splitlines())) <= 80
    elsewhere = grid_file(tmp_path, dataset="absent")
    assert call("ablate", elsewhere, tmp_path / "out", "--dry-run")[0] == 2
    assert call("ablate", elsewhere, "--dry-run", "--dataset", dataset)[0] == 0
    code, _, err = call("ablate", elsewhere, "--dataset", dataset)
    assert code == 2
    assert "OUT is not given" in err


def test_dry_run_of_a_training_says_what_it_takes_and_writes_nothing(call, dataset, tmp_path):
    words = ["train", dataset, tmp_path / "run", "--task", "crystal_system", "--dry-run"]
    took = {}
    for epochs in (4, 4000):
        code, out, _ = call(*words, "--epochs", epochs)
        assert code == 0
        assert "nothing was trained" in out
        assert max(map(len, out.splitlines())) <= 80
        code, out, _ = call(*words, "--epochs", epochs, "--json")
        found = json.loads(out)
        assert set(found["expected"]) == {"crystals", "time", "memory"}
        amount, unit = found["expected"]["time"].split()[:2]
        size = {"s": 1, "min": 60, "h": 3600}[unit]
        took[epochs] = float(amount) * size
        # Hours are said to a tenth, the others whole.
        assert sum(found["seconds"].values()) == pytest.approx(took[epochs], abs=0.6 * size)
    assert took[4000] > 10 * took[4]
    assert not (tmp_path / "run").exists()
    for more in (["--model", "boosted"], ["--workers", 2]):
        code, out, _ = call(*words, *more)
        assert code == 0
        # Networks train for all their epochs.
        assert ("no early stop of the trees" in " ".join(out.split())) == ("boosted" in more)
    words[4] = "band_gap"
    assert call(*words)[0] == 2


def test_the_status_of_a_grid(call, dataset, tmp_path):
    grid = GridConfig(
        dataset=str(dataset),
        arms=("none", "basis_only"),
        seeds=(0, 1),
        training=tiny(model="majority", trees=1),
    )
    out = tmp_path / "out"
    planned = finished_by_hand(grid, out)
    code, text, _ = call("ablate", "status", out, "--json")
    found = json.loads(text)
    assert code == 0
    counts = {"planned": 2, "done": 2, "failed": 0}
    assert found["tasks"] == {"crystal_system": {"none": counts, "basis_only": counts}}
    assert (found["trials"], found["missing"], found["drivers"]) == (4, 0, [])
    record = Record(out)
    record.add(planned[3].identity | {"status": "failed", "error": "Traceback: it broke"})
    code, text, _ = call("ablate", "status", out)
    assert code == 0
    assert "1/2 ✗1" in text
    assert "it broke" in text
    assert call("ablate", "status", tmp_path / "nothing")[0] == 2


# --- featurize --dry-run --------------------------------------------------------------------------


@pytest.fixture
def crystals(tmp_path, monkeypatch):
    """A folder with 20 crystals in s.jsonl, which are taken four at a time."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("s.jsonl"), [document(f"m{i}", 4 + i / 50) for i in range(20)])
    Path("s.jsonl.gz").write_bytes(gzip.compress(Path("s.jsonl").read_bytes()))
    Path("c.toml").write_text('selection = "miller:2"\nshard_structures = 4\n')
    return tmp_path


def dry(call, *words):
    """Exit code, rows and stderr of a dry run, after which all is as it was."""
    before = contents(Path())
    code, out, err = call("featurize", *words, "--config", "c.toml", "--dry-run")
    assert contents(Path()) == before
    cells = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    return code, {cell[1].strip(): cell[2].strip() for cell in cells if cell[1].strip()}, err


def stop_after(monkeypatch, count):
    """From now on a run is asked to stop at its crystal of this number."""
    entry, seen = worker.entry_of, []

    def counted(crystal, *arguments):
        seen.append(crystal.id)
        if len(seen) == count + 1:  # the first is that of the warm-up
            os.kill(os.getpid(), signal.SIGUSR1)
        return entry(crystal, *arguments)

    monkeypatch.setattr(worker, "entry_of", counted)


@pytest.mark.parametrize("source", ["s.jsonl", "s.jsonl.gz"])
def test_dry_run_says_what_is_left(call, crystals, monkeypatch, source):
    code, rows, err = dry(call, source, "out")
    assert (code, err) == (0, "")
    assert (rows["out"], rows["records"], rows["structures"]) == ("a new dataset", "20", "about 20")
    assert (rows["shards"], rows["points"]) == ("about 5", "about 1,260")
    assert list(crystals.glob("out")) == []
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        assert call("featurize", source, "out", "--config", "c.toml")[0] == 75
    _, rows, _ = dry(call, source, "out")
    assert rows["out"] == "an unfinished run of just this: it goes on"
    assert (rows["records left"], rows["structures"]) == ("12", "about 12")
    assert rows["shards"] == "about 3"
    assert rows["disk needed"].endswith(" 0.0 MiB to read the source")
    shard = min(Path("out/shards").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert dry(call, source, "out")[1]["records left"] == "16"
    shard.write_bytes(whole)
    assert call("featurize", source, "out", "--config", "c.toml")[0] == 0
    code, rows, err = dry(call, source, "out")
    assert (code, err) == (0, "")
    there = "finished, of just this source and configuration: nothing to do"
    assert rows == {"out": there, "structures": "20"}


def test_dry_run_of_a_run_that_lacks_only_its_end(call, crystals, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(driver, "finish", lambda *_: 1 / 0)
        assert call("featurize", "s.jsonl", "out", "--config", "c.toml")[0] == 1
    code, rows, err = dry(call, "s.jsonl", "out")
    assert (code, err, rows["records left"]) == (0, "", "0")


def test_dry_run_counts_the_new_ids(call, crystals):
    assert call("featurize", "s.jsonl", "out", "--config", "c.toml")[0] == 0
    write_lines(Path("t.jsonl"), [document(f"m{i}", 4 + i / 50) for i in range(13, 30)])
    code, rows, err = dry(call, "t.jsonl", "out", "--append")
    assert (code, err) == (0, "")
    assert rows["out"] == "a dataset of 20 structures, which is added to"
    assert (rows["new ids"], rows["ids there already"]) == ("10", "7")
    assert call("featurize", "t.jsonl", "out", "--config", "c.toml", "--append")[0] == 0
    assert read_manifest(Path("out"))["structures"] == 20 + 10
    assert dry(call, "t.jsonl", "out", "--append")[1]["structures"] == "30"


def test_dry_run_refuses_what_the_run_refuses(call, crystals):
    assert call("featurize", "s.jsonl", "done", "--config", "c.toml")[0] == 0
    write_lines(Path("t.jsonl"), [document("new")])
    write_lines(Path("none.jsonl"), [])
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("…")
    for words, problem in (
        (["t.jsonl", "done"], "done holds another dataset (source.sha256: "),
        (["t.jsonl", "done", "--append", "--b-iso", "1"], "config.b_iso: 0.0 there, 1.0 asked for"),
        (["s.jsonl", "mine"], "mine is not empty and holds no dataset (thesis.txt)"),
        (["s.jsonl", "mine", "--append"], "mine holds no dataset"),
        (["s.jsonl", "t.jsonl"], "t.jsonl is a file"),
        (["s.jsonl", "t.jsonl/out"], "cannot write to t.jsonl/out: Not a directory"),
        (["absent.jsonl", "out"], "'absent.jsonl' is no file"),
        (["none.jsonl", "out"], "has no records"),
    ):
        code, rows, err = dry(call, *words)
        assert (code, rows) == (2, {})
        assert problem in err
        assert "remedy: " in err
        if "no records" not in problem:  # a run says its absolute path
            assert call("featurize", *words, "--config", "c.toml") == (2, "", err)


def test_dry_run_ends_in_time(call, crystals, monkeypatch):
    """A crystal that takes too long is rejected as in the run, and many slow ones are not tried."""
    standardize, seen = worker.standardize, []

    def slow(crystal, *arguments):
        seen.append(crystal.id)
        while crystal.id == "m5":
            pass
        return standardize(crystal, *arguments)

    monkeypatch.setattr(worker, "standardize", slow)
    Path("c.toml").write_text('selection = "miller:2"\nmax_seconds = 0.3\n')
    code, rows, err = dry(call, "s.jsonl", "out")
    assert (code, err) == (0, "")
    assert " ".join(rows["sample"].split()).startswith("20 records, 1 rejected, first: guard: took")
    assert rows["structures"] == "about 19"
    assert sorted(seen) == ["", *sorted(f"m{i}" for i in range(20))]  # after a warm-up, each once
    monkeypatch.setattr(worker, "standardize", standardize)
    monkeypatch.setattr(forecast, "_SAMPLE_SECONDS", -1.0)
    code, rows, _ = dry(call, "s.jsonl", "out")
    assert (code, rows["sample"]) == (0, "1 records, 0 rejected")
    assert (rows["structures"], rows["points"]) == ("about 20", "about 1,260")


def test_dry_run_tells_the_disk_that_the_run_takes(call, crystals, monkeypatch):
    source = open_source("s.jsonl.gz")
    nothing = forecast._Left(np.zeros(0, dtype=bool), 1, frozenset(), indexed=False)
    walk = forecast._walk(source, nothing)
    Path("journal").mkdir()
    build_index(source, Path("journal"))
    taken = sum(path.stat().st_size for path in Path("journal").iterdir())
    assert walk.spool + forecast._PLACE_BYTES * walk.records == taken
    full = SimpleNamespace(free=10)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda place: full)
    code, _, err = dry(call, "s.jsonl.gz", "out")
    assert code == 0
    assert "warning: it will not fit: about 0." in err


def test_dry_run_warns_of_what_cannot_be_used(call, crystals):
    write_lines(Path("bad.jsonl"), [broken("a"), broken("b")])
    Path("cut.jsonl.gz").write_bytes(Path("s.jsonl.gz").read_bytes()[:-9])
    code, rows, err = dry(call, "bad.jsonl", "out")
    assert (code, rows["structures"]) == (0, "about 0")
    assert rows["sample"].startswith("2 records, 2 rejected, first: structure: ")
    assert "warning: no crystal of the sample could be featurized" in err
    code, _, err = dry(call, "cut.jsonl.gz", "out")
    assert code == 0
    assert "warning: cut.jsonl.gz ends early: the gzip data is cut off" in err


# --- for other programs --------------------------------------------------------------------------


def test_each_command_can_answer_in_json():
    assert len(COMMANDS) > 18
    without = [n for n, c in COMMANDS.items() if all("--json" not in p.opts for p in c.params)]
    assert without == []


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("featurize prototypes:14 out --selection miller:1", "content_hash"),
        ("featurize prototypes:14 out --selection miller:1 --dry-run", "expected"),
        ("inspect DATASET", "structures"),
        ("inspect DATASET ID", "reflections"),
        ("verify DATASET", "ok"),
        ("train DATASET run --task crystal_system --model majority", "metrics"),
        ("evaluate RUN", "metrics"),
        ("predict RUN prototypes:14 --out t.csv", "predicted"),
        ("report RUN", "report"),
        ("watch RUN --once", "done"),
        ("ablate GRID --dry-run", "expected"),
    ],
)
def test_json_is_alone_on_stdout_and_text_fits_80_columns(
    finished, dataset, call, words, key, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATASET").symlink_to(dataset)
    shutil.copytree(finished[0], tmp_path / "RUN")
    for_words = {"ID": str(load(dataset).ids[0])}
    for_words["GRID"] = str(grid_file(tmp_path, dataset=str(dataset), training=TINY))
    given = [for_words.get(word, word) for word in words.split()]
    code, text, err = call(*given)
    assert code == 0, err
    assert text
    assert max(map(len, (text + err).splitlines())) <= 80 or key == "done"
    for made in ("out", "run"):
        shutil.rmtree(tmp_path / made, ignore_errors=True)
    code, said, err = call(*given, "--json")
    assert code == 0, err
    assert key in json.loads(said)


def test_bash_completes_verbs_and_options(tmp_path):
    script = tmp_path / "complete.sh"
    script.write_text(
        'eval "$(xtal --show-completion bash)"\n'
        'try() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _xtal_completion xtal\n'
        '  echo "${COMPREPLY[@]}"; }\n'
        "try xtal tr\ntry xtal ablate st\ntry xtal train --ta\n"
        "try xtal ablate qu\ntry xtal ablate run qu\n"
        # Of a submission also what goes to the verb.
        "try xtal submit train d r --site s --ep\ntry xtal submit train d r --task sh\n"
        "try xtal submit all d r --task log_s\ntry xtal submit all d r --ta\n"
        "try xtal submit ablate qu\ntry xtal submit all d r --grid pa\n"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = "train status --task quick quick --epochs shear_modulus log_shear_modulus --task"
    expected += " quick paper"
    assert done.stdout.split() == expected.split()
