"""The manual: it builds without a warning, all that it tells to do works, and pages fit."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import nbformat
import pytest
from manual import (
    CHANGES_THE_PROJECT,
    DOCS,
    ELSEWHERE,
    PICTURES,
    Block,
    Reader,
    blocks,
    crystals,
    pages,
    picture,
)
from nbclient import NotebookClient
from PIL import ImageChops, ImageStat
from tiny import ROOT, process
from traitlets.config import Config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MOST_NOT_RUN = 8  # those that need the network
MOST_LINES = 30


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manual as HTML; a warning of the generator is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = process([sys.executable, "-m", "sphinx", "-W", "-q", DOCS, folder], timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """In a folder with crystals of the reader's own."""
    folder = tmp_path_factory.mktemp("reader")
    crystals(folder / "my_crystals.jsonl")
    return Reader(folder)


def test_the_table_of_contents_has_every_page() -> None:
    assert sorted(pages()) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", [page for page in pages() if page not in ELSEWHERE])
def test_what_a_page_says_to_do_works(reader: Reader, page: str) -> None:
    reader.read(page)


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left = [block for page in pages() for block in blocks(page) if block.why is not None]
    assert len(left) <= MOST_NOT_RUN, [block.where for block in left]
    kinds = {block.kind for page in pages() for block in blocks(page)}
    assert kinds == {"sh", "python", "text", "toml", "diff", ""}
    plain = [block for page in pages() for block in blocks(page) if not block.kind]
    command = r"^(\$ |\w+=\S* )*(xtal|python3?|pip|git|bash|mpiexec|srun|sbatch|import|from) "
    assert [block.where for block in plain if re.search(command, block.text, re.M)] == []
    assert re.search(command, "see\nSTAMP=1 python -m build\n", re.M)


def test_changes_that_are_worked_examples_are_small() -> None:
    text = (DOCS / CHANGES_THE_PROJECT).read_text(encoding="utf-8")
    sections = [part.partition("\n") for part in text.split("\n## ")[1:]]
    assert len(sections) == 5
    for title, _, body in sections:
        changed = [
            line
            for diff in re.findall(r"^```diff\n(.*?)^```", body, re.S | re.M)
            for line in diff.splitlines()
            if re.match(r"[+-](?![+-]{2} )", line)
        ]
        new = re.findall(r"^```toml\n(.*?)^```", body, re.S | re.M)
        assert 0 < len(changed) + sum(map(len, map(str.splitlines, new))) <= MOST_LINES, title


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sh", "xtal inspect nowhere\n"),
        ("sh", "false\n"),
        ("sh", "xtal inspect nowhere | cat\n"),
        ("python", "assert 1 == 2\n"),
        ("text", "other words\n"),
        ("toml", "seeds = [0]\n"),
        ("diff", "--- a/xtal.py\n+++ b/xtal.py\n@@ -1,1 +1,1 @@\n-no such line\n+a line\n"),
        ("cobol", "STOP RUN.\n"),
    ],
)
def test_the_reader_stumbles_over_what_is_wrong(reader: Reader, kind: str, text: str) -> None:
    page = CHANGES_THE_PROJECT if kind == "diff" else "x.md"
    with pytest.raises(AssertionError, match=rf"docs/{page}:7"):
        reader.run(Block(page, 7, kind, text, None))


def test_pages_ask_no_other_host_for_anything(site: Path) -> None:
    asked = re.compile(r'(?:<(?:script|img|iframe)\b[^>]*\bsrc|<link\b[^>]*\bhref)="(https?:)?//')
    written = sorted(site.rglob("*.html"))
    assert {path.stem for path in written} >= {Path(page).stem for page in pages()}
    assert [path.name for path in written if asked.search(path.read_text(encoding="utf-8"))] == []
    for path in (site / "_static").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?https?:", path.read_text(encoding="utf-8"))


