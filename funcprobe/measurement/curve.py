"""The scores of E at every learning rate up to a largest one, from slopes at a few: no model is run for a point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from funcprobe.measurement.apart import told_apart
from funcprobe.measurement.change import Measured, eps_of, one_rounding
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import FirstOrder
from funcprobe.measurement.learning_rates import LearningRates, naming
from funcprobe.measurement.line import Line
from funcprobe.measurement.measure import Both, outcome_of, stored_of
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.path import EPS64

#: Where ΔF cancels below this part of Σ|terms|, the tolerance is relative to that part in its place.
SMALL = 1e-2

#: What two float32 tangents agree to, in units of eps of Σ|terms|.
TANGENT_UNITS = 8.0


@dataclass(frozen=True)
class ScoreCurve:
    """The scores of E at every learning rate up to `reach`, with the checks that they have passed."""

    family: LearningRates
    line: Line  #: x is the learning rate in units of the family's reference
    worst: Mapping[str, float] = field(default_factory=dict)  #: its largest error, relative to Σ|terms|; {} for a guess
    end: Measured | None = None  #: ΔF at `reach` by two evaluations, and its float error; None for a guess

    @classmethod
    def straight(cls, family: LearningRates) -> ScoreCurve:
        """Return the curve of first order alone, which takes no pass: a guess, whose error is not known."""
        assert family.first.along is not None
        return cls(family, Line.straight(family.first.along))

    @property
    def reach(self) -> float:
        """The largest learning rate that it answers for."""
        return self.line.length * self.family.reference_lr

    @property
    def nodes(self) -> int:
        """How many slopes over E it took beside the one at θ: a pass each, in forward mode where they are tangents."""
        return len(self.line.nodes) - 1

    def outcome(self, lr: float, *, stored: bool = False, bars: bool = True) -> Outcome | None:
        """Return the outcome at a learning rate; None where that step is no multiple of the reference's.

        With `stored`, θ′ as its dtype stores it is scored as well, where rounding sets it apart from θ + Δθ.
        """
        family, x = self.family, lr / self.family.reference_lr
        own = family.measurement._replace(messages=Messages(quiet=True))
        if bars:
            family.resample()
        own = own if bars else own._replace(options=dataclasses.replace(own.options, bars=None))
        with naming(lr):
            move = family.move(lr)
            if not family.is_multiple(move, lr):
                return None
            first = family.first.scaled(x)
            measured = self.measured(x, first)
            both = Both(measured, True)
            if stored and (apart := told_apart(own, move, first)) is not None:
                both = stored_of(own, apart, first, measured)
            return outcome_of(own, move, first, {"lr": lr}, both)[0]

    def measured(self, x: float, first: FirstOrder) -> Measured:
        """Return ΔF of every observable at `x` times the reference's step, with its error."""
        passes, observables = self.family.measurement.passes, self.family.measurement.observables
        evidence = Evidence(passes.evaluation, self.line.anchor, self.line.scores(x), first.along)
        errors = {}
        near = self.line.nearness(x)
        for name, o in observables.items():
            off = max(self.worst.get(name, 0.0) * near, TANGENT_UNITS * eps_of(first))
            errors[name] = off * evidence.magnitude(o) + evidence.noise(o) + one_rounding(evidence, o, EPS64)
            if self.line.by_values and self.end is not None:  # rounding of nodes that two lines share shows in neither
                errors[name] = math.hypot(errors[name], self.end.errors[name] * x / self.line.length)
        # the end of a line through values is a subtraction itself, which nothing independent is held against
        told = self.end is not None and x == self.line.length and not self.line.by_values
        subtractions = self.end.subtractions if told and self.end is not None else {}
        method = "values" if self.line.by_values else "path"
        return Measured(evidence, method, self.nodes, errors, subtractions, None)


def points_of(
    family: LearningRates, curve: ScoreCurve | None, lrs: Sequence[float], chunk: int = 1, stored: bool | None = None
) -> Iterator[Outcome]:
    """Yield the outcome at each learning rate, from the curve as far as it reaches; the others are scored."""
    stored = family.stores_narrower if stored is None else stored
    beyond = []
    for lr in lrs:
        reached = curve is not None and lr <= curve.reach * (1 + 1e-9)
        point = curve.outcome(lr, stored=stored) if curve is not None and reached else None
        if point is None:
            beyond.append(lr)
        else:
            yield point
    yield from family.points(beyond, chunk)
