"""Laws of a curve: which order leads an observable, how straight the line is, which numbers float error ate."""

from __future__ import annotations

import math
from typing import NamedTuple

from funcprobe.errors import InputError
from funcprobe.measurement.continuity import CLOSE
from funcprobe.measurement.readings import Reading
from funcprobe.results.curve import Curve, Fit


class Law(NamedTuple):
    """How an observable moves with the learning rate: by which order, and how straight the line is."""

    lead: int  #: the order that leads: 1, or 2 for what has no first order, such as a divergence
    up_to: float  #: the fit takes part up to this learning rate: where `lead` is within 5 %, or inf
    fit: Fit | None  #: log |ΔF| against log η; None where fewer than two learning rates changed anything


def law_of(curve: Curve, name: str | None = None) -> Law:
    """Return the line through log |ΔF| against log η, over the learning rates at which the leading order is good.

    Those end where the second order says that first order ends, at a twentieth of the crossover; without a second
    order, at the last learning rate at which the leading order was found within 5 % of ΔF. Where that leaves fewer than
    two learning rates, all of them are taken.

    Raises:
        InputError: If there is no such observable.
    """
    readings = curve.readings(name)
    lead = 1 if any(r.first_order for r in readings) else 2
    until = curve.linear_until_lr(name) if lead == 1 else None
    if until is None:
        until = max(close_at(curve, name), default=math.inf)
    for up_to in (until, math.inf):
        try:
            return Law(lead, up_to, curve.slope(name, up_to=up_to))
        except InputError:
            pass  # fewer than two learning rates that moved it: the readings, above, have found the name
    return Law(lead, math.inf, None)


def remainder_fit(curve: Curve, name: str | None = None) -> Fit | None:
    """Return the line through log |ΔF − δF₁| over the learning rates of `law_of`; None where there is none.

    Raises:
        InputError: If there is no such observable.
    """
    law = law_of(curve, name)
    try:
        return curve.remainder_slope(name, up_to=law.up_to)
    except InputError:
        return None


def close_at(curve: Curve, name: str | None = None) -> list[float]:
    """Return the learning rates at which the leading order was found within 5 % of ΔF.

    Raises:
        InputError: If there is no such observable.
    """
    readings = curve.readings(name)
    first = any(r.first_order for r in readings)
    predicted = [r.first_order if first else r.second_order for r in readings]
    return [
        lr
        for lr, reading, value in zip(curve.lrs, readings, predicted, strict=True)
        if value and not reading.is_lost and abs(reading.change - value) <= CLOSE * abs(reading.change)
    ]


def subtraction_error(reading: Reading) -> float | None:
    """Return how far a subtraction of two evaluations is off: from a path or curve if there is one, or by estimate."""
    if reading.method in ("path", "values"):
        return None if reading.subtraction is None else abs(reading.subtraction - reading.change)
    return reading.float_error
