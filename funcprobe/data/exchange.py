"""Renaming that replaces nothing by accident, and that swaps two folders at once, where the system can do either."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

#: Flags of Linux's renameat2, and the folder that relative paths start from.
_NOREPLACE, _EXCHANGE, _HERE = 1, 2, -100

#: What a file system answers that does not know a flag.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def place(new: Path, target: Path) -> bool:
    """Rename `new` to `target` if nothing stands there, and return whether it did."""
    try:
        if not _renamed(new, target, _NOREPLACE):
            if os.path.lexists(target):
                return False
            new.rename(target)
    except FileExistsError:
        return False
    return True


def exchange(new: Path, target: Path) -> bool:
    """Swap two folders in one operation, and return whether the system has one; without it nothing has changed."""
    return _renamed(new, target, _EXCHANGE)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the end of the block, so that a folder that is renamed is also known to be."""
    if threading.current_thread() is not threading.main_thread():  # which alone runs handlers
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))  # a blocked signal would find another thread
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    for one in came[:1]:
        signal.raise_signal(one)


def _renamed(old: Path, new: Path, flag: int) -> bool:
    """Rename with a flag, and return whether the system knows it.

    Raises:
        OSError: If it knows the flag, and could not rename.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(new))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return None
    return found
