"""Results on a terminal: blocks as rich prints them, with colours on a terminal and in 80 columns elsewhere."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Literal

from funcprobe.errors import missing_extra
from funcprobe.results.blocks import Block, Remark, Sentence, Table, in_groups
from funcprobe.results.result import Result
from funcprobe.visible_text import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

#: The look of a tone, and of the word that a remark begins with.
_TONES = {"plain": "", "strong": "bold", "quiet": "dim"}
_LABELS = {"warning": "bold yellow", "note": "dim"}


def print_result(result: Result, file: IO[str] | None = None) -> None:
    """Print a result to a file, standard output by default: colours on a terminal only, 80 columns when piped.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    file = sys.stdout if file is None else file
    if file.isatty():
        printer = console(file)  # first: it says what is missing
        printer.print(rendered(result.blocks()))
    else:
        file.write(text_of(result, int(os.environ.get("COLUMNS") or 80)))


def text_of(result: Result, width: int = 80) -> str:
    """Return a result as plain text of at most `width` columns.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    buffer = io.StringIO()
    printer = console(buffer, width)
    printer.print(rendered(result.blocks()))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def console(file: IO[str], width: int | None = None) -> Console:
    """Return a rich console that colours nothing but a terminal, and invents no highlights.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        missing = missing_extra("rich", "app", "printing a summary")
        raise missing from error
    return Console(file=file, width=width, highlight=False, markup=False, force_terminal=file.isatty())


def rendered(blocks: Iterable[Block]) -> RenderableType:
    """Return blocks as something rich can print, with a blank line on either side of a table."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = []
    for group in in_groups(blocks):
        lines += [Text("")] if lines else []
        lines += [_table(group)] if isinstance(group, Table) else [_line(block) for block in group]
    return Group(*lines)


def _line(block: Sentence | Remark) -> Text:
    from rich.text import Text

    if isinstance(block, Sentence):
        return Text(visible(block.text), _TONES[block.tone])
    style = _LABELS[block.kind]
    label, text = f"{visible(block.label)}: ", visible(block.sentence)
    return Text.assemble((label, style), (text, "dim" if style == "dim" else ""))


def _table(block: Table) -> RenderableType:
    from rich.console import Group
    from rich.table import Table as Rows
    from rich.text import Text

    table = Rows(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=block.has_headings)
    for column in block.columns:
        overflow: Literal["ellipsis", "fold"] = "ellipsis" if column.narrow == "cut" else "fold"
        heading = visible(column.heading)
        table.add_column(heading, justify=column.side, no_wrap=column.narrow != "broken", overflow=overflow)
    for row in block.rows:
        table.add_row(*map(visible, row.cells), style=_TONES[row.tone])
    return Group(Text(visible(block.caption), "dim"), table) if block.caption else table
