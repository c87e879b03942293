"""Ctrl-C and SIGTERM: one line, and true words about the results.

Both raise where the program stands, so that every block tidies up after itself. A library that swallows the exception,
as some do while they are imported, does not swallow the wish: `check` raises it again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal that asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code by which shells know the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def word(self) -> str:
        """The signal in a word."""
        return "interrupted" if self.number == signal.SIGINT else "terminated"


class _State:
    """Of the command that runs: the signal that came, and where its results are."""

    wanted: int | None = None
    written: Path | None = None


def placed(path: Path) -> None:
    """Note that the results stand at a path; from now on an interruption says so."""
    _State.written = path


def written() -> Path | None:
    """Return where the results of the running command are; None while there are none."""
    return _State.written


def check() -> None:
    """End the command if a signal has asked for it and somebody swallowed the exception.

    Raises:
        Interrupted: If so.
    """
    if _State.wanted is not None:
        raise Interrupted(_State.wanted)


@contextmanager
def heard() -> Iterator[None]:
    """Hear both signals for the length of a command; one that is ignored, as under nohup, stays so."""
    _State.wanted = _State.written = None
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for heard_before, handler in before.items():
            signal.signal(heard_before, handler)


def _raise(number: int, frame: object) -> None:
    _State.wanted = number
    raise Interrupted(number)
