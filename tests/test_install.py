"""The project as others meet it: the README's commands, and a wheel in a clean environment."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ci_runs_the_test_command_of_the_readme_word_for_word() -> None:
    commands = re.findall(r"^```sh\n(.+?)\n```", (ROOT / "README.md").read_text(), re.S | re.M)
    tests = [c for c in commands if "pytest" in c]
    assert len(tests) == 1
    assert tests[0] in (ROOT / ".ci/run").read_text().splitlines()


def modules_of_the_house(text: str) -> list[str]:
    """Paths of the modules that the page names, each under the folder that its section is of."""
    tree = re.findall(r"^```\n(.+?)^```", text, re.S | re.M)[0]
    home, inner, found = "", "", []
    for line in tree.splitlines():
        if top := re.match(r"(?:(\w+/)|\w+\.py)", line):
            home, inner = top[1] or "", ""
        elif part := re.match(r" +— (\w+/)?", line):
            inner = part[1] or ""
        found += [f"{home}{inner}{name}" for name in re.findall(r"(?<![\w/.-])[\w-]+\.py\b", line)]
    return found


def test_the_page_of_the_house_names_each_module_and_no_other() -> None:
    packages = ("cluster", "featurization", "training", "ablation")
    modules = [p for package in packages for p in (ROOT / package).rglob("*.py")]
    there = [str(p.relative_to(ROOT)) for p in modules if p.name != "__init__.py"]
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    assert sorted(modules_of_the_house(text)) == sorted([*there, "xtal.py"])


def test_the_readme_is_read_in_three_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    tree = re.findall(r"^```\n(.+?)^```", text.partition("## The house")[2], re.S | re.M)[0]
    assert len(tree.splitlines()) <= 24  # the lines of a terminal
    named = re.findall(r"^(\w+)/", tree, re.M)
    there = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and p.name in named]
    assert sorted(there) == sorted(named)
    assert set(named) >= {"cluster", "featurization", "training", "ablation", "slurm", "tests"}


def test_what_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


# What docs/api.md names, as a program of somebody else uses it.
USER = """
from pathlib import Path

from ablation.grid import read_grid
from ablation.perturbations import perturb
from ablation.report import write_report
from ablation.run import run_grid
from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from training.config import TrainingConfig
from training.dataset import load
from training.features import of_structures
from training.predict import Predictor
from training.train import train

reveal_type(featurize("prototypes", Path("d"), FeaturizationConfig(), OneProcess()))
reveal_type([found for _, found in of_structures([], FeaturizationConfig())])
reveal_type(perturb(load(Path("d")), "none", None, 0))
reveal_type(train(Path("d"), Path("r"), TrainingConfig()))
reveal_type(Predictor("r")([]))
reveal_type(run_grid(read_grid(Path("g.toml")), Path("o")))
reveal_type(write_report(Path("o")))
reveal_type(UserError("value and rule", remedy="remedy").remedy)
Predictor(3)
"""
TYPES = [
    "dict[str, Any]",
    "list[featurization.shards.Entry | str]",
    "training.dataset.CloudSet",
    "dict[str, Any]",
    "list[dict[str, Any]]",
    "dict[str, int]",
    "pathlib.Path",
    "str",
]


def types_seen(python: Path, folder: Path) -> tuple[list[str], list[str]]:
    """What mypy says of USER in another environment: types, and errors.

    None of the dependencies is there: what our packages say of their own names is enough.
    """
    (folder / "user.py").write_text(USER)
    command = (sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python))
    done = subprocess.run(
        [*command, "--no-incremental", "user.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    types = re.findall(r'Revealed type is "(.+)"', done.stdout)
    clean = [re.sub(r"builtins\.|typing\.", "", each).replace("Union[", "") for each in types]
    return clean, re.findall(r"error: (.+)", done.stdout)


@pytest.mark.slow
def test_a_wheel_works_in_a_clean_environment_outside_the_checkout(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wheels = tmp_path / "wheels"
    build = ("wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels), str(ROOT))
    run(*pip, *build, cwd=tmp_path)
    (wheel,) = wheels.glob("crystal_genome-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel), cwd=tmp_path)
    types, errors = types_seen(python, tmp_path)
    assert types == TYPES
    assert [error for error in errors if 'Argument 1 to "Predictor"' not in error] == []
    assert len(errors) == 1
    for package in ("cluster", "featurization", "training", "ablation"):
        (marker,) = home.glob(f"lib/*/site-packages/{package}/py.typed")
        marker.rename(marker.with_name("was.typed"))
    assert any("py.typed marker" in error for error in types_seen(python, tmp_path)[1])
    # The dependencies are borrowed from this environment; its editable install is not, because
    # a path file adds a folder without reading the path files in it.
    site = Path(
        run(
            str(python), "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path
        ).strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = run(
        str(python), "-c", "import xtal, ablation.report; print(xtal.__file__)", cwd=tmp_path
    )
    assert where.startswith(str(home))
    script = "from cluster.ray_cluster import GRAFANA; print(*(p.name for p in GRAFANA.iterdir()))"
    files = {"crystal-genome.json", "prometheus.yml", "targets.json"}
    assert files <= set(run(str(python), "-c", script, cwd=tmp_path).split())
    xtal = str(home / "bin" / "xtal")
    assert "featurize" in run(xtal, "--help", cwd=tmp_path)
    run(xtal, "featurize", "prototypes:60", "data", "--selection", "miller:1", cwd=tmp_path)
    run(xtal, "verify", "data", cwd=tmp_path)
    training = ("--task", "crystal_system", "--epochs", "1")
    run(xtal, "train", "data", "run", *training, cwd=tmp_path)
    run(xtal, "report", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
