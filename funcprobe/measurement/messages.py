"""Notes and warnings that gather while something is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from funcprobe.errors import FuncprobeWarning
from funcprobe.policy.checks import Checks


class Messages:
    """What a probe has to say beside its numbers: warnings are issued (unless quiet) and kept, notes only kept."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def also(self, messages: Iterable[str]) -> None:
        """Issue each message as a warning and keep it."""
        for message in messages:
            self.warnings.append(message)
            if not self.quiet:
                warnings.warn(message, FuncprobeWarning, stacklevel=3)

    def found(self, checks: Checks | None) -> None:
        """Say what was found out about the copy of a module, once."""
        if checks is not None:
            self.also(text for text in checks.warnings if text not in self.warnings)
            self.notes += [text for text in checks.notes if text not in self.notes]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the funcprobe warnings of a block, and let every warning through."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            if issubclass(warning.category, FuncprobeWarning):
                self.also([str(warning.message)])
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
