"""docs/families.md, from the table: `python -m tests.families.page` writes it, and a test holds it to the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from tests.families.adapters import ADAPTERS
from tests.families.checks import CHECKS
from tests.families.dense import DENSE
from tests.families.hybrids import HYBRIDS
from tests.families.mixtures import MIXTURES
from tests.families.others import ENCODERS, MULTIMODAL
from tests.families.subjects import SUBJECTS, Subject

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

CHAPTERS: dict[str, Iterable[Subject]] = {
    "Attention and feed-forward layers": DENSE,
    "Mixtures of experts": MIXTURES,
    "Recurrences, alone and beside attention": HYBRIDS,
    "Images and text, on text": MULTIMODAL,
    "Encoders, and decoders that were encoders": ENCODERS,
    "Adapters": ADAPTERS.values(),
}


def page() -> str:
    """Return the page."""
    lines = ["# Which models are right, and what is refused", "", *_opening(), ""]
    for title, subjects in CHAPTERS.items():
        lines += [f"## {title}", "", *_chapter(subjects), ""]
    return "\n".join(lines)


def _opening() -> list[str]:
    from importlib.metadata import version

    whole = sum(not subject.refused for subject in SUBJECTS.values())
    meaning = [f"* **{name}**: {(check.__doc__ or '').splitlines()[0]}" for name, check in CHECKS.items()]
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "peft"))
    return [
        f"{len(SUBJECTS)} models, tiny and with random weights, are asked the same {len(CHECKS)} things ({versions}).",
        f"{whole} of them are right in everything; of the others a check is right, or refused in one sentence.",
        "The table is what the tests hold to (`tests/families/`); `make families` asks all of it.",
        "",
        *meaning,
    ]


def _chapter(subjects: Iterable[Subject]) -> list[str]:
    rows = [f"| {subject.name} | {subject.why} | {_refusals(subject)} |" for subject in subjects]
    return ["| model | what is special about it | what is refused |", "|---|---|---|", *rows]


def _refusals(subject: Subject) -> str:
    """Return the checks that are refused, those with one reason together."""
    by_reason = itertools.groupby(sorted(subject.refused, key=subject.refused.__getitem__), subject.refused.__getitem__)
    found = []
    for words, checks in by_reason:
        names = set(checks)
        all_of_it = names == CHECKS.keys() - {"untouched"}
        found.append(f"{'everything' if all_of_it else ', '.join(n for n in CHECKS if n in names)}: “… {words} …”")
    return "; ".join(found)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
