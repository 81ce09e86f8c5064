"""Sphinx settings. `bash tools/docs.sh` builds the pages; the generated ones are written first."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import generate  # noqa: E402

from wsi_common import __version__  # noqa: E402

generate.write_reference(DOCS / "reference")

project = "Whole-slide images: distil, extract, classify"
html_title = "Whole-slide images"
author = "the authors of the repository"
copyright = "the authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]
nitpicky = True
# lines of the shell and of YAML are shown as they are, also where they hold placeholders
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#7a2e6f", "color-brand-content": "#7a2e6f"},
    "dark_css_variables": {"color-brand-primary": "#d9a3d2", "color-brand-content": "#d9a3d2"},
}
