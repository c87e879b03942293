"""The sentences of a sweep: the answer first; the names of observables, learning rates and slopes."""

from __future__ import annotations

import math

from funcprobe.errors import percent
from funcprobe.results.curve import Curve, Fit
from funcprobe.results.sweep_law import CLOSE, Law, close_at, law_of

#: A step moves in proportion where its slope is within this much of the order that leads.
STRAIGHT = 0.05


def headline_of(curve: Curve, name: str | None = None) -> str:
    """Return the answer in one sentence: in proportion to the learning rate or not, and how far first order reaches.

    Raises:
        InputError: If there is no such observable.
    """
    readings, law, what = curve.readings(name), law_of(curve, name), label_of(curve, name)
    if law.fit is None:
        return _without_slope(curve, name, law)
    inside = [(lr, r) for lr, r in zip(curve.lrs, readings, strict=True) if lr <= law.up_to * (1 + 1e-9)]
    inside = [(lr, r) for lr, r in inside if not r.is_lost] or inside
    reach = f"From lr {lr_text(inside[0][0])} to {lr_text(inside[-1][0])}"
    moves = _moves([r.change for _, r in inside], law, fit_text(law.fit))
    vague = all(r.bars and r.bars["change"].low <= 0 <= r.bars["change"].high for _, r in inside)
    said = "; the interval of ΔF holds 0 at all of them" if vague else ""
    return f"{reach} {what} {moves}{said}; {_verdict(curve, name, law)}."


def caption_of(curve: Curve, name: str | None = None) -> str:
    """Return the name of an observable and its unit, once where they are one word.

    Raises:
        InputError: If there is no such observable.
    """
    what, unit = label_of(curve, name).removeprefix("the "), curve.readings(name)[0].unit
    return what if what == unit else f"{what}, {unit}"


def label_of(curve: Curve, name: str | None = None) -> str:
    """Return the name of an observable within a sentence: "the entropy", or the name it was given.

    Raises:
        InputError: If there is no such observable.
    """
    reading = curve.readings(name)[0]
    name = curve.observables[0] if name is None else name
    member = reading.observable.split("/")[0] in ("rao_blackwell", "surprisal")
    return "the entropy" if member and name in ("entropy", reading.observable) else name


def lr_text(lr: float, digits: int = 3) -> str:
    """Return a learning rate in the shortest scientific form.

    Example:
        >>> lr_text(0.00031622), lr_text(1e-9), lr_text(0.00031461, 2)
        ('3.16e-4', '1e-9', '3.1e-4')
    """
    mantissa, exponent = f"{lr:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def fit_text(fit: Fit) -> str:
    """Return a slope with its error, as many digits as that leaves, and R²."""
    slope, error = fit.slope.value, fit.slope.error
    if not math.isfinite(error):
        return f"slope {slope:.4f}, R² {fit.r_squared:.6f}"
    digits = 6 if error == 0 else min(6, max(2, -math.floor(math.log10(error))))
    return f"slope {slope:.{digits}f} ± {error:.{digits}f}, R² {fit.r_squared:.6f}"


def _without_slope(curve: Curve, name: str | None, law: Law) -> str:
    readings, what = curve.readings(name), label_of(curve, name)
    moved = [(lr, r) for lr, r in zip(curve.lrs, readings, strict=True) if r.change and not r.is_lost]
    where = "every learning rate" if len(readings) > 1 else f"lr {lr_text(curve.lrs[0])}"
    if not moved and any(r.is_lost for r in readings):
        return f"At {where} the change of {what} is lost in float error; {_verdict(curve, name, law)}."
    if not moved:
        return f"At {where} {what} stays at {readings[0].before:.6g} {readings[0].unit}."
    lr, r = moved[-1]
    moves = f"{'rises' if r.change > 0 else 'falls'} by {abs(r.change):.3g} {r.unit}"
    said = f"first order predicts {percent(r.first_order / r.change)} of it, " if r.first_order else ""
    return (
        f"At lr {lr_text(lr)} {what} {moves} ({said}a slope needs two learning rates that move it); "
        f"{_verdict(curve, name, law)}."
    )


def _moves(changes: list[float], law: Law, slope: str) -> str:
    """Say which way, and whether as straight as the order that leads."""
    assert law.fit is not None
    if min(changes) < 0 < max(changes):
        return f"changes its direction (|ΔF|: {slope})"
    verb = "rises" if max(changes) > 0 else "falls"
    how = ["in proportion to the learning rate", "with the square of the learning rate"][law.lead - 1]
    straight = abs(law.fit.slope.value - law.lead) <= STRAIGHT
    return f"{verb}{'' if straight else ', but not'} {how} ({slope})"


def _verdict(curve: Curve, name: str | None, law: Law) -> str:
    """Say how far the leading order reaches: by the second order, or, without one, by the measured points."""
    until = curve.linear_until_lr(name) if law.lead == 1 else None
    if until is None:
        return _found_close(curve, name, law)
    if math.isinf(until):
        return "its second order is 0"
    off = [
        (lr, r)
        for lr, r in zip(curve.lrs, curve.readings(name), strict=True)
        if lr <= until and r.nonlinearity > 2 * CLOSE
    ]
    if off:
        lr, r = off[-1]
        return (
            f"by its second order, first order is within 5 % up to lr {lr_text(until, 2)}, but it misses "
            f"{percent(r.nonlinearity, 0)} at lr {lr_text(lr)}"
        )
    beside = ", below what was swept" if until < curve.lrs[0] else ""
    beside = ", beyond what was swept" if until > curve.lrs[-1] else beside
    return f"first order is within 5 % up to lr {lr_text(until, 2)}{beside}"


def _found_close(curve: Curve, name: str | None, law: Law) -> str:
    order, close, count = ["first", "second"][law.lead - 1], close_at(curve, name), len(curve.lrs)
    if law.lead == 2 and all(r.second_order is None for r in curve.readings(name)):
        return "its first order is 0, and the second was not asked for"
    if all(r.is_lost for r in curve.readings(name)):
        return f"how close {order} order is to it cannot be told"
    if len(close) == count:
        return f"{order} order is within 5 % of it at every learning rate"
    if not close:
        return f"{order} order is within 5 % of it at no learning rate"
    return f"{order} order is within 5 % of it at {len(close)} of {count} learning rates, up to lr {lr_text(close[-1])}"
