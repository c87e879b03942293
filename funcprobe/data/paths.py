"""Paths as people and files give them, made into paths that can be asked for."""

from __future__ import annotations

import os
from pathlib import Path

from funcprobe.errors import InputError

#: Bytes of a path at most: more is no path on any system, and is not asked for.
_LIMIT = 4096


def path_of(value: str | os.PathLike[str], what: str = "The path") -> Path:
    """Return a path with `~` and `~user` in the place of home folders.

    Args:
        value: A path, which need not exist.
        what: What messages call it.

    Raises:
        InputError: If it is empty, holds a NUL character, is longer than any path, or names a user who is not there.

    Example:
        >>> path_of("results")
        PosixPath('results')
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{what} is {type(value).__name__}; expected a path.")
    text = os.fspath(value)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not text.strip():
        raise InputError(f"{what} is empty; expected a path.")
    if "\0" in text:
        raise InputError(f"{what} is {text[:60]!r} and holds a NUL character, which no path does.")
    if len(text) > _LIMIT:
        raise InputError(f"{what} is '{text[:40]}…', of {len(text)} characters; a path has at most {_LIMIT}.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{what} is {text[:60]!r}, and there is no home folder of that user; write it out.") from None
