"""Locks on files and folders that end with the process that holds them, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing of another process is touched
    fcntl = None  # type: ignore[assignment]


def held(path: Path) -> int | None:
    """Lock a file or folder without waiting, and return the descriptor that holds it; None where another one does.

    Raises:
        OSError: If there is no such file, or its file system knows no locks.
    """
    if fcntl is None:
        raise OSError("this system locks no folders")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def guarded(folder: Path, patience: float = 1.0) -> Iterator[bool]:
    """Lock a folder for a moment, and tell whether it could be: nothing in it is seen half done."""
    try:
        ends = time.monotonic() + patience
        while (descriptor := held(folder)) is None and time.monotonic() < ends:
            time.sleep(0.01)
    except OSError:
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock_own(descriptor: int) -> bool:
    """Lock an open file for this process without waiting, and return whether no other process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks
    return True
