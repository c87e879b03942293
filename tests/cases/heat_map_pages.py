"""A heat map read back as a browser would see it, without one: elements, their classes and their text."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_VOID = {"meta", "link", "input", "br"}


class Element(NamedTuple):
    """An element with its attributes, children (elements and text) and nothing else."""

    name: str
    attributes: dict[str, str | None]
    children: list[Any]

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Return every element below of that name and those attributes, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.name == name and all(child.attributes.get(k) == v for k, v in attributes.items()):
                    found.append(child)
                found += child.all(name, **attributes)
        return found

    def one(self, name: str, **attributes: str) -> Element:
        (found,) = self.all(name, **attributes)
        return found


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document", {}, [])]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), [])
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def page(path: Path) -> Element:
    """Return the whole document; every element has been closed in its order."""
    builder = _Builder()
    builder.feed(path.read_text(encoding="utf-8"))
    builder.close()
    (document,) = builder.open
    return document


def data(document: Element) -> dict[str, np.ndarray]:
    """Return the packed columns by name."""
    plain = json.loads(document.one("script", id="data").text)
    words = {"ints": "<i4", "floats": "<f4"}
    return {n: np.frombuffer(base64.b64decode(x), words[kind]) for kind in words for n, x in plain[kind].items()}
