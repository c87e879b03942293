from __future__ import annotations

import io
import os
import re
import select
import time

from funcprobe.cli.progress import PATIENCE, Bars


def shown(patience: float, wait: float) -> str:
    """Return what a pseudo-terminal is sent while a bar stands at 3 of 7."""
    ours, theirs = os.openpty()
    received = b""
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, Bars(terminal, patience) as bars:
        bars("gradient", 3, 7)
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            if select.select([ours], [], [], left)[0]:
                received += os.read(ours, 1 << 16)
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode("utf-8", errors="replace"))


def test_a_long_task_shows_its_name_and_its_count() -> None:
    text = shown(patience=0.0, wait=0.4)
    assert "gradient" in text
    assert "3/7" in text


def test_a_short_task_shows_nothing() -> None:
    assert PATIENCE == 2.0
    assert "gradient" not in shown(PATIENCE, wait=0.4)


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with Bars(file, patience=0.0) as bars:
        bars.phase("loading")
        bars("gradient", 1, 2)
        bars("gradient", 2, 2)
        bars("other", 1, 1)
    assert file.getvalue() == ""
