"""`Bounds` on one step: the least effective sample, the largest ΔF, the largest part of it beyond first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from funcprobe.errors import InputError, Note
from funcprobe.measurement.cautions import ess_fraction
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.types import Observable

#: The finest search: between neighbours in float64 there would be no end of it.
FINEST = 1e-9


class Bounds(NamedTuple):
    """Bounds on one step, by name, as they are held against an outcome."""

    limits: Mapping[str, float]

    @classmethod
    def of(cls, min_ess: float | None, max_abs_delta: float | None, max_nonlinearity: float | None) -> Bounds:
        """Return the bounds that were given.

        Args:
            min_ess: Least effective sample, as a fraction of E, on the weights that the observable uses.
            max_abs_delta: Largest |ΔF|, in the observable's unit.
            max_nonlinearity: Largest |ΔF − δF₁| / |ΔF|.

        Raises:
            InputError: If there is none, or one is out of range.
        """
        given = {"min_ess": min_ess, "max_abs_delta": max_abs_delta, "max_nonlinearity": max_nonlinearity}
        limits = {name: value for name, value in given.items() if value is not None}
        if not limits:
            raise InputError("No bound was given; give min_ess, max_abs_delta or max_nonlinearity.")
        for name, value in limits.items():
            check_positive(name, value)
        if limits.get("min_ess", 0.0) > 1:
            raise InputError(f"min_ess is {min_ess}; expected a fraction of the sample, at most 1.")
        return cls(limits)

    def broken(self, outcome: Outcome, observable: Observable) -> str | None:
        """Return the first bound that an outcome breaks, with the measured number; NaN keeps none."""
        measured = {"min_ess": ess_fraction(outcome.health, observable), **_least(outcome.main)}
        for name, limit in self.limits.items():
            kept = measured[name] >= limit if name == "min_ess" else measured[name] <= limit
            if not kept:
                return f"{name} {limit:g} (found {measured[name]:.3g})"
        return None

    def unjudged(self, kept: Sequence[Outcome]) -> tuple[Note, ...]:
        """Return a note where an outcome counts as keeping a bound on ΔF because ΔF is lost in float error there."""
        lost = [point.lr for point in kept if point.main.is_lost and point.lr is not None]
        on_change = [name for name in ("max_abs_delta", "max_nonlinearity") if name in self.limits]
        if not lost or not on_change:
            return ()
        where = f"ΔF is lost in float error up to lr {lost[-1]:g}, where {' and '.join(on_change)} cannot be judged"
        if not kept[-1].main.is_lost:
            return (Note("unjudged", f"{where} and count as kept; the answer lies above."),)
        ending = "the answer is no more than the largest learning rate that does not visibly break a bound."
        return (Note("unjudged", f"{where}: {ending}"),)


def check_relative(relative: float) -> None:
    """Refuse a search that is finer than numbers are.

    Raises:
        InputError: If it is, or is not above 0.
    """
    check_positive("relative", relative)
    if relative < FINEST:
        raise InputError(f"relative is {relative:g}; expected at least {FINEST:g}: rounding leaves no more to be told.")


def check_positive(name: str, value: float) -> None:
    """Refuse a value that is no number above 0.

    Raises:
        InputError: If it is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value}; expected a number above 0.")


def _least(reading: Reading) -> dict[str, float]:
    """Return the |ΔF| that bounds are held against: where ΔF is lost, the least that its float error leaves."""
    change, remainder = abs(reading.change), abs(reading.remainder)
    if not reading.is_lost:
        return {"max_abs_delta": change, "max_nonlinearity": reading.nonlinearity}
    assert reading.float_error is not None  # known to be too large
    least, most = max(0.0, remainder - reading.float_error), change + reading.float_error
    return {"max_abs_delta": max(0.0, change - reading.float_error), "max_nonlinearity": least / most}


class Found(NamedTuple):
    """Where a bisection has ended."""

    lr: float  #: the largest one that kept every bound
    limited_by: str | None  #: what the next larger one broke; None where the upper end kept all
    kept: tuple[Outcome, ...]  #: by rising learning rate, `lr` last; empty where even the lower end broke one
    tried: int  #: learning rates


def bisected(try_out: Callable[[float], Outcome | str], low: float, high: float, relative: float) -> Found:
    """Return the largest learning rate between two that keeps every bound, to within a factor of `1 + relative`.

    `try_out` returns the outcome at a learning rate, or the bound that it breaks. Bounds are taken to be kept below the
    answer and broken above it: bisection on the logarithm finds a place where they begin to be broken.
    """
    at_low, at_high, tried = try_out(low), try_out(high), 2
    if isinstance(at_low, str):
        return Found(low, at_low, (), tried)
    if isinstance(at_high, Outcome):
        return Found(high, None, (at_low, at_high), tried)
    kept, limited_by = [at_low], at_high
    while high / low > 1 + relative:
        middle, tried = math.sqrt(low) * math.sqrt(high), tried + 1
        outcome = try_out(middle)
        if isinstance(outcome, Outcome):
            low = middle
            kept.append(outcome)
        else:
            high, limited_by = middle, outcome
    return Found(low, limited_by, tuple(kept), tried)
