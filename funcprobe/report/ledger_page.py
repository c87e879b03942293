"""The page of a run's ledger: one HTML file with its sums, its figure and every window, that loads nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.data.atomic import fresh_file
from funcprobe.report.heat_map import check_place, environment, source
from funcprobe.report.page_parts import image_of, policy_of
from funcprobe.results.blocks import Block, Figure, as_html
from funcprobe.results.books import Books


class Part(NamedTuple):
    """A figure, or blocks between figures, as the page sets them."""

    text: Any = ""  #: markup of this package's own making
    image: str = ""  #: a PNG as a data address
    alt: str = ""


def ledger_page(books: Books, path: str | os.PathLike[str]) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        InputError: If there is no folder for it.
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    from markupsafe import Markup

    path, templates = check_place(path), environment()
    css = source(templates, "ledger.css")
    columns = books.columns()
    given = {
        "title": "The ledger of a run" if books.main is None else f"Who moved {books.main}: the ledger of a run",
        "policy": policy_of(css),
        "css": Markup(css),  # a file of this package, no data
        "parts": list(_parts(books)),
        "names": list(columns),
        "rows": [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)],
    }
    with fresh_file(path, overwrite=True) as partial:
        partial.write_text(templates.get_template("ledger.html.j2").render(**given), encoding="utf-8")
    return path


def _parts(books: Books) -> Iterator[Part]:
    """Yield the blocks in order, those between two figures together; the renderer has escaped their text."""
    from markupsafe import Markup

    waiting: list[Block] = []
    for block in books.blocks():
        if not isinstance(block, Figure):
            waiting.append(block)
            continue
        yield Part(Markup(as_html(waiting)))
        yield Part(image=image_of(books, block), alt=f"{block.name}: the parts of the change, summed over steps")
        waiting = []
    yield Part(Markup(as_html(waiting)))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
