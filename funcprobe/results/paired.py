"""The difference between the changes of an observable under two updates on the same rollouts, paired by prompt."""

from __future__ import annotations

import math
from typing import Literal

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar, bar
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading, Sampled, is_lost

Quantity = Literal["change", "first_order", "second_order"]
QUANTITIES: tuple[Quantity, ...] = ("change", "first_order", "second_order")


def difference(
    one: Outcome, other: Outcome, name: str, quantity: Quantity = "change", *, mode: str, level: float
) -> Bar:
    """Return how much larger a quantity of an observable is in one outcome than in the other.

    Its error comes from the same differences without each prompt, so the part of the sampling error that both share
    cancels. Without error bars, in reverse mode for the first order, or where the float errors of both ΔF are above a
    tenth of their difference, the bar is infinitely wide.

    Raises:
        InputError: If there is no such quantity in them.
    """
    if quantity not in QUANTITIES:
        raise InputError(f"Unknown quantity {quantity!r}; expected one of {', '.join(QUANTITIES)}.")
    first, second = one.readings[name], other.readings[name]
    values = getattr(first, quantity), getattr(second, quantity)
    if None in values:
        raise InputError("The comparison has no second order; ask compare for it with order=2.")
    value = values[0] - values[1]
    if one is other:
        return Bar(value, 0.0, value, value, level)
    known = (quantity == "change" or mode == "forward") and _has_bar(first) and _has_bar(second)
    if quantity == "change":
        known &= not _lost(value, first, second)
    if one.sampled is None or other.sampled is None or not known:
        return Bar(value, math.inf, -math.inf, math.inf, level)
    offset = QUANTITIES.index(quantity)
    i, j = one.sampled.columns[name] + offset, one.sampled.width + other.sampled.columns[name] + offset
    joined = Sampled.join([one.sampled, other.sampled])
    return bar(joined, lambda q: q[i] - q[j], level)._replace(value=value)


def _has_bar(reading: Reading) -> bool:
    """Return whether replicates of a reading mean something: it has bars, or it does not move and needs none."""
    return bool(reading.bars) or reading.change == reading.first_order == 0.0


def _lost(value: float, one: Reading, two: Reading) -> bool:
    """Return whether the float errors of both changes hold more than a tenth of their difference."""
    if one.float_error is None or two.float_error is None or value == 0.0:
        return False
    return is_lost(value, math.hypot(one.float_error, two.float_error))
