"""The largest learning rate that keeps a step within bounds: the root of a curve, confirmed by one scoring pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple, Unpack

from funcprobe.arguments import checked
from funcprobe.errors import InputError, Note, NumericsError
from funcprobe.measurement.bounds import Bounds, Found, bisected, check_relative
from funcprobe.measurement.cautions import before_measuring, ess_fraction, left_alone
from funcprobe.measurement.continuity import disagree
from funcprobe.measurement.curve import ScoreCurve
from funcprobe.measurement.curve_fit import fitted
from funcprobe.measurement.learning_rates import LearningRates
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import OF_ONE_STEP, Given, options_of
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.update import Update
from funcprobe.types import Observable, Progress, Rollouts

#: Options of a probe that can do nothing in a search: bounds are held against numbers, without bars.
IDLE: Collection[str] = (
    *("order", "bars", "level", "seed", "ess_threshold", "on_low_ess"),
    *OF_ONE_STEP,
)

#: How finely first order is searched, and by what factor the curve goes beyond the place that it tells.
RELATIVE_OF_A_GUESS, BEYOND_A_GUESS = 0.1, 4.0

#: How many curves are tried, each longer by that factor, while bounds are kept to their ends.
EXTENSIONS = 4

#: How far below an answer of the curve that scores do not confirm the true one is looked for first.
NEAR = 1e-3


class LargestLr(NamedTuple):
    """The largest learning rate that was found to keep every bound."""

    lr: float
    limited_by: str | None  #: what the next larger one tried breaks; None where even the upper end keeps all bounds
    point: Outcome  #: what the step does at `lr`
    tried: int  #: learning rates that were scored: one, where a curve told the others
    notes: tuple[Note, ...] = ()  #: where a bound could not be judged


@checked
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

    First order tells about where it is; a curve up to there (see `curve`) is searched without another pass, and the
    answer is scored. Without a curve, and beyond it, every learning rate that is tried is scored.

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
    bounds = Bounds.of(min_ess, max_abs_delta, max_nonlinearity)
    check_relative(relative)
    given = options_of(options, "a search for a learning rate", IDLE, bars=None, rounding=False, ess_threshold=0.0)
    measurement = Measurement.of(update, evaluation, observable, given, progress)
    loss = update.gradient(progress)
    measurement.messages.warn(*update.warnings)
    measurement.messages.add(left_alone(loss.gradient))
    family = LearningRates(measurement, update, low)
    own = {**loss.info, **family.info, "lr": low}
    measurement.messages.warn(*before_measuring(measurement, update.at(low), family.reference, own))

    search = _Search(family, bounds, relative)
    found = search.found(low, high)
    if not found.kept:
        raise InputError(
            f"The smallest learning rate, {low:g}, breaks the bound already: {found.limited_by}; look further down "
            "with between=(smaller, larger), or relax the bound."
        )
    return LargestLr(found.lr, found.limited_by, found.kept[-1], search.scored, bounds.unjudged(found.kept))


class _Search:
    """A search along a curve of scores as far as one is at hand, by scoring beyond it."""

    def __init__(self, family: LearningRates, bounds: Bounds, relative: float) -> None:
        self.family, self.bounds, self.relative = family, bounds, relative
        self.scored = 0
        self._last: Outcome | None = None
        self._curve: ScoreCurve | None = None

    def found(self, low: float, high: float) -> Found:
        """Return where the bounds begin to be broken; the answer was scored."""
        on_curve = self._searched(low, high)
        if on_curve is None or not on_curve.kept:
            return bisected(self._score, low, high, self.relative)
        confirmed = self._score(on_curve.lr)
        if isinstance(confirmed, str) and self._is_the_same(on_curve.kept[-1]):
            confirmed = on_curve.kept[-1]  # which the float error of two evaluations takes across the bound
        if isinstance(confirmed, str):  # the answer is below, by the error of the curve, or by what storing does
            near = max(low, on_curve.lr / (1 + max(self.relative, NEAR)))
            by_score = bisected(self._score, near, on_curve.lr, self.relative)
            return by_score if by_score.kept else bisected(self._score, low, near, self.relative)
        if on_curve.limited_by is None and on_curve.lr < high:
            return bisected(self._score, on_curve.lr, high, self.relative)
        return on_curve._replace(kept=(*on_curve.kept[:-1], confirmed))

    def _searched(self, low: float, high: float) -> Found | None:
        """Return where bounds begin to be broken on a curve, or its end where none is; None without a curve."""
        if self.family.first.along is None:
            return None
        self._curve, found = ScoreCurve.straight(self.family), None
        top = BEYOND_A_GUESS * bisected(self._on_curve, low, high, RELATIVE_OF_A_GUESS).lr
        for _ in range(EXTENSIONS):
            top = min(high, top)
            self._curve = fitted(self.family, top, low=low)
            if self._curve is None or self._curve.reach <= low:
                break
            found = bisected(self._on_curve, low, min(high, self._curve.reach), self.relative)
            if found.limited_by is not None or top == high or self._curve.reach < top * (1 - 1e-9):
                break
            top *= BEYOND_A_GUESS
        return found

    def _is_the_same(self, on_curve: Outcome) -> bool:
        """Return whether the outcome that was scored last differs from the curve's by float errors alone."""
        if self._last is None:
            return False
        a, b = on_curve.main, self._last.main
        ess = [ess_fraction(outcome.health, self.family.measurement.main[1]) for outcome in (on_curve, self._last)]
        errors = [reading.float_error or 0.0 for reading in (a, b)]
        return not disagree(a.change - b.change, *errors) and math.isclose(*ess, rel_tol=NEAR)

    def _on_curve(self, lr: float) -> Outcome | str:
        assert self._curve is not None
        return self._tried(lambda: self._curve.outcome(lr, bars=False) or self._scored(lr))  # type: ignore[union-attr]

    def _score(self, lr: float) -> Outcome | str:
        return self._tried(lambda: self._scored(lr))

    def _scored(self, lr: float) -> Outcome:
        self.scored, self._last = self.scored + 1, None
        self._last = self.family.point(lr, self.family.move(lr))
        return self._last

    def _tried(self, take: Callable[[], Outcome]) -> Outcome | str:
        """Return an outcome, or the bound that it breaks."""
        try:
            outcome = take()
        except NumericsError:
            return "finite numbers"
        return self.bounds.broken(outcome, self.family.measurement.main[1]) or outcome


def _ends(between: tuple[float, float]) -> tuple[float, float]:
    """Return the ends.

    Raises:
        InputError: If they are not two learning rates, the smaller one first.
    """
    ends = tuple(float(lr) for lr in between)
    if len(ends) != 2 or not 0 < ends[0] < ends[1] < math.inf:
        raise InputError(f"between is {ends}; expected two learning rates, the smaller one first and above 0.")
    return ends
