"""Numbers as text: decimal digits of ASCII, within stated bounds, and nothing else that Python takes for a number."""

from __future__ import annotations

import math
import re

_WHOLE = re.compile(r"[-+]?[0-9]{1,40}")
_NUMBER = re.compile(r"[-+]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][-+]?[0-9]{1,6})?")

#: The largest count or seed that torch takes.
LARGEST = 2**63 - 1


def whole(text: str, low: int, high: int = LARGEST) -> int:
    """Return the whole number that a text is, between two bounds.

    Raises:
        ValueError: If it is none; the message names the bounds.

    Example:
        >>> whole("12", 1)
        12
        >>> whole("²", 1, 9)
        Traceback (most recent call last):
            ...
        ValueError: a whole number from 1 to 9
    """
    if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f"a whole number from {low} to {high:,}")
    return int(text)


def number(text: str, *, above: float | None = None) -> float:
    """Return the finite number that a text is, above a bound where one is given.

    Raises:
        ValueError: If it is none; the message names the bound.

    Example:
        >>> number("2e-8", above=0)
        2e-08
    """
    text = text.strip()
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value) or (above is not None and not value > above):
        raise ValueError("a number" if above is None else f"a number above {above:g}")
    return value
