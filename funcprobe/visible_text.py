"""Text of files, tokens and prompts, made safe to look at: nothing in it moves, hides or drowns the text around it.

Every error and warning of the package goes through here when it is made, every cell of a table when it is shown.
"""

from __future__ import annotations

import re
import unicodedata

#: Joiners inside words and emoji: they move nothing, and without them the text is spelt wrong.
_HARMLESS = "\u200c\u200d"

#: What changes nothing but the direction, layout or display of other text, and what no encoding takes.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"}

#: Marks that stand on one letter in any script; more of them would be stacked over the lines around.
MARKS = 8

#: Characters of a message at most, as a program has it, and as a command says it in one line.
MESSAGE, LINE = 2000, 380


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
    return "".join(_seen(character, breaks) for character in _unstacked(text))


def shortened(text: str, width: int) -> str:
    """Return the beginning of a text, or all of it where it has at most `width` characters.

    Example:
        >>> shortened("What is 2 + 2?", 8)
        'What is…'
    """
    return text if len(text) <= width else text[: max(0, width - 1)].rstrip() + "…"


def bounded(text: str, limit: int) -> str:
    """Return both ends of a text that is longer than `limit`: the place stands first, the remedy last.

    Example:
        >>> bounded("config.yaml: " + "very " * 100 + "long.", 40)
        'config.yaml: very very ve … ry very long.'
    """
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 2].rstrip()} … {text[-tail:].lstrip()}"


def message(text: str) -> str:
    """Return the text of an error or a warning, whatever it quotes: visible, bounded, its line breaks as they are."""
    if len(text) <= MESSAGE and text.isascii() and text.isprintable():
        return text
    text = bounded(text, MESSAGE)
    return "\n".join(visible(line) for line in text.split("\n"))


def calm(text: str, limit: int = LINE) -> str:
    """Return a message as one line."""
    return bounded(visible(" ".join(bounded(text, 4 * MESSAGE).split())), limit)


def _unstacked(text: str) -> str:
    """Return a text without the marks beyond those that a letter can carry."""
    return text if text.isascii() else _STACKED.sub(lambda found: f"{found[1]}‹+{len(found[2])}›", text)


def _seen(character: str, breaks: bool) -> str:
    if character == "\n":
        return "⏎\n" if breaks else "⏎"
    if character == "\t":
        return "⇥"
    if character not in _HARMLESS and unicodedata.category(character) in _UNSEEN:
        return f"‹U+{ord(character):04X}›"
    return character


#: A pile of marks of the blocks that hold nothing but such marks; what scripts are written with is in others.
_STACKED = re.compile(
    rf"([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{{{MARKS}}})"
    r"([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+)"
)
