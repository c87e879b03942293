"""The three streams of a process, which may be closed, full, without a reader, or without Unicode."""

from __future__ import annotations

import contextlib
import io
import os
import sys

_NAMES = ("stdin", "stdout", "stderr")


def open_all() -> None:
    """Open closed streams on the null device, so that no file gets their numbers; print `?` for lost letters."""
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush() -> OSError | None:
    """Write out the rest of standard output, and return why that could not be done.

    What could not be written is dropped, so that the interpreter does not try again at its end.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        drop()
        return error
    except ValueError:  # closed meanwhile
        return None
    return None


def drop() -> None:
    """Send the rest of standard output, and all that follows, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.flush()


def say(text: str) -> None:
    """Write one line to standard error, where that can be written to."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
