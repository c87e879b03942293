"""`Sums`: all windows of a run, summed and split, and whether the sum is the change that was seen at its ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from funcprobe.results.window import Lost, Mark, Window


class Sum(NamedTuple):
    """One observable summed over windows."""

    change: float  #: Σ ΔF
    error: float  #: its standard error: that of every window is of rollouts of its own, so squares add
    first_order: float  #: Σ δF₁
    windows: int


class Closing(NamedTuple):
    """Σ ΔF of the windows between two marks, against the difference of the marks."""

    observable: str
    total: Sum
    start: Mark
    end: Mark
    seen: float  #: F(end) − F(start), on rollouts of their own
    seen_error: float  #: its standard error
    missing: int  #: steps between the marks that are in no window

    @property
    def error(self) -> float:
        """The closing error: Σ ΔF − (F(end) − F(start))."""
        return self.total.change - self.seen

    @property
    def error_bar(self) -> float:
        """Its standard error."""
        return math.hypot(self.total.error, self.seen_error)

    @property
    def closes(self) -> bool:
        """Whether nothing is missing and the closing error is within two standard errors of 0."""
        return self.missing == 0 and abs(self.error) <= 2 * self.error_bar


@dataclass(frozen=True)
class Sums:
    """All windows of a run, in order, with the steps that are in none and the values at its ends."""

    windows: tuple[Window, ...]
    lost: tuple[Lost, ...] = ()
    marks: tuple[Mark, ...] = ()

    @property
    def main(self) -> str | None:
        """The name of the observable that is split; None where there is no window."""
        return next(iter(self.windows[0].readings)) if self.windows else None

    @property
    def seconds(self) -> float:
        """Seconds that the ledger took."""
        return math.fsum(window.seconds for window in self.windows)

    @cached_property
    def split(self) -> dict[str, float]:
        """The parts of Σ δF₁ of the first observable, with the remainder Σ (ΔF − δF₁): together they are Σ ΔF."""
        found: dict[str, float] = {}
        for window in self.windows:
            for name, value in {**window.split, "remainder": window.remainder}.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def total(self, observable: str | None = None, first: int = 0, last: int | None = None) -> Sum:
        """Return an observable, by default the first, summed over the windows of some steps."""
        name = observable or self.main or ""
        chosen = [w for w in self.windows if w.first >= first and (last is None or w.last <= last)]
        readings = [window.readings[name] for window in chosen if name in window.readings]
        errors = [r.bars["change"].error if "change" in r.bars else math.nan for r in readings]
        return Sum(
            math.fsum(r.change for r in readings),
            math.hypot(*errors),
            math.fsum(r.first_order for r in readings),
            len(readings),
        )

    @cached_property
    def closing(self) -> dict[str, Closing]:
        """The closing of every observable that has a value at both ends; empty where there are no two marks."""
        if len(self.marks) < 2 or self.marks[0].step == self.marks[-1].step:
            return {}
        start, end = self.marks[0], self.marks[-1]
        return {name: self._closed(name, start, end) for name in start.values if name in end.values}

    def _closed(self, name: str, start: Mark, end: Mark) -> Closing:
        total = self.total(name, start.step, end.step - 1)
        inside = sum(w.last - w.first + 1 for w in self.windows if start.step <= w.first and w.last < end.step)
        missing = end.step - start.step - inside
        errors = math.hypot(start.errors.get(name, math.nan), end.errors.get(name, math.nan))
        return Closing(name, total, start, end, end.values[name] - start.values[name], errors, missing)

    def most(self, count: int = 3) -> tuple[Window, ...]:
        """Return the windows in which the first observable moved most, the largest first."""
        return tuple(sorted(self.windows, key=lambda w: -abs(w.main.change))[:count])
