"""Checks of the options of objectives, with calm messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from funcprobe.errors import InputError


def check_choice(option: str, value: Any, valid: tuple[str, ...]) -> None:
    """Check that a word is one of the valid ones.

    Raises:
        InputError: If it is not.
    """
    if value not in valid:
        raise InputError(f"{option} is {value!r}; it must be one of {', '.join(valid)}.")


def check_number(
    option: str, value: Any, expected: str, within: Callable[[float], bool], *, optional: bool = False
) -> None:
    """Check that a value is a finite number `within` a range that `expected` describes, or None where `optional`.

    Raises:
        InputError: If it is not.
    """
    if value is None and optional:
        return
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (numeric and within(value)):
        raise InputError(f"{option} is {value!r}; it must be {expected}{', or none' if optional else ''}.")


def check_seed(option: str, value: Any) -> None:
    """Check that a value can seed a generator.

    Raises:
        InputError: If it is not a whole number from 0 to 2^63 − 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise InputError(f"{option} is {value!r}; it must be a whole number at or above 0.")
