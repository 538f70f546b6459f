"""Small sources for the tests of the driver: cesium chloride cells as Materials Project lines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import xtal
from cluster.mpi import OneProcess
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize

ROOT = Path(__file__).parents[1]
# 63 points a crystal: enough for the bookkeeping, nothing to wait for.
SMALL = FeaturizationConfig(selection="miller:2")


def forked(work: Callable[[], object]) -> int:
    """The id of a process, forked from this one, that does `work` and nothing else."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def document(id: Any, a: float = 4.0, elements: tuple[str, str] = ("Cs", "Cl"), **more: Any) -> Any:
    """A Materials Project document of AB in the cesium chloride structure."""
    places = ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5])
    sites = [
        {"species": [{"element": name, "occu": 1}], "abc": place}
        for name, place in zip(elements, places, strict=True)
    ]
    lattice = {"matrix": [[a, 0, 0], [0, a, 0], [0, 0, a]]}
    return {"material_id": id, "structure": {"lattice": lattice, "sites": sites}} | more


def broken(id: str) -> Any:
    """A document without atoms."""
    return {"material_id": id, "structure": {"lattice": {"matrix": []}, "sites": []}}


def write_lines(path: Path, documents: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    return path


def run(source: Path | str, out: Path, config: FeaturizationConfig = SMALL) -> dict[str, Any]:
    return featurize(str(source), out, config, OneProcess())


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Relative path → bytes and time of the last change, of all files, hidden ones too."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Exit code of `xtal WORDS` within this process; read its output with `capsys`."""
    monkeypatch.setattr(sys, "argv", ["xtal", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        xtal.main()
    return int(stopped.value.code or 0)


def process(
    arguments: list[str | Path], *, timeout: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A process with this checkout importable; a timeout is a failure of the test."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [str(word) for word in arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
        check=False,
    )
