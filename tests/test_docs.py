"""The manual: it builds without a warning, all that it tells to do works, and pages fit."""

import ast
import base64
import html
import re
import shlex
import shutil
import sys
from io import BytesIO
from pathlib import Path

import h5py
import matplotlib
import nbformat
import numpy as np
import pytest
import typer
from browser import needs_chromium, seen
from manual import (
    CHANGES_THE_PROJECT,
    DOCS,
    ELSEWHERE,
    NOTEBOOK,
    PICTURES,
    Block,
    Reader,
    blocks,
    crystals,
    executed,
    pages,
    picture,
)
from matplotlib.colors import to_rgb
from PIL import Image, ImageChops, ImageStat
from test_architecture import ORDER
from tiny import ROOT, process

import xtal
from ablation.grid import GridConfig
from featurization.config import FeaturizationConfig
from featurization.inspection_figure import _ACCENT
from training.config import TrainingConfig

MOST_NOT_RUN = 8  # those that need the network
MOST_LINES = 30
USAGE_ERROR = typer.BadParameter.__base__  # typer does not name it


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


def test_no_page_holds_a_merge_that_was_left() -> None:
    for page in (ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")):
        assert not re.search(r"^(<{7}|>{7}|={7}$)", page.read_text(encoding="utf-8"), re.M), page


def calls(text: str) -> list[list[str]]:
    """The words of each call of `xtal` in a block, or after a `&&`."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    ours = [line.strip() for line in lines if re.match(r"\s*(\S*/)?xtal\s", line)]
    return [shlex.split(line, comments=True)[1:] for line in ours]


def understood(words: list[str]) -> None:
    """Let Click read the words of a call, and the verb of `xtal submit` those that are for it."""
    command, rest = typer.main.get_command(xtal.app), list(words)
    name = "xtal"
    while hasattr(command, "commands"):
        known = not rest or rest[0] in command.commands
        name = rest.pop(0) if known else "run"  # of ablate
        command = command.commands[name]
    context = command.make_context(name, rest)
    if words[0] == "submit" and context.args:
        understood([name, "one", "other", *context.args])


def test_calls_that_nothing_runs_have_verbs_and_options_that_are_there() -> None:
    texts = [block.text for block in blocks("../README.md")]
    left = [b for page in pages() for b in blocks(page) if b.why or page in ELSEWHERE]
    texts += [block.text for block in left if block.kind == "sh"]
    found = [words for text in texts for words in calls(text)]
    assert len(found) > 25
    assert {words[0] for words in found} >= {"demo", "featurize", "fetch", "submit", "ablate"}
    for words in found:
        understood(words)
    for stale in ("train data run --epoch 3", "fetch gnome x", "submit train a b --site s --tsk x"):
        with pytest.raises((USAGE_ERROR, KeyError)):
            understood(stale.split())


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


OTHERS = """
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from manual import Reader

for page in ("conventions.md", "api.md"):
    Reader(Path(sys.argv[1])).read_only(page)
"""


def test_changes_that_are_worked_examples_leave_the_rest_true(
    reader: Reader, tmp_path: Path
) -> None:
    reader.read(CHANGES_THE_PROJECT)
    names = ("architecture", "install", "arms", "cli", "ablation", "dataset")
    tests = [f"tests/test_{name}.py" for name in names]
    which = "page_of_the_house or table_of_arms or every_name or grids_that_come or positive_class"
    which += " or test_rules"
    reader.bash(f"pytest -q -p no:cacheprovider {' '.join(tests)} -k '{which}'", reader.copied())
    (tmp_path / "others.py").write_text(OTHERS, encoding="utf-8")
    reader.bash(f"python {tmp_path}/others.py {tmp_path}", reader.copied())


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


def test_the_reference_says_what_the_docstrings_say(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    for kind in (FeaturizationConfig, TrainingConfig, GridConfig):
        for name, field in kind.model_fields.items():
            said = " ".join(str(field.description).replace("`", "").split())
            assert said in text, f"{kind.__name__}.{name}"
    assert "model_config" not in text
    assert "GetPydanticSchema" not in text


@needs_chromium
def test_every_page_fits_a_phone_and_a_desktop(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    names = [f"{Path(page).stem}.html" for page in (*pages(), NOTEBOOK)]
    rows, _ = seen(tmp_path / "site", names)
    assert len(rows) == 2 * len(names)
    assert [row for row in rows if row["taken"] > row["width"] or not all(row["images"])] == []


def alike(ours: Image.Image, fresh: Image.Image) -> bool:
    """Whether two pictures differ little; another Matplotlib than the pinned sets other places."""
    pinned = f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text()
    return not pinned or max(ImageStat.Stat(ImageChops.difference(ours, fresh)).mean) < 4  # of 255


def test_pictures_are_what_the_pages_draw(reader: Reader) -> None:
    reader.read("idea.md")
    assert {path.name for path in (DOCS / "pictures").iterdir()} == set(PICTURES)
    for name, (written, width) in PICTURES.items():
        ours = picture(DOCS / "pictures" / name, width)
        fresh = picture(reader.folder / written, width)
        assert ours.size == fresh.size, f"{name}: python tests/manual.py draws it anew"
        assert alike(ours, fresh), f"{name}: python tests/manual.py draws it anew"
        if name in ("cubic.png", "hexagonal.png"):  # not a grey like it
            accent = 255 * np.array(to_rgb(_ACCENT))
            near = np.abs(np.asarray(ours) - accent).max(axis=-1) < 8
            assert near.sum() > 50, f"{name}: python tests/manual.py draws it anew"
    cubic, hexagonal = (
        picture(DOCS / "pictures" / f"{n}.png", 300) for n in ("cubic", "hexagonal")
    )
    assert max(ImageStat.Stat(ImageChops.difference(cubic, hexagonal)).mean) > 4


def programs() -> dict[str, str]:
    """The programs of the page about Python and of the notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return {
        "page": "".join(block.text for block in blocks("api.md") if block.kind == "python"),
        "notebook": re.sub(r"^%.*", "", "\n".join(cells), flags=re.M),
    }


def test_documented_programs_are_typed(tmp_path: Path) -> None:
    for name, text in programs().items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--strict"]
    command += ["--cache-dir", ROOT / ".mypy_cache", *tmp_path.glob("*.py")]
    done = process(command, timeout=600, MYPYPATH=str(ROOT))
    assert done.returncode == 0, done.stdout


def test_the_reference_has_what_the_notebook_and_the_examples_import() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.M))
    used = {
        f"{node.module}.{name.name}"
        for text in programs().values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ORDER
        for name in node.names
    }
    assert len(used) > 10
    assert used - listed == set()


