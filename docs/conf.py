"""The manual: `python -m sphinx -W docs build/docs`, then open build/docs/index.html."""

import re
from typing import Any

import nbformat
from docutils.nodes import document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

# Imported by autodoc, pydantic's models break.
import ablation.report
import ablation.run  # noqa: F401
from ablation.grid import ArmChoice, GridConfig

# Without pydantic's own words.
GridConfig.__annotations__["arms"] = tuple[ArmChoice | str, ...]

project = "crystal-genome"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
highlight_language = "none"
smartquotes = False  # an option begins with two dashes
myst_heading_anchors = 3  # [text](page.md#heading), as on GitHub
html_theme = "furo"  # brings its own fonts and scripts: a page asks no other host for anything
html_static_path = ["manual.css"]
html_css_files = ["manual.css"]
html_title = project
html_copy_source = False
html_show_copyright = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"


def _plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text: `code` is code, and |q| a length, no substitution.

    Before napoleon, which takes what stands before a colon in an attribute's first line, or within
    backticks, for a type.
    """
    lines[:] = [
        re.sub(r"`[^`]+`|\|", lambda m: f"`{m[0]}`\\ " if m[0] != "|" else r"\|", line)
        for line in lines
    ]
    if what in ("attribute", "property"):
        lines.insert(0, "\\")  # which is no type, and is not seen


class Notebook(MystParser):  # type: ignore[misc]
    """A notebook with what its cells have put out, read as Markdown."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: document) -> None:
        parts = []
        for cell in nbformat.reads(inputstring, as_version=4).cells:
            code = cell.cell_type == "code"
            parts.append(f"```python\n{cell.source}\n```" if code else cell.source)
            for output in cell.get("outputs", []):
                if "text" in output:
                    parts.append(f"```text\n{output.text}```")
                if png := output.get("data", {}).get("image/png"):
                    parts.append(f"![what the cell shows](data:image/png;base64,{png.strip()})")
        super().parse("\n\n".join(parts), document)


def setup(app: Sphinx) -> None:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(Notebook)
    app.connect("autodoc-process-docstring", _plain, priority=100)
