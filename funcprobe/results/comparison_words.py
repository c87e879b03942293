"""The plain words and numbers of a comparison, for terminals, notebooks and logs."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.readings import Reading
from funcprobe.results.probe_words import with_error

if TYPE_CHECKING:
    from funcprobe.results.comparison import Comparison


#: Headings, and a row for every step, all of it text.
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def table_of(comparison: Comparison) -> Table:
    """Return what every step does: ΔF and δF₁ of the first observable, ΔF of the others, with standard errors."""
    main, *others = comparison.observables
    headings = ("step", f"{main} ΔF", "δF₁", *(f"{name} ΔF" for name in others))
    rows = []
    for step in comparison.outcomes:
        reading = comparison.reading(step)
        cells = [_change(reading)]
        cells.append(_short(reading.first_order, reading.bars.get("first_order")))
        rest = [comparison.reading(step, name) for name in others]
        rows.append((step, *cells, *(_change(r) for r in rest)))
    return headings, rows


def differences_of(comparison: Comparison) -> Table:
    """Return how much more every other step changes each observable than the baseline does, paired by prompt."""
    headings = (f"minus '{comparison.baseline}'", *(f"{name} ΔF" for name in comparison.observables))
    rows = []
    for step in list(comparison.outcomes)[1:]:
        found = [comparison.difference(step, name) for name in comparison.observables]
        rows.append((step, *(_short(difference.value, difference) for difference in found)))
    return headings, rows


def summary_of(comparison: Comparison) -> str:
    """Return the text of `Comparison.summary`."""
    differences = differences_of(comparison)
    units = ", ".join(f"{n} in {comparison.reading(comparison.baseline, n).unit}" for n in comparison.observables)
    e, u = comparison.evaluation, comparison.update_batch
    lost = [r for o in comparison.outcomes.values() for r in o.readings.values() if r.is_lost]
    known = ["lost: the float error of ΔF is above a tenth of it, and nothing follows from it"] if lost else []
    said = [f"Warning ({name}): {text}" for name, texts in comparison.warnings.items() for text in texts]
    return "\n".join(
        [
            *_aligned(table_of(comparison)),
            *(["", *_aligned(differences)] if differences[1] else []),
            "",
            f"{units}; ± one standard error over {e.prompts} prompts, differences paired by prompt",
            f"E: {e.sequences} sequences, {e.tokens} tokens   U: {u.sequences} sequences, {u.tokens} tokens",
            *known,
            *said,
        ]
    )


def html_of(comparison: Comparison) -> str:
    """Return both tables as HTML, for notebooks."""
    return "".join(_html(*found) for found in (table_of(comparison), differences_of(comparison)) if found[1])


def _change(reading: Reading) -> str:
    return _short(reading.change, reading.bars.get("change")) + (" (lost)" if reading.is_lost else "")


def _short(value: float, found: Bar | None) -> str:
    return with_error(value, found, digits=3)


def _aligned(table: Table) -> list[str]:
    headings, rows = table
    every = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in every
    ]


def _html(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    cells = ("".join(f"<td style='text-align:right'>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
