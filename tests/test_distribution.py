"""What is installed and what is shipped: reasons, licences, exact versions, equal bytes."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, version
from pathlib import Path

import pytest
from test_architecture import ORDER, imports
from tiny import ROOT

TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
DEPENDENCIES = ROOT / "docs" / "dependencies.md"


def reasons(text: str) -> dict[str, str]:
    """Dependency → its reason, of all lines of a pyproject.toml."""
    return dict(re.findall(r'^ +"([\w-]+)(?:\[\w+\])?[<>=][^"]*", *# (.+)$', text, re.M))


def direct() -> list[str]:
    """Names of all direct dependencies, of the extras too."""
    optional = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    names = [re.split(r"[\[<>=]", each)[0] for each in PROJECT["dependencies"] + optional]
    return [name for name in names if name != PROJECT["name"]]


def licence(name: str) -> str:
    """Of an installed package, as its metadata have it."""
    found = metadata(name)
    short = found["License"] if len(found["License"] or "") in range(1, 40) else None
    classes = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier", []) if "License" in c]
    return str(found["License-Expression"] or short or " or ".join(classes))


def pinned(path: Path) -> dict[str, str]:
    """name → version."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


CONSTRAINTS = pinned(ROOT / "constraints.txt")
HOLDERS = functools.cache(packages_distributions)  # module → distributions
# A part of another distribution, which fixes its version.
PARTS = {"pydantic-core": "pydantic"}


def test_each_dependency_has_a_reason_and_an_exact_version() -> None:
    assert len(direct()) > 25
    assert [name for name in direct() if name not in reasons(TEXT)] == []
    assert [name for name in direct() if name not in CONSTRAINTS] == []
    assert "numpy" not in reasons(TEXT.replace("# arrays", "arrays"))


def undeclared(text: str, own: set[str]) -> set[str]:
    """Modules of others that a module of this text imports and pyproject.toml does not name.

    A benchmark may say itself what more it needs.
    """
    tree = ast.parse(text)
    known = {*direct(), *re.findall(r"`pip install ([\w-]+)`", ast.get_docstring(tree) or "")}
    tops = {name.partition(".")[0] for name in imports(tree)}
    return {
        top
        for top in tops - own - sys.stdlib_module_names
        if not known & {PARTS.get(name, name) for name in distributions(top)}
    }


def distributions(module: str) -> set[str]:
    """That bring a module; one that is not installed is thought to be called as it is."""
    found = HOLDERS().get(module, [module])
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def test_what_is_imported_is_declared() -> None:
    folders = (*ORDER[:-1], "tests", "benchmarks")
    paths = [ROOT / "xtal.py", *(p for folder in folders for p in (ROOT / folder).rglob("*.py"))]
    own = {*ORDER, "benchmarks", *(p.stem for p in paths if p.parts[-2] in ("tests", "slurm"))}
    found = {str(p): undeclared(p.read_text(encoding="utf-8"), own) for p in paths}
    assert {name: missing for name, missing in found.items() if missing} == {}
    text = "import numpy.linalg\nfrom jupyter_client import manager\nimport nowhere, os, tiny\n"
    assert undeclared(text, own) == {"jupyter_client", "nowhere"}


def rows() -> dict[str, tuple[str, str]]:
    """Dependency → licence and reason, as the page lists them."""
    text = DEPENDENCIES.read_text(encoding="utf-8")
    found = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", text, re.M)
    return {name: (licence, why) for name, licence, why in found}


def test_the_page_lists_each_dependency_with_the_reason_of_pyproject() -> None:
    assert {name: why for name, (_, why) in rows().items()} == {
        name: reasons(TEXT)[name] for name in direct()
    }


@pytest.mark.parametrize("name", direct())
def test_licences_are_those_of_the_installed_packages(name: str) -> None:
    try:
        if version(name).partition("+")[0] != CONSTRAINTS[name]:
            pytest.skip("another version is installed than constraints.txt has")
    except PackageNotFoundError:
        pytest.skip("not installed")
    assert rows()[name][0] == licence(name)


COPYLEFT = re.compile(r"GPL|GNU|\bMPL|Mozilla|EUPL|European Union Public")


def all_said_of_licence(name: str) -> str:
    """Whatever the metadata of an installed package say of its licence, but for its text."""
    found = metadata(name)
    classes = [each for each in found.get_all("Classifier", []) if each.startswith("License")]
    short = found["License"] if len(found["License"] or "") < 100 else None
    return " ".join(filter(None, [found["License-Expression"], short, *classes]))


def test_the_page_names_what_is_installed_under_a_copyleft() -> None:
    text = DEPENDENCIES.read_text(encoding="utf-8").partition("\n## ")[0].rpartition("|\n")[2]
    found = set()
    for name in pinned(ROOT / "requirements.lock"):
        with suppress(PackageNotFoundError):
            if COPYLEFT.search(all_said_of_licence(name)):
                found.add(name)
    assert found >= {"gemmi", "certifi"}
    assert found - set(re.findall(r"`([\w-]+)`", text)) == set()


def test_the_lock_has_the_versions_of_the_constraints_each_with_its_hashes() -> None:
    path = ROOT / "requirements.lock"
    locked = pinned(path)
    assert {name: locked.get(name) for name in CONSTRAINTS} == CONSTRAINTS
    blocks = re.split(r"^(?=[\w.-]+==)", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(blocks) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)


# What the manual lets its reader write beside the program.
PRIVATE = (
    "site.toml",
    "my_crystals.jsonl",
    "my_crystals.jsonl.snapshot.json",
    "predictions.csv",
    "data/manifest.json",
    "run/model.safetensors",
)


def built(folder: Path, mode: int, time: int) -> dict[str, bytes]:
    """Name → bytes of wheel and sdist, from a copy in `folder` of files of this mode and time."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "runs", "shared"
    )
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=ignored)
    for name in PRIVATE:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("of the user")
    for path in copy.rglob("*"):
        os.utime(path, (time, time))
        if path.is_file():
            path.chmod(mode | (0o100 if path.stat().st_mode & 0o100 else 0))
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(folder / "out")]
    stamp = {"SOURCE_DATE_EPOCH": "1767225600", "TZ": "UTC" if mode == 0o600 else "Asia/Tokyo"}
    done = subprocess.run(
        words,
        cwd=copy,
        env=os.environ | stamp,
        umask=0o077 if mode == 0o600 else 0o022,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_wheel_and_sdist_are_the_same_bytes_wherever_and_whenever_built(tmp_path: Path) -> None:
    one = built(tmp_path / "a", 0o644, 1_600_000_000)
    other = built(tmp_path / "somewhere" / "else", 0o600, 1_700_000_000)
    name = f"crystal_genome-{PROJECT['version']}"
    assert set(one) == {f"{name}-py3-none-any.whl", f"{name}.tar.gz"}
    for each, data in one.items():
        assert other[each] == data, each
    with tarfile.open(tmp_path / "a" / "out" / f"{name}.tar.gz") as sdist:
        shipped = {each.partition("/")[2] for each in sdist.getnames()}
    assert set(PRIVATE) & shipped == set()
    if (ROOT / ".git").exists():
        ours = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
        assert shipped - set(ours) == {"PKG-INFO"}
        assert {each for each in ours if (ROOT / each).exists()} <= shipped
    with zipfile.ZipFile(tmp_path / "a" / "out" / f"{name}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    assert {"xtal.py", "ablation/report.html", "slurm/train.sbatch"} <= names
    assert not any(each.startswith(("tests/", "benchmarks/", "docs/")) for each in names)
