"""The largest learning rate that keeps a step within bounds, by bisection on scores: one gradient serves all of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Unpack

from funcprobe.errors import InputError, Note, NumericsError
from funcprobe.measurement.cautions import before_measuring, ess_fraction, left_alone
from funcprobe.measurement.learning_rates import LearningRates
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import OF_ONE_STEP, Given, options_of
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.measurement.update import Update
from funcprobe.types import Observable, Progress, Rollouts

#: Options of a probe that can do nothing in a search: bounds are held against numbers, without bars.
IDLE: Collection[str] = (
    *("order", "bars", "level", "seed", "ess_threshold", "on_low_ess"),
    *OF_ONE_STEP,
)

#: The finest bisection: between neighbours in float64 there would be no end of it.
FINEST = 1e-9


class LargestLr(NamedTuple):
    """The largest learning rate that was found to keep every bound."""

    lr: float
    limited_by: str | None  #: what the next larger one tried breaks; None where even the upper end keeps all bounds
    point: Outcome  #: what the step does at `lr`
    tried: int  #: learning rates that were scored
    notes: tuple[Note, ...] = ()  #: where a bound could not be judged


def largest_lr(
    update: Update,
    evaluation: Rollouts,
    observable: Observable | None = None,
    *,
    min_ess: float | None = None,
    max_abs_delta: float | None = None,
    max_nonlinearity: float | None = None,
    between: tuple[float, float] = (1e-9, 1e-1),
    relative: float = 0.02,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> LargestLr:
    """Return the largest learning rate that keeps the bounds, to within a factor of `1 + relative`.

    Where ΔF is lost in float error, a bound is broken only by more than that error; otherwise it cannot be judged there
    and counts as kept, as small steps do keep it, and a note says up to which learning rate that was so.

    Args:
        update: θ and how it is about to change: an update that knows its gradient. Its own learning rate is not used.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observable: The observable that the bounds are about; by default the entropy per token.
        min_ess: Least effective sample, as a fraction of E, on the weights that the observable uses.
        max_abs_delta: Largest |ΔF|, in the observable's unit.
        max_nonlinearity: Largest |ΔF − δF₁| / |ΔF|.
        between: Where to look. The bounds are taken to be kept below the answer and broken above it: bisection on the
            logarithm finds a place where they begin to be broken.
        relative: How finely.
        progress: Called as progress(what, done, total).
        **options: See `Options`: mode, method, tolerance and microbatch.

    Raises:
        InputError: If no bound is given, one is out of range, or the lower end breaks one already.
        NumericsError: If the gradient, the scores at θ, or what the smallest learning rate does is not finite.
    """
    update.need("gradient", "A largest learning rate")
    low, high = _ends(between)
    bounds = _bounds(min_ess, max_abs_delta, max_nonlinearity, relative)
    given = options_of(options, "a search for a learning rate", IDLE, bars=None, rounding=False, ess_threshold=0.0)
    measurement = Measurement.of(update, evaluation, observable, given, progress)
    loss = update.gradient(progress)
    measurement.messages.warn(*update.warnings)
    measurement.messages.add(left_alone(loss.gradient))
    family = LearningRates(measurement, update, low)
    own = {**loss.info, **family.info, "lr": low}
    measurement.messages.warn(*before_measuring(measurement, update.at(low), family.reference, own))

    best, tried = family.point(low, family.move(low)), 2
    if broken := _broken(best, measurement.main[1], bounds):
        raise InputError(
            f"The smallest learning rate, {low:g}, breaks the bound already: {broken}; look further down with "
            "between=(smaller, larger), or relax the bound."
        )
    kept = [best]  # by rising learning rate
    top = _tried(family, high, bounds)
    if isinstance(top, Outcome):
        return LargestLr(high, None, top, tried, _unjudged([best, top], bounds))
    limited_by = top
    while high / low > 1 + relative:
        middle, tried = math.sqrt(low) * math.sqrt(high), tried + 1
        found = _tried(family, middle, bounds)
        if isinstance(found, Outcome):
            low = middle
            kept.append(found)
        else:
            high, limited_by = middle, found
    return LargestLr(low, limited_by, kept[-1], tried, _unjudged(kept, bounds))


def _ends(between: tuple[float, float]) -> tuple[float, float]:
    """Return the ends.

    Raises:
        InputError: If they are not two learning rates, the smaller one first.
    """
    ends = tuple(float(lr) for lr in between)
    if len(ends) != 2 or not 0 < ends[0] < ends[1] < math.inf:
        raise InputError(f"between is {ends}; expected two learning rates, the smaller one first and above 0.")
    return ends


def _bounds(
    min_ess: float | None, max_abs_delta: float | None, max_nonlinearity: float | None, relative: float
) -> Mapping[str, float]:
    """Return the bounds that were given.

    Raises:
        InputError: If there is none, or one is out of range.
    """
    given = {"min_ess": min_ess, "max_abs_delta": max_abs_delta, "max_nonlinearity": max_nonlinearity}
    bounds = {name: value for name, value in given.items() if value is not None}
    if not bounds:
        raise InputError("No bound was given; give min_ess, max_abs_delta or max_nonlinearity.")
    for name, value in {**bounds, "relative": relative}.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}; expected a number above 0.")
    if relative < FINEST:
        raise InputError(f"relative is {relative:g}; expected at least {FINEST:g}: rounding leaves no more to be told.")
    if bounds.get("min_ess", 0.0) > 1:
        raise InputError(f"min_ess is {min_ess}; expected a fraction of the sample, at most 1.")
    return bounds


def _tried(family: LearningRates, lr: float, bounds: Mapping[str, float]) -> Outcome | str:
    """Return the outcome of the step at a learning rate, or the bound that it breaks."""
    try:
        point = family.point(lr, family.move(lr))
    except NumericsError:
        return "finite numbers"
    return _broken(point, family.measurement.main[1], bounds) or point


def _broken(point: Outcome, observable: Observable, bounds: Mapping[str, float]) -> str | None:
    """Return the first bound that a point breaks, with the measured number; NaN keeps none."""
    found = {"min_ess": ess_fraction(point.health, observable), **_found(point.main)}
    for name, bound in bounds.items():
        kept = found[name] >= bound if name == "min_ess" else found[name] <= bound
        if not kept:
            return f"{name} {bound:g} (found {found[name]:.3g})"
    return None


def _found(reading: Reading) -> dict[str, float]:
    """Return the |ΔF| that bounds are held against: where ΔF is lost, the least that its float error leaves."""
    change, remainder = abs(reading.change), abs(reading.remainder)
    if not reading.is_lost:
        return {"max_abs_delta": change, "max_nonlinearity": reading.nonlinearity}
    assert reading.float_error is not None  # known to be too large
    least, most = max(0.0, remainder - reading.float_error), change + reading.float_error
    return {"max_abs_delta": max(0.0, change - reading.float_error), "max_nonlinearity": least / most}


def _unjudged(kept: Sequence[Outcome], bounds: Mapping[str, float]) -> tuple[Note, ...]:
    """Return a note where a point counts as keeping a bound on ΔF because ΔF is lost in float error there."""
    lost = [point.lr for point in kept if point.main.is_lost and point.lr is not None]
    on_change = [name for name in ("max_abs_delta", "max_nonlinearity") if name in bounds]
    if not lost or not on_change:
        return ()
    where = f"ΔF is lost in float error up to lr {lost[-1]:g}, where {' and '.join(on_change)} cannot be judged"
    if not kept[-1].main.is_lost:
        return (Note("unjudged", f"{where} and count as kept; the answer lies above."),)
    ending = "the answer is no more than the largest learning rate that does not visibly break a bound."
    return (Note("unjudged", f"{where}: {ending}"),)
