"""The manual as data: its pages in order, their blocks, and a place where the blocks are run."""

import doctest
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from tiny import ROOT
from traitlets.config import Config

import xtal

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "tour.ipynb"
# Page → what runs its blocks instead of this.
ELSEWHERE = {"cluster.md": "tests/slurm"}
# A page whose blocks run in a copy of the project, which its diffs change.
CHANGES_THE_PROJECT = "extend.md"
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^>]+?) -->\n)?^```(?P<kind>\S*)[^\n]*\n(?P<text>.*?)^```$",
    re.S | re.M,
)
_FILE = re.compile(r"# ([\w/.-]+\.(?:toml|cif))\n")
_ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str  # sh, python, text, toml, diff; nothing: not to be done, such as a tree of files
    text: str
    why: str | None  # it is not run

    @property
    def where(self) -> str:
        return f"docs/{self.page}:{self.line}"


def pages() -> list[str]:
    """Names of all pages but the notebook in the order of the table of contents."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^([a-z-]+)$", index, re.M)
    return ["index.md", *(f"{name}.md" for name in named if name != NOTEBOOK.stem)]


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page but for directives of the generator, such as the table of contents."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if not found["kind"].startswith("{"):
            line = text.count("\n", 0, found.start("kind")) + 1
            yield Block(page, line, found["kind"], found["text"], found["why"])


class Reader:
    """Somebody who does what the manual says, page by page, in one folder.

    `xtal` lines are run in this process, which has imported what they need, all others by bash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "crystal-genome"
        self.done: list[str] = []
        self._said = ""
        self._names: dict[str, Any] = {}

    def read(self, page: str) -> None:
        """Run a page, and before it those before it that have not been read."""
        order = pages()
        for each in order[: order.index(page) + 1]:
            if each in self.done or each in ELSEWHERE:
                continue
            self.done.append(each)
            self.read_only(each)

    def read_only(self, page: str) -> None:
        """Run a page that needs nothing of those before it."""
        self._names = {"__name__": "__main__"}
        for block in blocks(page):
            if block.why is None and block.kind:
                self.run(block)

    def run(self, block: Block) -> None:
        """Do what a block says; a failure names the page and the line."""
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            getattr(self, f"_{block.kind}")(block)
        except Exception as error:
            raise AssertionError(f"{block.where}: {error!r}\n{self._said[-3000:]}") from error
        finally:
            os.chdir(here)

    def _toml(self, block: Block) -> None:
        """A file, which its first line names."""
        named = _FILE.match(block.text)
        assert named, "the first line names no file"
        path = (self.copied() if block.page == CHANGES_THE_PROJECT else self.folder) / named[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _python(self, block: Block) -> None:
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(block.text, block.where, "exec"), self._names)
        self._said = out.getvalue()

    def _text(self, block: Block) -> None:
        """A file, or what the block before printed; `...` stands for anything."""
        if _FILE.match(block.text):
            self._toml(block)
            return
        checker = doctest.OutputChecker()
        assert checker.check_output(block.text, self._said, _ALIKE), f"expected:\n{block.text}"

    def _sh(self, block: Block) -> None:
        if block.page == CHANGES_THE_PROJECT:
            self._said = self.bash(block.text, self.copied())
            return
        said = []
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["xtal"] and not re.search(r"[|<>$*;&]", line):
                said.append(_xtal(words[1:]))
            elif words:
                said.append(self.bash(line, None))
            self._said = "".join(said)

    def _diff(self, block: Block) -> None:
        command = ["git", "apply", "-C1", "-v", "-"]
        done = subprocess.run(
            command, cwd=self.copied(), input=block.text, capture_output=True, text=True
        )
        self._said = done.stderr
        assert done.returncode == 0

    def bash(self, text: str, project: Path | None) -> str:
        """What the commands print, run with the project's or this checkout's `xtal`."""
        home = self.folder / "bin"
        home.mkdir(exist_ok=True)
        for name, module in (("xtal", "xtal"), ("pytest", "pytest"), ("ruff", "ruff")):
            script = home / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
            script.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{home}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
            f"{os.environ['PATH']}",
            "PYTHONPATH": str(project or ROOT),
            "NO_COLOR": "1",
            "COLUMNS": "80",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=project or self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._said = done.stdout
        assert done.returncode == 0, f"exit code {done.returncode}"
        return done.stdout

    def copied(self) -> Path:
        """The project, copied once, with the dataset of the pages before."""
        if not self.project.exists():
            kept = ("cluster", "featurization", "training", "ablation", "slurm", "tests", "docs")
            skip = shutil.ignore_patterns("__pycache__")
            for name in kept:
                shutil.copytree(ROOT / name, self.project / name, ignore=skip)
            for name in ("xtal.py", "pyproject.toml"):
                shutil.copy(ROOT / name, self.project / name)
            for name in ("data", "my_crystals.jsonl"):
                (self.project / name).symlink_to(self.folder / name)
            subprocess.run(["git", "init", "-q"], cwd=self.project, check=True)
        return self.project


