"""`Books`: the ledger of a run as a whole, told, read from its folder, and given as a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from funcprobe.results.blocks import Block
from funcprobe.results.books_words import blocks_of
from funcprobe.results.frames import frame_of
from funcprobe.results.ledger_lines import Lines, columns_of, read_lines
from funcprobe.results.ledger_sums import Sums
from funcprobe.results.result import Result
from funcprobe.results.storage import Kind
from funcprobe.results.window import Window

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Books(Sums, Result):
    """The ledger of a run: its windows summed and split, and whether they close."""

    kind: ClassVar[Kind] = "ledger"

    @classmethod
    def of(cls, lines: Lines) -> Books:
        """Return the books that lines of a ledger make."""
        return cls(lines.windows, lines.lost, lines.marks)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Books:
        """Read the folder of a ledger; a run in progress may be read at any time.

        Raises:
            InputError: If it holds no ledger, or a damaged one.
        """
        return cls.of(read_lines(folder))

    def columns(self) -> dict[str, list[Any]]:
        """Return a row a window as plain columns; see `to_frame`."""
        return columns_of(self.windows)

    def to_frame(self) -> DataFrame:
        """Return a row a window as a pandas frame: `entropy/change`, `entropy/error`, `split/momentum`, `lr`, ...

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return frame_of(self.columns())

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the books: the sum, its split, the closing, the windows that did most."""
        return tuple(blocks_of(self))

    def __iter__(self) -> Iterator[Window]:
        return iter(self.windows)
