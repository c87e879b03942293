"""Blocks: the parts that a result is told in, the same for a terminal, a notebook and a page.

A result says *what* it has, in order; how that looks is for whoever renders it: `as_text` and `as_html` here, the
terminal in `report/`. Text of tokens, prompts and names is made safe by the renderers, so blocks hold it as it is.
"""

from __future__ import annotations

import html
import itertools
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from funcprobe.visible_text import shortened, visible

#: Columns of plain text.
WIDTH = 100

#: Stands for a space at which no line is broken; `visible` leaves none of it in a text.
_JOINED = "\x00"

#: Characters to which a cell is cut at least, where space is short, and at most, where it is not.
_CUT, _CELL = 4, 400

#: The style of a number's cell in HTML.
RIGHT = "text-align:right"

#: How much weight a text has: the answer is strong, what is only beside it quiet.
Tone = Literal["plain", "strong", "quiet"]


class Sentence(NamedTuple):
    """One or several sentences that stand alone."""

    text: str
    tone: Tone = "plain"


class Column(NamedTuple):
    """How the cells of a column are laid out."""

    heading: str = ""
    side: Literal["left", "right"] = "left"
    narrow: Literal["whole", "broken", "cut"] = "whole"  #: a cell where space is short


class Row(NamedTuple):
    """One row of a table."""

    cells: tuple[str, ...]  #: one for every column; those left out at the end are empty
    tone: Tone = "plain"


class Table(NamedTuple):
    """Rows under headings, which are not shown where all of them are empty."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""

    @property
    def has_headings(self) -> bool:
        """Whether any column has one."""
        return any(column.heading for column in self.columns)


class Remark(NamedTuple):
    """Something that should be known beside the numbers."""

    kind: Literal["warning", "note"]
    text: str
    about: str = ""  #: the name of the variant that it is about, of several

    @property
    def label(self) -> str:
        """The word that it begins with."""
        return f"{self.kind.capitalize()}{f' ({self.about})' if self.about else ''}"

    @property
    def sentence(self) -> str:
        """The text with a full stop, where it ends without a mark."""
        return self.text if self.text.endswith((".", "!", "?")) else f"{self.text}."


class Figure(NamedTuple):
    """A figure that `funcprobe.report.figures` can draw of the same result; texts leave it out."""

    name: str  #: after what it shows: also the stem of its file
    of: str | None = None  #: the observable that it shows, of several


Block = Sentence | Table | Remark | Figure


def pairs(rows: Iterable[tuple[str, str]], strong: Sequence[str] = (), caption: str = "") -> Table:
    """Return a table of (name, value) without headings, in which some rows are strong."""
    found = tuple(Row(row, "strong" if row[0] in strong else "plain") for row in rows)
    return Table((Column(), Column(narrow="broken")), found, caption)


def in_groups(blocks: Iterable[Block]) -> list[list[Sentence | Remark] | Table]:
    """Return the blocks as a text sets them, apart by blank lines: tables, and runs of sentences and remarks."""
    groups: list[list[Sentence | Remark] | Table] = []
    for block in blocks:
        if isinstance(block, Figure):
            continue
        if isinstance(block, Table):
            groups.append(block)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def as_text(blocks: Iterable[Block], width: int = WIDTH) -> str:
    """Return blocks as plain text of at most `width` columns, but for tables with cells that stay whole."""
    return "\n\n".join(
        "\n".join(_table_lines(group, width) if isinstance(group, Table) else _lines(group, width))
        for group in in_groups(blocks)
    )


def as_html(blocks: Iterable[Block]) -> str:
    """Return blocks as HTML for notebooks, everything in them escaped."""
    return "".join(
        _html_table(group) if isinstance(group, Table) else "".join(_html_line(block) for block in group)
        for group in in_groups(blocks)
    )


def _lines(blocks: Iterable[Sentence | Remark], width: int) -> list[str]:
    return [line for block in blocks for line in _broken(_line(block), width)]


def _line(block: Sentence | Remark) -> str:
    return visible(block.text if isinstance(block, Sentence) else f"{block.label}: {block.sentence}")


def table_lines(table: Table, width: int) -> list[tuple[str, Row | None]]:
    """Return the lines of a table in at most `width` columns, each with its row, or None for the headings.

    Text gives way where space is short: it is cut or broken between words. Numbers stay whole, so a table of nothing
    else may be wider.
    """
    headings = [(None, Row(tuple(column.heading for column in table.columns)))] if table.has_headings else []
    rows = [(whose, _cells(table, row)) for whose, row in (*headings, *((row, row) for row in table.rows))]
    widths = _widths(table.columns, [cells for _, cells in rows], width - 2 * (len(table.columns) - 1))
    return [
        ("  ".join(map(_set, line, widths, table.columns)).rstrip(), whose)
        for whose, cells in rows
        for line in itertools.zip_longest(*map(_fitted, cells, widths, table.columns), fillvalue="")
    ]


def _table_lines(table: Table, width: int) -> list[str]:
    caption = _broken(visible(table.caption), width) if table.caption else []
    return [*caption, *(line for line, _ in table_lines(table, width))]


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return the width of every column: as wide as its cells, or less where text gives way, the widest first."""
    widths = [max(map(_width, cells)) for cells in zip(*rows, strict=True)]
    least = [_least(column, cells) for column, cells in zip(columns, zip(*rows, strict=True), strict=True)]
    for kind in ("cut", "broken"):
        while (excess := sum(widths) - room) > 0:
            free = [w if c.narrow == kind and w > low else -1 for w, low, c in zip(widths, least, columns, strict=True)]
            widest = max(range(len(free)), key=free.__getitem__, default=0)
            if not free or free[widest] < 0:
                break
            others = sorted((w for w in free if 0 <= w < free[widest]), reverse=True)
            level = others[0] if others else least[widest]
            widths[widest] = max(least[widest], min(widths[widest] - 1, max(level, widths[widest] - excess)))
    return widths


