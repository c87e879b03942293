"""Untrusted text on figures: no mathematics, no control marks, no character that the fonts at hand cannot draw."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from funcprobe.visible_text import shortened, visible

if TYPE_CHECKING:
    from matplotlib.text import Text

#: Tried after matplotlib's own font, where they are installed: together they draw most scripts.
_FURTHER = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
    "Noto Sans",
)


def drawable(text: str, width: int | None = None) -> str:
    r"""Return text for a label: dollars are dollars, a character without a glyph is its code, `width` of it are shown.

    Example:
        >>> print(drawable("$x_2$ \U0001f642"))
        \$x_2\$ ‹U+1F642›
    """
    seen = "".join(c if c.isascii() or _has_glyph(c) else f"‹U+{ord(c):04X}›" for c in visible(text))
    return (seen if width is None else shortened(seen, width)).replace("$", r"\$")


def set_families(labels: Sequence[Text]) -> None:
    """Let labels fall back on the fonts that `drawable` counts with."""
    for label in labels:
        label.set_fontfamily(list(_families()))


def _has_glyph(character: str) -> bool:
    return any(ord(character) in glyphs for glyphs in _glyphs())


@functools.cache
def _families() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FURTHER if name in installed))


@functools.cache
def _glyphs() -> tuple[frozenset[int], ...]:
    from matplotlib import font_manager

    fonts: list[Any] = [font_manager.get_font(font_manager.findfont(family)) for family in _families()]
    return tuple(frozenset(font.get_charmap()) for font in fonts)
