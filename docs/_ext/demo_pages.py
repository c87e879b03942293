"""A real result for the pages that explain one: `funcprobe demo`, `sweep` and `attribute`, run when the site is built.

They are run again where the code has changed since; a page that explains fewer lines than the command prints is an
error of the build.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from pathlib import Path

from writing import Folder

from funcprobe.cli.main import main

#: A line of the table of numbers: a label, at least two spaces, a value.
LINE = re.compile(r"^(.+?)\s{2,}\S")

#: Pages that `attribute` writes, put on the site as they are.
PAGES = ("batch.html", "evaluation.html")


def write(root: Path, folder: Folder) -> None:
    """Run the demo if the package has changed, and see that every line of its result is explained."""
    build = root / "docs" / "_build"
    place, stamp = build / "demo", build / "demo.stamp"
    if not stamp.exists() or stamp.read_text() != _digest(root):
        build.mkdir(exist_ok=True)
        for name, words in _commands(place).items():
            (build / f"demo-{name}.txt").write_text(_said(words).replace(str(place), "demo"), encoding="utf-8")
        stamp.write_text(_digest(root))
    for name in _commands(place):
        folder.write(f"demo/{name}.txt", (build / f"demo-{name}.txt").read_text(encoding="utf-8"))
    for path in sorted(place.glob("results*/*.png")):
        folder.write(f"demo/{path.parent.name}-{path.name}", path.read_bytes())
    for page in PAGES:
        folder.write(f"extra/{page}", (place / "results-attribution" / page).read_bytes())
    _check_explained((place / "results" / "summary.txt").read_text(encoding="utf-8"), root / "docs" / "reading.md")


def _commands(place: Path) -> dict[str, list[str]]:
    config = str(place / "config.yaml")
    return {
        "demo": ["demo", "--dir", str(place)],
        "sweep": ["sweep", config, "--lrs", "1e-8:1e-3:11", "--force", "true"],
        "attribute": ["attribute", config, "--force", "true"],
    }


def _said(words: list[str]) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        if main(words):
            raise RuntimeError(f"funcprobe {' '.join(words)} failed")
    return heard.getvalue()


def _digest(root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted((root / "funcprobe").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def labels(summary: str) -> list[str]:
    """Return the labels of a result's lines: of the sizes, of the numbers, and of the tables' heads."""
    found = [m[1].strip() for line in summary.splitlines() if (m := LINE.match(line))]
    return [label for label in found if not label[:1].isdigit() and not label.startswith("›")]


def _check_explained(summary: str, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if missing := [label for label in labels(summary) if f"`{label}`" not in text]:
        raise RuntimeError(f"{page.name} does not explain these lines of a result: {missing}")
