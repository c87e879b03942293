"""A token heat map: one self-contained HTML page on which every completion token is coloured by its contribution."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from funcprobe.data.atomic import fresh_file
from funcprobe.errors import InputError, missing_extra
from funcprobe.report.heat_map_page import Page, page_of, signed
from funcprobe.results.parts import Batch, Parts

if TYPE_CHECKING:
    from jinja2 import Environment

#: So many tokens stand on a page at most; of a larger batch, the sequences that contributed most.
LIMIT = 300_000


def heat_map(attribution: Parts, path: str | os.PathLike[str], of: Batch = "batch", *, limit: int = LIMIT) -> Path:
    """Write a page of the tokens of U, or of E with `of="evaluation"`, and return its path; a file there is replaced.

    Tokens that raise the observable are orange with a line above, those that lower it blue with a line below, in
    classes of size whose borders the legend names. Hovering, touching or the arrow keys show a token's numbers. The
    page loads nothing, reads without scripts, prints with its legend, and takes the text of tokens for text alone. Of a
    batch of more than `limit` tokens it shows the sequences with the largest |contribution|, and says so.

    Raises:
        InputError: If there is no such batch, the limit is below 1, or there is no folder for the page.
        MissingExtraError: If jinja2 is not installed.
    """
    if of not in ("batch", "evaluation"):
        raise InputError(f"Unknown batch {of!r}; expected 'batch' (U) or 'evaluation' (E).")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(f"limit is {limit!r}; expected a whole number of tokens, at least 1.")
    path = check_place(path)
    templates = environment()
    with fresh_file(path, overwrite=True) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(_chunks(templates, page_of(attribution, of, limit)))
    return path


def environment() -> Environment:
    """Return the renderer of this package's templates: everything put into them is escaped.

    Raises:
        MissingExtraError: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        missing = missing_extra("jinja2", "app", "writing a heat map")
        raise missing from error
    environment = Environment(
        loader=PackageLoader("funcprobe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keys stay in their order
    return environment


def _chunks(templates: Environment, page: Page) -> Iterator[str]:
    """Yield the page piece by piece; its policy lets a browser run its own script and style, and load nothing."""
    from markupsafe import Markup

    parts = {kind: source(templates, f"heat_map.{kind}") for kind in ("css", "js")}
    policy = f"default-src 'none'; style-src '{digest(parts['css'])}'; script-src '{digest(parts['js'])}'"
    trusted = {kind: Markup(text) for kind, text in parts.items()}  # files of this package, no data
    yield from templates.get_template("heat_map.html.j2").generate(page=page, signed=signed, policy=policy, **trusted)


def source(templates: Environment, name: str) -> str:
    """Return the text of one of this package's files."""
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def digest(text: str) -> str:
    """Return the digest by which a page's policy lets a browser use its own style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def check_place(path: str | os.PathLike[str]) -> Path:
    """Return the path of a page that is to be written.

    Raises:
        InputError: If it is a folder, or there is no folder for it.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: {_obstacle(path)}.")
    return path


def _obstacle(path: Path) -> str:
    return "it is a folder; give the name of a file" if path.is_dir() else f"there is no folder '{path.parent}'"
