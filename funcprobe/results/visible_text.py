"""Text of tokens and prompts, made safe to look at: nothing in it moves, hides or colours the text around it."""

from __future__ import annotations

import unicodedata

#: Joiners inside words and emoji: they move nothing, and without them the text is spelt wrong.
_HARMLESS = "\u200c\u200d"

#: What changes nothing but the direction, layout or display of other text, and what no encoding takes.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"}


def visible(text: str, breaks: bool = False) -> str:
    r"""Return text in which control and direction marks are seen and do nothing; with `breaks`, a newline still breaks.

    Example:
        >>> visible("a\nb\x1b[31m\u202e")
        'a⏎b‹U+001B›[31m‹U+202E›'
        >>> visible("a\nb", breaks=True)
        'a⏎\nb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_seen(character, breaks) for character in text)


def shortened(text: str, width: int) -> str:
    """Return the beginning of a text, or all of it where it has at most `width` characters.

    Example:
        >>> shortened("What is 2 + 2?", 8)
        'What is…'
    """
    return text if len(text) <= width else text[: max(0, width - 1)].rstrip() + "…"


def _seen(character: str, breaks: bool) -> str:
    if character == "\n":
        return "⏎\n" if breaks else "⏎"
    if character == "\t":
        return "⇥"
    if character not in _HARMLESS and unicodedata.category(character) in _UNSEEN:
        return f"‹U+{ord(character):04X}›"
    return character
