"""Candidates for a curve over learning rates: lines that a node more does not change, and how that is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from funcprobe import engine
from funcprobe.engine.passes import Passes
from funcprobe.measurement.change import eps_of
from funcprobe.measurement.curve import SMALL, TANGENT_UNITS
from funcprobe.measurement.curve_part import Apart, Held, apart, part_of
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.learning_rates import LearningRates
from funcprobe.measurement.line import Line, even, secants_along, spread, tangents_along, walk
from funcprobe.types import Observable, Rollouts, TokenScores

#: By what factor the error that a part of E shows may be above that of all of it: within that factor, all of E decide.
PART_KNOWS = 2.0

#: The most tangents that are tried before the curve is made shorter.
MOST_NODES = 4

#: Values are tried where one rounding of each at the end, independent ones, is at most so many tolerances of F. It is a
#: guess: rounding was .01 to 13 times that on two policies. What values are good for is then seen in them.
WORTH_TRYING = 4.0

#: How well a curve through values has to know δF₂ where it is read off it: to a hundredth, as its bend is rounded.
BEND = 1e-2

#: Where lines through values have their nodes, in the order in which they are tried: each is held against the next.
VALUES = (spread(3), (*spread(3), 0.5), spread(5))

#: The node that is left out of a line to see whether rows jump, or to stand for a line with a node less.
LEFT_OUT = 1

#: Where curves are compared, in units of the largest learning rate.
COMPARED = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.03, 0.01, 0.001)


#: Returns a slope at the node of a learning rate η: one that was kept, or that the function computes. The name is that
#: of its kind.
Keep = Callable[[str, float, Callable[[], TokenScores]], TokenScores]


class Candidate(NamedTuple):
    """A line over all of E, and its largest error relative to Σ|terms|, by observable."""

    line: Line
    worst: dict[str, float]


@dataclass(frozen=True)
class Rows:
    """Rows of E: their scores and tangents at θ, and ways to their slopes elsewhere on the line."""

    rollouts: Rollouts
    along: engine.Directional
    tangents_at: Callable[[float], TokenScores]
    secants_at: Callable[[float], TokenScores]

    @classmethod
    def of(cls, family: LearningRates, passes: Passes, along: engine.Directional) -> Rows:
        """Return the rows that passes go over."""
        move, options = family.reference, family.measurement.options
        given = (passes, move.params, move.delta)
        order: Literal[0, 1, 2] = options.degree
        return cls(passes.evaluation, along, tangents_along(*given), secants_along(*given, along.scores, order))

    def kept(self, keep: Keep, lr: float) -> Rows:
        """Return the same, with slopes that are kept as derivatives by the learning rate: `lr` is that of x = 1."""

        def of(kind: str, slopes_at: Callable[[float], TokenScores]) -> Callable[[float], TokenScores]:
            def found(x: float) -> TokenScores:
                slope = keep(kind, x * lr, lambda: engine.each(lambda t: t / lr, slopes_at(x)))
                return engine.each(lambda t: t * lr, slope)

            return found

        return Rows(self.rollouts, self.along, of("tangent", self.tangents_at), of("secant", self.secants_at))

    def by_tangents(self, n: int, length: float) -> Line:
        """Return the line by n tangents beside the one at θ."""
        return walk(self.along, even(n), self.tangents_at, length)

    def by_values(self, nodes: Sequence[float], length: float, known: Line | None = None) -> Line:
        """Return the line by values at some nodes; those that another line has are taken from it."""
        there = {} if known is None else dict(zip(known.nodes, known.slopes, strict=True))

        def secants_at(x: float) -> TokenScores:
            return there[x] if x in there else self.secants_at(x)

        return walk(self.along, nodes, secants_at, length, by_values=True)


@dataclass(frozen=True)
class Candidates:
    """Lines for the curve of a family, as cheap as they come: chosen on a part of E, and taken on all of it."""

    family: LearningRates
    few: Rows
    whole: Rows
    bends: bool  #: whether δF₂ is read off them

    @classmethod
    def of(cls, family: LearningRates, keep: Keep, bends: bool) -> Candidates:
        """Return the candidates, with slopes over all of E that are kept."""
        passes, along = family.measurement.passes, family.first.along
        assert along is not None
        rows, part = part_of(passes.evaluation)
        everything = Rows.of(family, passes, along).kept(keep, family.reference_lr)
        if len(rows) == len(passes.evaluation.ids):
            return cls(family, everything, everything, bends)
        of_part = engine.Directional(*(engine.rows_of(of, rows, part) for of in along[:2]))
        return cls(family, Rows.of(family, passes.over_rows(part), of_part), everything, bends)

    def up_to(self, length: float) -> Iterator[Candidate]:
        """Yield candidates of a length, the cheapest first: by values, by one tangent, by more."""
        if self._are_worth_trying(length):
            yield from self._by_values_of_all(length) if self._is_whole else self._by_values(length)
        coarse = None
        for n in range(2, MOST_NODES + 2):
            fine = self.few.by_tangents(n, length)
            # of the first one, a node that is left out stands for the passes of a line with a node less
            if (worst := self._within(coarse or _left_out(fine), fine, self._allowed)) is not None:
                line = fine if self._is_whole else self.whole.by_tangents(n - 1, length)
                yield Candidate(line, self._of_whole(worst))
            coarse = fine

    def _by_values_of_all(self, length: float) -> Iterator[Candidate]:
        """Yield the line by three values, or by four, where a part of E is all of it."""
        line = self.whole.by_values(VALUES[0], length)
        if (worst := self._tells(_left_out(line), line)) is not None:
            yield Candidate(line, worst)
        fine = self.whole.by_values(VALUES[1], length, line)
        if (worst := self._tells(line, fine)) is not None:
            yield Candidate(fine, worst)

    def _by_values(self, length: float) -> Iterator[Candidate]:
        """Yield the line by the fewest values that is as good as the next on a part of E.

        A line through values is right at its end by making, so that a jump does not show there. It shows where a value
        is left out: over all of E that changes no more than a part has told.
        """
        line = self.few.by_values(VALUES[0], length)
        for nodes, more in itertools.pairwise(VALUES):
            fine = self.few.by_values(more, length, line)
            if (worst := self._tells(line, fine)) is not None:
                of_all = self.whole.by_values(nodes, length)
                if (unseen := self._unseen(line, of_all)) is not None:
                    yield Candidate(of_all, {n: off + unseen[n] for n, off in self._of_whole(worst).items()})
                return
            line = fine

    def _of_whole(self, worst: dict[str, float]) -> dict[str, float]:
        """Return the largest errors that all of E may have where a part of it shows these."""
        return worst if self._is_whole else {name: PART_KNOWS * off for name, off in worst.items()}

    def _unseen(self, of_few: Line, of_all: Line) -> dict[str, float] | None:
        """Return the most that leaving out a value changes over all of E, beyond the part's; None if that is a jump."""
        told, unseen = self._apart(self.few, _left_out(of_few), of_few), dict[str, float]()
        for name, found in self._apart(self.whole, _left_out(of_all), of_all).items():
            pairs = list(zip(found, told[name], strict=True))
            if not all(at.off <= self._tolerance * at.size + PART_KNOWS * part.off for at, part in pairs):
                return None
            unseen[name] = max(0.0, *(at.off - part.off for at, part in pairs))
        return unseen

    def _are_worth_trying(self, length: float) -> bool:
        """Return whether rounding of values at the end of a line may be within the tolerance of every ΔF."""
        measurement, along = self.family.measurement, self.whole.along
        if measurement.options.method == "path":
            return False
        end = Evidence(self.whole.rollouts, along.scores, Line.straight(along, length).scores(length))
        eps = eps_of(self.family.first)
        for o in measurement.observables.values():
            allowed = self._tolerance * max(abs(float(end.change(o))), SMALL * end.magnitude(o))
            c = engine.cotangents(end.of(o), end.after)
            rounding = engine.fields(engine.each(lambda c, s: c * eps * (1 + s.abs()), c, end.anchor)).norm()
            if not float(rounding) <= WORTH_TRYING * allowed:
                return False
        return True

    def _tells(self, coarse: Line, fine: Line) -> dict[str, float] | None:
        """Return by how much two lines through values differ at most; None where they do not tell F, or its bend."""
        worst = self._within(coarse, fine, self._allowed)
        return worst if worst is not None and self._bend_alike(coarse, fine) else None

    def _bend_alike(self, coarse: Line, fine: Line) -> bool:
        """Return whether two lines tell δF₂ of every observable alike, where it is asked for."""
        if not self.bends:
            return True
        rollouts, at, tangents = self.few.rollouts, self.few.along.scores, self.few.along.tangents

        def second(line: Line, o: Observable) -> float:
            return float(Evidence(rollouts, at, at, engine.Directional(at, tangents, line.curvature())).second_order(o))

        observables = self.family.measurement.observables.values()
        return all(abs(second(coarse, o) - second(fine, o)) <= BEND * abs(second(fine, o)) for o in observables)

    @property
    def _is_whole(self) -> bool:
        return self.few is self.whole

    @property
    def _tolerance(self) -> float:
        return self.family.measurement.options.curve_tolerance

    @property
    def _allowed(self) -> float:
        return self._tolerance * (1.0 if self._is_whole else PART_KNOWS)

    def _within(self, coarse: Line, fine: Line, tolerance: float) -> dict[str, float] | None:
        """Return by how much two lines differ at most, relative to Σ|terms|; None where it is beyond a tolerance."""
        eps = eps_of(self.family.first)
        floor = TANGENT_UNITS * eps
        worst = {}
        for name, found in self._apart(self.few, coarse, fine).items():
            if not all(at.off <= max(tolerance * at.size, floor) for at in found):
                return None
            worst[name] = max(at.off for at in found)
        return worst

    def _apart(self, rows: Rows, coarse: Line, fine: Line) -> dict[str, list[Apart]]:
        """Return how far two lines over some rows of E are apart, over all of E, everywhere on them."""
        held = Held(rows.rollouts, len(self.whole.rollouts.ids), coarse, fine)
        observables = self.family.measurement.observables
        return {name: [apart(held, x * fine.length, o) for x in COMPARED] for name, o in observables.items()}


def _left_out(line: Line) -> Line:
    return line.without(line.nodes[LEFT_OUT])
