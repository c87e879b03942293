"""Results on a terminal: blocks as rich prints them, with colours on a terminal and in 80 columns elsewhere."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING

from funcprobe.errors import missing_extra
from funcprobe.results.blocks import Block, Remark, Sentence, Table, in_groups, table_lines
from funcprobe.results.result import Result
from funcprobe.visible_text import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
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
        printer.print(rendered(result.blocks()), crop=False)
    else:
        file.write(text_of(result, shutil.get_terminal_size().columns if "COLUMNS" in os.environ else 80))


def text_of(result: Result, width: int = 80) -> str:
    """Return a result as plain text of at most `width` columns.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    buffer = io.StringIO()
    printer = console(buffer, width)
    printer.print(rendered(result.blocks()), crop=False)
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
        lines += [_Laid(group)] if isinstance(group, Table) else [_line(block) for block in group]
    return Group(*lines)


def _line(block: Sentence | Remark) -> Text:
    from rich.text import Text

    if isinstance(block, Sentence):
        return Text(visible(block.text), _TONES[block.tone])
    style = _LABELS[block.kind]
    label, text = f"{visible(block.label)}: ", visible(block.sentence)
    return Text.assemble((label, style), (text, "dim" if style == "dim" else ""))


class _Laid:
    """A table, laid out for the columns that there are."""

    def __init__(self, block: Table) -> None:
        self.block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        if self.block.caption:
            yield Text(visible(self.block.caption), "dim")
        for line, row in table_lines(self.block, options.max_width):
            style = "dim" if row is None else _TONES[row.tone]
            yield Text(line, style, no_wrap=True, overflow="ignore")