def test_the_page_about_the_report_says_where_its_tables_lie(reader: Reader) -> None:
    reader.read("report.md")
    folder = reader.folder / "ablation"
    text = (DOCS / "report.md").read_text(encoding="utf-8").partition("From top to")[0]
    beside = set(re.findall(r"`(\w+)\.parquet`", text))
    assert all((folder / f"{name}.parquet").is_file() for name in beside)
    in_two_forms = [
        {p.stem for p in folder.glob(f"tables/*.{kind}")} for kind in ("csv", "parquet")
    ]
    assert in_two_forms[0] - in_two_forms[1] == beside


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


def shown(notebook: nbformat.NotebookNode) -> tuple[list[str], list[Image.Image]]:
    """What its cells have put out: texts, whose numbers may differ by machine, and pictures."""
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    found = [each.data["image/png"] for each in outputs if "image/png" in each.get("data", {})]
    pictures = [Image.open(BytesIO(base64.b64decode(png))).convert("RGB") for png in found]
    return [each.text for each in outputs if "text" in each], pictures


def test_the_notebook_shows_what_its_cells_put_out(tmp_path: Path) -> None:
    texts, pictures = shown(nbformat.read(NOTEBOOK, as_version=4))
    fresh_texts, fresh_pictures = shown(executed(tmp_path))
    anew = "python tests/manual.py draws it anew"
    number = r"[+-]?\d+(\.\d+)?"
    for ours, fresh in zip(texts, fresh_texts, strict=True):
        assert re.sub(number, "#", ours) == re.sub(number, "#", fresh), anew
    for ours, fresh in zip(pictures, fresh_pictures, strict=True):
        assert alike(ours, fresh), anew
    said = "".join(texts)
    for words in ("140 crystals", "cubic with probability 0.", "directions_random "):
        assert words in said
    assert len(pictures) == 1
    assert NOTEBOOK.stat().st_size < 250_000


def test_the_manual_has_the_notebook_with_what_it_shows(site: Path) -> None:
    page = (site / "tour.html").read_text(encoding="utf-8")
    texts, pictures = shown(nbformat.read(NOTEBOOK, as_version=4))
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert all(line in page for text in texts for line in text.split("\n") if "'" not in line)
