"""The site: pages of this folder, and pages made from the code (`_ext/`) in `_generated/` before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
(HERE / "_generated" / "extra").mkdir(parents=True, exist_ok=True)  # filled before pages are read, looked for sooner
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import funcprobe

project = "funcprobe"
author = "the funcprobe authors"
release = version = funcprobe.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "math_as_markup",
    "made_from_code",
]
templates_path: list[str] = []
exclude_patterns = ["_build", "_ext", "_generated/extra", "_generated/layers-*.md"]
default_role = "code"
nitpicky = False  # types of torch, numpy and pandas stand in signatures, and their inventories are on a network
language = "en"
html_math_renderer = "markup"
add_module_names = False

html_theme = "furo"
html_title = "funcprobe"
html_show_copyright = False
html_static_path = ["_static"]
html_extra_path = ["_generated/extra"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False

myst_enable_extensions = ["deflist", "dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` executes them; the site shows the outputs that are stored
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 88

linkcheck_anchors = False
