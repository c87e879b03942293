"""Notes and warnings that gather while something is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from funcprobe.errors import FuncprobeWarning, Note
from funcprobe.policy.checks import Checks


class Messages:
    """Remarks beside a measurement's numbers: warnings are issued (unless quiet) and kept, notes only kept."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.warnings: list[Note] = []
        self.notes: list[Note] = []

    def warn(self, *several: Note) -> None:
        """Issue each as a warning and keep it."""
        for note in several:
            self.warnings.append(note)
            if not self.quiet:
                warnings.warn(note, FuncprobeWarning, stacklevel=3)

    def note(self, kind: str, text: str) -> None:
        """Keep a note."""
        self.notes.append(Note(kind, text))

    def add(self, several: Iterable[Note]) -> None:
        """Keep some notes."""
        self.notes += several

    def about_the_copy(self, checks: Checks | None) -> None:
        """Add the notes on the copy of a module, once."""
        if checks is not None:
            self.warn(*(Note("copy", text) for text in checks.warnings if text not in self.warnings))
            self.add(Note("copy", text) for text in checks.notes if text not in self.notes)
