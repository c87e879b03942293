from __future__ import annotations

import io
import os
import re
import select
import time

from funcprobe.cli.progress import PATIENCE, Bars

#: Seconds after which what has not been drawn never will be, however busy the machine is.
NEVER = 120.0


def shown(patience: float, until: str | None, *calls: tuple[str, int, int]) -> str:
    """Return what a pseudo-terminal is sent after some calls: until that text has come, or in four frames."""
    ours, theirs = os.openpty()
    text, received = "", b""
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, Bars(terminal, patience) as bars:
        for call in calls:
            bars(*call)
        end = time.monotonic() + (0.4 if until is None else NEVER)
        while (until is None or until not in text) and (left := end - time.monotonic()) > 0:
            if select.select([ours], [], [], left)[0]:
                received += os.read(ours, 1 << 16)
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode("utf-8", errors="replace"))
    os.close(ours)
    return text


def test_a_long_task_shows_its_name_and_its_count() -> None:
    assert "gradient" in shown(0.0, "3/7", ("gradient", 3, 7))


def test_a_short_task_shows_nothing() -> None:
    assert PATIENCE == 2.0
    assert "gradient" not in shown(NEVER, None, ("gradient", 3, 7))


def test_what_is_finished_makes_way_for_what_comes_next() -> None:
    assert "working" in shown(0.0, "working", ("gradient", 1, 2), ("gradient", 2, 2))
    last = shown(0.0, "1/4", ("gradient", 2, 2), ("E at θ′", 1, 4)).splitlines()[-1]
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
