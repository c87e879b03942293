"""`CurveResult`: a sweep that answers for every learning rate up to its largest, not only for those of its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from funcprobe.errors import InputError
from funcprobe.measurement.bounds import Bounds, Found, bisected, check_relative
from funcprobe.measurement.curve import ScoreCurve, points_of
from funcprobe.measurement.outcome import Outcome
from funcprobe.results.codec import NOT_KEPT
from funcprobe.results.storage import Kind
from funcprobe.results.sweep import SweepResult


@dataclass(frozen=True)
class CurveResult(SweepResult):
    """How observables move with the learning rate of one update, at any learning rate up to the largest of its table.

    What is saved is the table; a loaded curve answers for its learning rates alone, since the scores stay behind.
    """

    kind: ClassVar[Kind] = "curve"

    nodes: int = 0  #: places where the curve took tangents or values of the scores beside θ; 0 where there is none
    reach: float = 0.0  #: up to which learning rate it answers without another pass
    scores: ScoreCurve | None = field(default=None, repr=False, compare=False, metadata=NOT_KEPT)

    @property
    def crossover(self) -> float | None:
        """The learning rate at which |δF₂| = |δF₁| of the main observable; None without a second order."""
        return self.crossover_lr()

    @property
    def linear_until(self) -> float | None:
        """The learning rate up to which first order is within 5 %, for the main observable."""
        return self.linear_until_lr()

    def at(self, lr: float) -> Outcome:
        """Return the outcome at a learning rate: readings with bars, effective sample, cautions.

        Raises:
            InputError: If the learning rate is beyond the curve's reach, or is not in the table of a loaded one.
        """
        (point,) = self.sweep([lr]).points
        return point

    def sweep(self, lrs: Sequence[float]) -> SweepResult:
        """Return the sweep over other learning rates of the curve; no model is run.

        Raises:
            InputError: If one is beyond the curve's reach, or is not in the table of a loaded one.
        """
        kept = dict(zip(self.lrs, self.points, strict=True))
        missing = [lr for lr in lrs if lr not in kept]
        if missing:
            curve = self._curve()
            beyond = [lr for lr in missing if not 0 < lr <= self.reach * (1 + 1e-9)]
            if beyond:
                raise InputError(
                    f"Learning rate {beyond[0]:g} is beyond this curve, which reaches from above 0 to {self.reach:g}; "
                    "ask for a curve up to there, or sweep it."
                )
            kept |= dict(zip(missing, points_of(curve.family, curve, missing), strict=True))
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(SweepResult)}
        return SweepResult(**{**fields, "points": tuple(kept[lr] for lr in sorted(lrs))})

    def largest(
        self,
        *,
        min_ess: float | None = None,
        max_abs_delta: float | None = None,
        max_nonlinearity: float | None = None,
        relative: float = 1e-3,
    ) -> Found:
        """Return the largest learning rate of the curve that keeps the bounds, to within a factor of `1 + relative`.

        The bounds are those of `largest_lr`, on the main observable, and no model is run. `limited_by` is what the next
        larger one breaks; None where even the end of the curve keeps all bounds.

        Raises:
            InputError: If no bound is given, one is out of range, even the smallest learning rate of the table breaks
                one, or the curve was loaded.
        """
        bounds = Bounds.of(min_ess, max_abs_delta, max_nonlinearity)
        check_relative(relative)
        curve = self._curve()
        observable = curve.family.measurement.main[1]

        def try_out(lr: float) -> Outcome | str:
            outcome = curve.outcome(lr, bars=False)
            assert outcome is not None  # the table's steps were multiples of one another
            return bounds.broken(outcome, observable) or outcome

        found = bisected(try_out, self.lrs[0], self.reach, relative)
        if not found.kept:
            raise InputError(
                f"The smallest learning rate of the curve's table, {self.lrs[0]:g}, breaks the bound already: "
                f"{found.limited_by}; relax the bound."
            )
        return found

    def _curve(self) -> ScoreCurve:
        if self.scores is None:
            why = "it was loaded from a file" if self.nodes else "there was none to be had (see its notes)"
            raise InputError(
                f"This result holds the table of a curve and not its scores: {why}; its learning rates are "
                f"{', '.join(f'{lr:g}' for lr in self.lrs)}."
            )
        return self.scores