# Shows each page in frames as wide as a phone and a desktop, and says how wide the page is in them.
FRAMES = """<!doctype html><body><script>
const wide = [];
const asked = PAGES.flatMap((page) => [390, 1280].map((width) => [page, width]));
const next = () => {
  if (!asked.length) {
    document.body.innerHTML = "<pre id=probe></pre>";
    document.getElementById("probe").textContent = JSON.stringify(wide);
    return;
  }
  const [page, width] = asked.shift();
  const frame = document.createElement("iframe");
  Object.assign(frame.style, { width: width + "px", height: "800px", border: 0 });
  frame.onload = () => {
    const inside = frame.contentWindow;
    const root = inside.document.documentElement;
    const images = [...inside.document.images].every((image) => image.naturalWidth > 0);
    wide.push([page, width, inside.innerWidth, root.scrollWidth, root.clientWidth, images]);
    frame.remove();
    next();
  };
  frame.src = page;
  document.body.append(frame);
};
next();
</script>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def address(site: Path, tmp_path: Path) -> Iterator[str]:
    """The manual, and a page that measures it, on the loopback network."""
    names = [f"{Path(page).stem}.html" for page in pages()]
    shutil.copytree(site, tmp_path / "site")
    wide = "<div style='width: 1500px'>wide</div>"
    (tmp_path / "site/too-wide.html").write_text(f"<!doctype html>{wide}")
    text = FRAMES.replace("PAGES", json.dumps([*names, "too-wide.html"]))
    (tmp_path / "site/frames.html").write_text(text)
    handler = functools.partial(_Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_every_page_fits_a_phone_and_a_desktop(address: str, tmp_path: Path) -> None:
    command = [
        str(CHROMIUM),
        "--headless",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=60000",
        "--dump-dom",
        f"{address}/frames.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    measured = json.loads(found[1])
    assert len(measured) == 2 * (len(pages()) + 1)
    *ours, narrow, desktop = measured
    assert [row for row in ours if max(row[3], row[4]) > row[2] or not row[5]] == []
    assert {row[2] for row in ours} == {390, 1280}
    assert narrow[3] > narrow[2]  # the measure sees a page that is too wide
    assert desktop[3] > desktop[2]


def test_pictures_are_what_the_pages_draw(reader: Reader) -> None:
    reader.read("idea.md")
    assert {path.name for path in (DOCS / "pictures").iterdir()} == set(PICTURES)
    for name, (written, width) in PICTURES.items():
        ours = picture(DOCS / "pictures" / name, width)
        fresh = picture(reader.folder / written, width)
        assert ours.size == fresh.size, f"{name}: python tests/manual.py draws it anew"
        apart = ImageStat.Stat(ImageChops.difference(ours, fresh)).mean
        assert max(apart) < 4, f"{name}: python tests/manual.py draws it anew"  # of 255
    cubic, hexagonal = (
        picture(DOCS / "pictures" / f"{n}.png", 300) for n in ("cubic", "hexagonal")
    )
    assert max(ImageStat.Stat(ImageChops.difference(cubic, hexagonal)).mean) > 4


def layout(path: Path) -> dict[str, tuple[str, str, str]]:
    """Dataset of an HDF5 file → its shape in letters, type and unit."""
    found = {}
    with h5py.File(path) as file:
        sizes = {len(file["id"]): "N", len(file["offsets"]): "N+1", len(file["q"]): "P", 3: "3"}
        assert len(sizes) == 4

        def note(name: str, data: h5py.Dataset | h5py.Group) -> None:
            if isinstance(data, h5py.Dataset):
                text = h5py.check_string_dtype(data.dtype) is not None
                shape = "×".join(sizes[length] for length in data.shape)
                kind = "UTF-8" if text else str(data.dtype)
                found[name] = (shape, kind, data.attrs.get("units", ""))

        file.visititems(note)
        assert set(file.attrs) == {"format_version", "config", "content_hash", "attribution"}
    return found


def test_the_layout_of_a_dataset_is_as_the_page_says(reader: Reader) -> None:
    reader.read("files.md")
    page = (DOCS / "files.md").read_text(encoding="utf-8").partition("`dataset.h5` and each")[2]
    rows = re.findall(r"^\| `(\S+)` \| (\S+) \| (\S+) \| (\S*) ?\|", page, re.M)
    said = {name: tuple(rest) for name, *rest in rows}
    data = reader.folder / "both"
    for path in [data / "dataset.h5", *(data / "shards").glob("*.h5")]:
        found = layout(path)
        others = {name for name in found if name.startswith("labels/")} - set(said)
        assert {found.pop(name)[:2] for name in others} == {("N", "float64")}
        assert found == said


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []
    # Sockets of the file system: those of TCP are open to all users of the machine.
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "kernel")}})
    here = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, config=sockets, timeout=600, resources=here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        client.execute()
    said = [
        output.get("text", "") + "".join(output.get("data", {}))
        for cell in cells
        for output in cell.outputs
    ]
    assert any("140 crystals" in text for text in said)
    assert any("image/png" in text for text in said)
    assert any(text.startswith("cubic with probability 0.") for text in said)
    assert any("directions_random" in text and "[" in text for text in said)