def _least(column: Column, cells: Sequence[str]) -> int:
    """Return the width below which a column is not narrowed: nothing shorter than a word, or than a cut that tells."""
    if column.narrow == "whole":
        return max(map(_width, cells))
    if column.narrow == "cut":
        return min(_CUT, max(map(_width, cells)))
    return max(max(map(_width, _broken(cell, 1)), default=0) for cell in cells)


def _fitted(cell: str, width: int, column: Column) -> list[str]:
    """Return the lines of a cell in a column of that width."""
    if _width(cell) <= width or column.narrow == "whole":
        return [cell]
    return [_cut_off(cell, width)] if column.narrow == "cut" else _broken(cell, width)


def _cut_off(text: str, width: int) -> str:
    """Return the beginning of a text that takes as many columns, wide letters counted twice and marks not at all."""
    ends = itertools.accumulate(map(_width, text))
    return text[: sum(end < width for end in ends)].rstrip() + "…"


def _broken(line: str, width: int) -> list[str]:
    """Return a line as lines, broken between words where it is too wide, but never before a percent sign."""
    if _width(line) <= width:
        return [line]
    joined = line.replace(" %", f"{_JOINED}%")
    lines = textwrap.wrap(joined, width, break_long_words=False, break_on_hyphens=False)
    return [part.replace(_JOINED, " ") for part in lines]


def _cells(table: Table, row: Row) -> list[str]:
    """Return a cell for every column, of which nothing moves the text around it."""
    cells = [visible(shortened(cell, _CELL)) for cell in row.cells]
    return cells + [""] * (len(table.columns) - len(row.cells))


def _set(cell: str, width: int, column: Column) -> str:
    room = " " * (width - _width(cell))
    return room + cell if column.side == "right" else cell + room


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes: a mark on a letter takes none, a wide letter two."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _html_line(block: Sentence | Remark) -> str:
    if isinstance(block, Remark):
        return f"<p><b>{_escaped(block.label)}.</b> {_escaped(block.sentence)}</p>"
    text = _escaped(block.text)
    return f"<p><b>{text}</b></p>" if block.tone == "strong" else f"<p>{text}</p>"


def _html_table(table: Table) -> str:
    caption = f"<caption>{_escaped(table.caption)}</caption>" if table.caption else ""
    head = "".join(f"<th>{_escaped(column.heading)}</th>" for column in table.columns)
    head = f"<tr>{head}</tr>" if table.has_headings else ""
    return f"<table>{caption}{head}{''.join(_html_row(table, row) for row in table.rows)}</table>"


def _html_row(table: Table, row: Row) -> str:
    found = []
    for cell, column in zip(_cells(table, row), table.columns, strict=True):
        text = f"<b>{_escaped(cell)}</b>" if row.tone == "strong" else _escaped(cell)
        style = f" style='{RIGHT}'" if column.side == "right" else ""
        found.append(f"<td{style}>{text}</td>")
    return f"<tr>{''.join(found)}</tr>"


def _escaped(text: str) -> str:
    return html.escape(visible(text))
