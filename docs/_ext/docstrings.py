"""Docstrings as Sphinx reads them: they are plain text with `code`, and a bar or a trailing underscore is no markup."""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_MARKUP = re.compile(r"(?<!\\)([|*])|(?<=\w)_(?=\W|$)")


def escaped(line: str) -> str:
    """Return a line with what reStructuredText would take for markup escaped, `code` left out."""
    parts = _CODE.split(line)
    return "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\g<0>", part) for part in parts)


def to_markup(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape the prose of a docstring in place; doctests and indented blocks after `::` stay as they are."""
    is_test = False
    for i, line in enumerate(lines):
        is_test = line.lstrip().startswith(">>>") or (is_test and bool(line.strip()))
        if not is_test:
            lines[i] = escaped(line)
