"""The place of this process among those that torchrun, or something that sets the same variables, has started."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started beside others.

    Example:
        >>> is_launched({"RANK": "0", "WORLD_SIZE": "2"}), is_launched({"WORLD_SIZE": "1", "RANK": "0"})
        (True, False)
    """
    return _number(environment, "RANK") is not None and (_number(environment, "WORLD_SIZE") or 1) > 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is alone, or the first of those that were started: the one that speaks and writes.

    Example:
        >>> is_first({"RANK": "1", "WORLD_SIZE": "2"}), is_first({"RANK": "0", "WORLD_SIZE": "2"}), is_first({})
        (False, True, True)
    """
    return not is_launched(environment) or _number(environment, "RANK") == 0


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None
