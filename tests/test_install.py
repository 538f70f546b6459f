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


def test_the_readme_names_each_module() -> None:
    text = (ROOT / "README.md").read_text()
    packages = ("cluster", "featurization", "training", "ablation")
    modules = [p for package in packages for p in (ROOT / package).rglob("*.py")]
    missing = [str(p.relative_to(ROOT)) for p in modules if p.name not in text]
    assert [m for m in missing if not m.endswith("__init__.py")] == []


def test_what_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


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
