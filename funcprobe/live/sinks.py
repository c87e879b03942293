"""`Sink`: where the numbers of a ledger go beside its own file, such as the tracker that a trainer logs to."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from funcprobe.results.blocks import as_html
from funcprobe.results.books_words import opened_blocks
from funcprobe.results.ledger_lines import columns_of
from funcprobe.results.window import Window

#: What every name begins with.
PREFIX = "funcprobe/"


@runtime_checkable
class Sink(Protocol):
    """A tracker, as a ledger sees it: scalars by name at a step, pages where it takes HTML, an end."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of a step, by names that stay the same over a run."""
        ...

    def page(self, step: int, name: str, text: str) -> None:
        """Keep a page of HTML, where the tracker takes one."""
        ...

    def close(self) -> None:
        """End whatever the sink has opened itself."""
        ...


def scalars_of(window: Window) -> dict[str, float]:
    """Return the finite numbers of a window by stable names, such as `funcprobe/entropy/change`.

    What the trainer logged itself is left out: it has that already.
    """
    row = {name: values[0] for name, values in columns_of([window]).items() if not name.startswith("trainer/")}
    row["remainder"] = window.remainder
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return {PREFIX + name.replace(" ", "_"): value for name, value in numbers.items() if math.isfinite(value)}


def tell(sink: Sink, window: Window) -> None:
    """Give a sink the numbers of a window at its last step, and the page of its tokens where it was opened."""
    sink.scalars(window.last, scalars_of(window))
    if blocks := tuple(opened_blocks(window)):
        title = f"Steps {window.first} to {window.last}"
        body = f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title></head><body>"
        sink.page(window.last, PREFIX + "tokens", f"{body}{as_html(blocks)}</body></html>")
