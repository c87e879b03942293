"""Makes `docs/_generated/` before Sphinx reads a page: whatever the code can say of itself is never written by hand.

One module a kind of page; each writes its files and returns nothing. A file whose text did not change is left alone, so
that Sphinx does not read it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api_pages
import command_pages
import demo_pages
import docstrings
import graph_pages
import included_pages
from writing import Folder


def make(app: Any) -> None:
    """Write every page that is made from the code."""
    root = Path(app.srcdir).parent
    folder = Folder(Path(app.srcdir) / "_generated")
    for pages in (api_pages, command_pages, demo_pages, graph_pages, included_pages):
        pages.write(root, folder)
    folder.remove_strays()


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", make)
    app.connect("autodoc-process-docstring", docstrings.to_markup, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