def _xtal(words: list[str]) -> str:
    """What `xtal WORDS` prints, on a terminal of 80 columns without colour."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["xtal", *words])
        patch.setenv("COLUMNS", "80")
        patch.setenv("NO_COLOR", "1")
        code = None
        try:
            xtal.main()
        except SystemExit as stopped:
            code = stopped.code
    assert not code, f"exit code {code}: {err.getvalue()}"
    return out.getvalue()


def crystals(path: Path) -> None:
    """A reader's own crystals: 140 prototypes as Materials Project documents, with labels.

    The moduli are made up: the fewer Å³ an atom has, the stiffer, which is true on the whole.
    """
    from featurization.sources import open_source

    source = open_source("prototypes:140:5")
    with path.open("w", encoding="utf-8") as stream:
        for record in source.records():
            crystal = source.parse(record)
            volume = crystal.volume / len(crystal.species)
            sites = [
                {"species": [{"element": name, "occu": 1}], "abc": place}
                for name, place in zip(crystal.species, crystal.positions.tolist(), strict=True)
            ]
            document = {
                "material_id": f"my-{record.index}",
                "structure": {"lattice": {"matrix": crystal.lattice.tolist()}, "sites": sites},
                "bulk_modulus": 1700 / volume,
                "shear_modulus": 700 / volume,
                "band_gap": max(0.0, volume / 8 - 2),
                "formation_energy_per_atom": 2 - volume / 9,
            }
            stream.write(json.dumps(document) + "\n")


PICTURES = {  # in docs/pictures → where the pages' commands write it, and its width
    "cubic.png": ("cubic.png", 1200),
    "hexagonal.png": ("hexagonal.png", 1200),
    "arms.png": ("arms.png", 900),
    "effects.png": ("ablation/figures/effects.png", 900),
}


def picture(path: Path, width: int) -> Image.Image:
    """A picture on white, this wide."""
    image = Image.open(path).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return white.resize(
        (width, round(width * image.height / image.width)), Image.Resampling.LANCZOS
    )


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook as it comes out when all its cells are run in a folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Sockets of the file system: those of TCP are open to all users of the machine.
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "kernel")}})
    here = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        NotebookClient(
            notebook, config=sockets, timeout=600, resources=here, record_timing=False
        ).execute()
    notebook.metadata = nbformat.read(NOTEBOOK, as_version=4).metadata  # not this Python's version
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings are of this machine, not of the program
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":  # draws docs/pictures and the notebook anew
    with TemporaryDirectory() as scratch:
        crystals(Path(scratch) / "my_crystals.jsonl")
        someone = Reader(Path(scratch))
        someone.read("idea.md")
        for drawn, (written, wide) in PICTURES.items():
            picture(Path(scratch) / written, wide).save(DOCS / "pictures" / drawn, optimize=True)
        nbformat.write(executed(Path(scratch)), NOTEBOOK)
