"""How Sphinx builds the documentation: `make docs`. Neither it nor a reader's browser fetches anything."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "pidpool"
copyright = "pidpool contributors"
release = version = version_of("pidpool")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "metrics_table"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# In docstrings a name in single backquotes is a link if the page of it is here, and otherwise code.
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
# Types of other packages, which no page here describes.
nitpicky = False

html_theme = "furo"
html_title = "pidpool"
html_static_path = ["static"]
html_css_files = ["page.css"]
html_js_files = [("barriers.js", {"defer": "defer"})]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def show_examples_as_code(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Make the example that ends a command's help a block of code; its lines come with ``| `` before them."""
    examples = [line.removeprefix("| ").strip() for line in lines if line.startswith("|   ")]
    lines[:] = ["Example::", "", *(f"    {example}" for example in examples), ""]


def show_options_as_code(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Make code of the options that help texts name: otherwise their hyphens become a dash."""
    lines[:] = [
        line if ".. option::" in line else re.sub(r"(?<![\w`-])--[a-z]+", r"``\g<0>``", line)
        for line in lines
    ]


def setup(app: Sphinx) -> None:
    app.connect("sphinx-click-process-epilog", show_examples_as_code)
    app.connect("sphinx-click-process-description", show_options_as_code)
    app.connect("sphinx-click-process-options", show_options_as_code)
