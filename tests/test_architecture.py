"""What may import what, and what nobody may use; from the source text alone."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT, process

# Imports go only to the left.
ORDER = ("cluster", "featurization", "training", "ablation", "xtal")
MODULES = [
    *(path for package in ORDER[:-1] for path in sorted((ROOT / package).rglob("*.py"))),
    ROOT / "xtal.py",
]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
# The one module that asks the kernel for addresses and free ports.
ASKS_FOR_PORTS = "cluster/ray_node.py"
# Those that speak to servers of data, and name them.
NETWORK_HOMES = {
    ASKS_FOR_PORTS: {"socket"},
    "featurization/web.py": {"requests", "urllib3"},
    "featurization/addresses.py": {"urllib"},
}
NETWORK = {
    "socket",
    "urllib",
    "http",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "urllib3",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imported modules, also of those imported within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def sins(name: str, text: str) -> list[str]:
    """What a module `name` of this text does against the rules."""
    tree = ast.parse(text)
    package = name.split("/")[0].removesuffix(".py")
    found = []
    for module in imports(tree):
        top = module.split(".")[0]
        if top in ORDER and ORDER.index(top) > ORDER.index(package):
            found.append(f"imports {module}, which is to its right")
        allowed = NETWORK_HOMES.get(name, set())
        if top in (FORBIDDEN_MODULES | NETWORK) - allowed:
            found.append(f"imports {module}")
        if top in ("torch", "safetensors", "tensorboard") and package in ORDER[:2]:
            found.append(f"imports {module}")
    for call in calls(tree):
        if call in FORBIDDEN_CALLS or call in (
            "yaml.load",
            "os.system",
            "torch.load",
            "pd.read_pickle",
        ):
            found.append(f"calls {call}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            found.append(f"uses {node.arg}")
    lines = text.count("\n")
    if text and not ast.get_docstring(tree):
        found.append("has no docstring")
    if lines > 300:
        found.append(f"has {lines} lines")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rules(path: Path) -> None:
    assert sins(name_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cluster/a.py", '"""."""\nfrom featurization.crystal import Crystal\n'),
        ("training/a.py", '"""."""\ndef f():\n    import ablation.grid\n'),
        ("featurization/a.py", '"""."""\nimport torch.nn as nn\n'),
        ("ablation/a.py", '"""."""\nfrom xtal import main\n'),
        ("ablation/a.py", '"""."""\nfrom pickle import loads\n'),
        ("ablation/a.py", '"""."""\nx = eval("1")\n'),
        ("ablation/a.py", '"""."""\nnp.load(p, allow_pickle=True)\n'),
        ("ablation/a.py", '"""."""\nimport urllib.request\n'),
        ("ablation/a.py", "x = 1\n"),
        ("ablation/a.py", '"""."""\n' + "x = 1\n" * 300),
    ],
)
def test_the_rules_find_a_sinner(name: str, text: str) -> None:
    assert len(sins(name, text)) == 1


def importers(module: str) -> set[str]:
    return {
        name_of(path)
        for path in MODULES
        if any(
            found.split(".")[0] == module
            for found in imports(ast.parse(path.read_text(encoding="utf-8")))
        )
    }


def test_each_framework_has_its_place() -> None:
    assert importers("mpi4py") == {"cluster/mpi.py"}
    allowed = {"cluster/ray_session.py", "cluster/gauges.py", "training/distributed.py"}
    allowed |= {"ablation/run.py"}
    assert "cluster/ray_session.py" in importers("ray") <= allowed
    assert importers("mp_api") == {"featurization/materials_project.py"}
    assert importers("submitit") == {"cluster/submit.py"}


def test_no_two_modules_of_one_name_shadow_each_other() -> None:
    assert not set(ORDER) & set(sys.stdlib_module_names)
    assert all((ROOT / package / "__init__.py").is_file() for package in ORDER[:-1])


@pytest.mark.parametrize("module", ["featurization.cloud", "featurization.featurize", "xtal"])
def test_light_imports(module: str) -> None:
    script = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = process([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & {"torch", "ray", "mpi4py", "tensorboard", "matplotlib", "plotly"}
