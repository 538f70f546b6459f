"""The manual: `python -m sphinx -W docs build/docs`, then open build/docs/index.html."""

import re
from typing import Any

from sphinx.application import Sphinx

# Imported by autodoc, pydantic's models break.
import ablation.report
import ablation.run  # noqa: F401

project = "crystal-genome"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
highlight_language = "none"
myst_heading_anchors = 3  # [text](page.md#heading), as on GitHub
html_theme = "furo"  # brings its own fonts and scripts: a page asks no other host for anything
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
        lines.insert(0, "")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _plain, priority=100)
