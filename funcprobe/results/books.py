"""`Books`: the ledger of a run as a whole, told, read from its folder, and given as a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from funcprobe.results.blocks import Block
from funcprobe.results.books_words import blocks_of
from funcprobe.results.frames import Tabular
from funcprobe.results.ledger_lines import Lines, columns_of, read_lines
from funcprobe.results.ledger_sums import Sums
from funcprobe.results.result import Result
from funcprobe.results.storage import Kind
from funcprobe.results.window import Window


@dataclass(frozen=True)
class Books(Sums, Tabular, Result):
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
        """Return a row a window as plain columns: `entropy/change`, `entropy/error`, `split/momentum`, `lr`, ..."""
        return columns_of(self.windows)

    def units(self) -> dict[str, str]:
        """Return the units of the observables' columns, and of the split of the first one."""
        found = {name: reading.unit for window in self.windows for name, reading in window.readings.items()}
        found |= {"split": self.windows[0].main.unit} if self.windows else {}
        return {name: found[of] for name in self.columns() if (of := name.partition("/")[0]) in found}

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the books: the sum, its split, the closing, the windows that did most."""
        return tuple(blocks_of(self))

    def __iter__(self) -> Iterator[Window]:
        return iter(self.windows)
