"""A terminal that is none."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pty() -> Iterator[tuple[io.TextIOWrapper, object]]:
    """Yield a real pseudo-terminal to write to, and a function that reads what it was sent."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        yield terminal, lambda: os.read(ours, 1 << 16).decode("utf-8", errors="replace")
    os.close(ours)
