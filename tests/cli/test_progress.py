from __future__ import annotations

import io
import os
import re
import select
import time

from funcprobe.cli.progress import PATIENCE, Bars


def shown(patience: float, wait: float, *calls: tuple[str, int, int]) -> str:
    """Return what a pseudo-terminal is sent in the time after some calls."""
    ours, theirs = os.openpty()
    received = b""
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, Bars(terminal, patience) as bars:
        for call in calls:
            bars(*call)
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            if select.select([ours], [], [], left)[0]:
                received += os.read(ours, 1 << 16)
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode("utf-8", errors="replace"))


def test_a_long_task_shows_its_name_and_its_count() -> None:
    text = shown(0.0, 0.4, ("gradient", 3, 7))
    assert "gradient" in text
    assert "3/7" in text


def test_a_short_task_shows_nothing() -> None:
    assert PATIENCE == 2.0
    assert "gradient" not in shown(PATIENCE, 0.4, ("gradient", 3, 7))


def test_what_is_finished_makes_way_for_what_comes_next() -> None:
    assert "working" in shown(0.0, 0.4, ("gradient", 1, 2), ("gradient", 2, 2))
    last = shown(0.0, 0.4, ("gradient", 2, 2), ("E at θ′", 1, 4)).splitlines()[-1]
    assert "1/4" in last
    assert "gradient" not in last


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with Bars(file, patience=0.0) as bars:
        bars.phase("loading")
        bars("gradient", 1, 2)
        bars("gradient", 2, 2)
        bars("other", 1, 1)
    assert file.getvalue() == ""
