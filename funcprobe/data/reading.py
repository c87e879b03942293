"""Text formats, read within bounds: the one way in which JSON, YAML and plain text come in.

A file is an ordinary one, not endless, not larger than its bound, and UTF-8; JSON in it is not nested deeply and holds
no integer of thousands of digits. What is read is data, whoever wrote it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from funcprobe.errors import InputError

MIB = 2**20

#: Digits of an integer in JSON at most; a float has 309 before its point.
DIGITS = 400


def check_ordinary(path: Path) -> Path:
    """Return a path that is an ordinary file, or leads to one.

    Raises:
        InputError: If there is nothing, a folder, a device, a pipe or a socket; the message begins with the path.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):  # a name that no file system can hold
        raise InputError(f"{path}: there is no such file; check the path.", kind="absent") from None
    except OSError as error:
        raise InputError(f"{path}: it cannot be read ({error.strerror}).") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: this is a folder; expected a file.")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: this is a device, a pipe or a socket; expected an ordinary file.")
    return path


def bytes_of(path: Path, limit: int) -> bytes:
    """Return the content of an ordinary file of at most `limit` bytes.

    Raises:
        InputError: If it is none, is larger, or cannot be read; the message begins with the path.
    """
    check_ordinary(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: it cannot be read ({error.strerror}).") from None
    if len(content) > limit:
        raise InputError(f"{path}: the file has {size:,} bytes; expected at most {limit:,} of one that is read whole.")
    return content


def text_of(path: Path, limit: int = MIB) -> str:
    """Return the text of an ordinary file of at most `limit` bytes in UTF-8, without its byte order mark.

    Raises:
        InputError: If it is none; the message begins with the path.
    """
    try:
        return bytes_of(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def json_of(path: Path, limit: int = 64 * MIB) -> Any:
    """Return the value in a JSON file.

    Raises:
        InputError: If it is no ordinary file, too large, or not JSON; the message begins with the path.
    """
    text = text_of(path, limit)
    try:
        return parsed(text)
    except ValueError as error:
        raise InputError(f"{path}: this is not JSON ({error}); the file is damaged.") from None


def json_object(path: Path, limit: int = 64 * MIB) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InputError: If it holds something else; the message begins with the path.
    """
    found = json_of(path, limit)
    if not isinstance(found, dict):
        raise InputError(f"{path}: this is a JSON {type(found).__name__}; expected an object. The file is damaged.")
    return found


def parsed(text: str | bytes, **options: Any) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is none, is nested too deeply, or holds an integer of more than 400 digits.
    """
    try:
        return json.loads(text, parse_int=_integer, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer has {len(text):,} digits, expected at most {DIGITS}")
    return int(text)
