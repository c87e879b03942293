"""The lines of a ledger, `ledger.jsonl`: one JSON object a window, in the order in which they were written.

    {"schema_version": 1, "kind": "window", "number": 3, "first": 3, "last": 3, "readings": {...}, ...}

Lines are only ever added. A run that goes on from an earlier step says so in a line, and what stood there of later
steps counts no more. A last line that was cut off is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.data.paths import path_of
from funcprobe.errors import InputError
from funcprobe.results.codec import Inline, decode, encode
from funcprobe.results.window import Lost, Mark, Window
from funcprobe.types import Json

FILE = "ledger.jsonl"

#: Raised when a field changes its meaning.
SCHEMA_VERSION = 1

#: Bytes of one line at most: a window's is some 10 kB.
LINE_LIMIT = 2**26


class Resumed(NamedTuple):
    """The run went on from a step, so that lines of later ones count no more."""

    step: int


_KINDS: dict[str, type] = {"window": Window, "lost": Lost, "mark": Mark, "resumed": Resumed}


class Lines(NamedTuple):
    """The lines of a ledger that count."""

    windows: tuple[Window, ...] = ()
    lost: tuple[Lost, ...] = ()
    marks: tuple[Mark, ...] = ()

    def with_(self, line: object) -> Lines:
        """Return the lines with one more."""
        if isinstance(line, Resumed):
            return self.until(line.step)
        if isinstance(line, Window):
            return self._replace(windows=(*self.windows, line))
        if isinstance(line, Mark):
            return self._replace(marks=(*self.marks, line))
        assert isinstance(line, Lost)
        return self._replace(lost=(*self.lost, line))

    def until(self, step: int) -> Lines:
        """Return the lines that are of steps before one."""
        return Lines(
            tuple(window for window in self.windows if window.last < step),
            tuple(lost for lost in self.lost if lost.last < step),
            tuple(mark for mark in self.marks if mark.step <= step),
        )


def plain_of(line: Window | Lost | Mark | Resumed) -> Json:
    """Return a line as JSON-safe values."""
    kind = next(name for name, of in _KINDS.items() if isinstance(line, of))
    return {"schema_version": SCHEMA_VERSION, "kind": kind, **encode(line, _KINDS[kind], Inline())}


def read_lines(folder: str | os.PathLike[str]) -> Lines:
    """Return the lines of a ledger's folder that count.

    Raises:
        InputError: If it holds no ledger, or a damaged one.
    """
    file = path_of(folder) / FILE
    if not file.is_file():
        raise InputError(f"{path_of(folder)} holds no {FILE}; expected the folder that a Ledger wrote.")
    return read_file(file)[0]


def read_file(path: Path) -> tuple[Lines, int]:
    """Return the lines that count, and the length of the file up to the end of the last whole one.

    Raises:
        InputError: If a line before the last one is damaged, or of another version.
    """
    lines, whole = Lines(), 0
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(LINE_LIMIT), b""), 1):
            if not text.endswith(b"\n") and len(text) < LINE_LIMIT:
                break  # cut off in the middle
            lines, whole = lines.with_(_line(path, number, text)), whole + len(text)
    return lines, whole


def _line(path: Path, number: int, text: bytes) -> object:
    try:
        plain: Mapping[str, Any] = json.loads(text)
        version, kind = plain.get("schema_version"), plain.get("kind")
        if version == SCHEMA_VERSION and kind in _KINDS:
            fields = {name: x for name, x in plain.items() if name not in ("schema_version", "kind")}
            return decode(fields, _KINDS[kind], Inline())
    except (ValueError, AttributeError, RecursionError, TypeError, OverflowError) as error:  # a DamagedError is one
        raise InputError(
            f"{path}, line {number}: no line of a ledger ({error!s:.200}); the file is damaged."
        ) from error
    raise InputError(
        f"{path}, line {number}, is of schema version {version!s:.60} and kind {kind!s:.60}; this funcprobe reads "
        f"version {SCHEMA_VERSION} and the kinds {', '.join(_KINDS)}."
    )


def columns_of(windows: Sequence[Window]) -> dict[str, list[Any]]:
    """Return the windows as plain columns, a row a window, of which frames and parquet files are made."""
    rows = [_row(window) for window in windows]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _row(window: Window) -> dict[str, Any]:
    plain = ("number", "first", "last", "generations", "lr", "delta_norm", "grad_norm", "mismatch", "sampler_gap")
    found: dict[str, Any] = {name: getattr(window, name) for name in (*plain, "seconds")}
    found |= {f"split/{name}": value for name, value in window.split.items()}
    for name, reading in window.readings.items():
        bar = reading.bars.get("change")
        of = {"before": reading.before, "change": reading.change, "first_order": reading.first_order}
        of |= {} if reading.second_order is None else {"second_order": reading.second_order}
        found |= {f"{name}/{what}": value for what, value in of.items()}
        found[f"{name}/error"] = None if bar is None else bar.error
    found |= {f"ess/{name}": getattr(window.health, name) for name in ("ess_sequence", "ess_prefix_min", "ess_base")}
    return found | {f"trainer/{name}": value for name, value in window.trainer.items()}
