"""Candidates for a curve over learning rates: lines that a node more does not change, and how that is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.data.rollouts import take
from funcprobe.engine.passes import Passes
from funcprobe.measurement.change import LOW_PRECISION_UNITS, eps_of, one_rounding
from funcprobe.measurement.curve import SMALL, TANGENT_UNITS
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.learning_rates import LearningRates
from funcprobe.measurement.line import Line, even, secants_along, spread, tangents_along, walk
from funcprobe.measurement.path import EPS64
from funcprobe.types import Observable, Rollouts, TokenScores

#: Lines are chosen on a part of E: this share of the rows, and at least so many, where all of E are so many times more.
SHARE, FEWEST, LEAST_SAVED = 16, 16, 4

#: By what factor the error that a part of E shows may be above that of all of it: within that factor, all of E decide.
PART_KNOWS = 2.0

#: The most tangents that are tried before the curve is made shorter.
MOST_NODES = 4

#: Values are tried where one rounding of each at the end, independent ones, is at most so many tolerances of F. It is a
#: guess: rounding was .01 to 13 times that on two policies. What values are good for is then seen in them.
WORTH_TRYING = 4.0

#: How well a curve through values has to know δF₂ where it is read off it: to a hundredth, as its bend is rounded.
BEND = 1e-2

#: The node that is left out of three values to see whether rows jump, and the one that is added to see their error.
LEFT_OUT, ADDED = 1, 0.5

#: Where curves are compared, in units of the largest learning rate.
COMPARED = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.03, 0.01, 0.001)


#: Returns a slope at the node of a learning rate η: one that was kept, or that the function computes. The name is that
#: of its kind.
Keep = Callable[[str, float, Callable[[], TokenScores]], TokenScores]


class Apart(NamedTuple):
    """How far two lines are apart somewhere, relative to Σ|terms|."""

    off: float  #: the difference of ΔF over all of E
    size: float  #: |ΔF|, or `SMALL` where that is less


class Candidate(NamedTuple):
    """A line over all of E, and its largest error relative to Σ|terms|, by observable."""

    line: Line
    worst: dict[str, float]


class Held(NamedTuple):
    """The curve on some rows of E, and one with a node more, which it is held against."""

    rollouts: Rollouts  #: those rows
    total: int  #: how many there are
    coarse: Line
    fine: Line


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

    def by_values(self, length: float) -> Line:
        """Return the line by three values, one of them at its end."""
        return walk(self.along, spread(3), self.secants_at, length, by_values=True)

    def refined(self, line: Line) -> Line:
        """Return a line by values with one more in its middle."""
        x = ADDED * line.length
        return line._replace(nodes=(*line.nodes, x), slopes=(*line.slopes, self.secants_at(x)))


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
        if (found := self._by_values(length)) is not None:
            yield found
        coarse = None if self._is_whole else self.few.by_tangents(1, length)
        for n in range(2, MOST_NODES + 2):
            fine = self.few.by_tangents(n, length)
            # where all of E is asked, a node that is left out stands for a pass over it
            held = fine.without(fine.nodes[LEFT_OUT]) if coarse is None else coarse
            if (worst := self._within(held, fine, self._allowed)) is not None:
                yield Candidate(fine if self._is_whole else self.whole.by_tangents(n - 1, length), worst)
            coarse = fine

    def _by_values(self, length: float) -> Candidate | None:
        """Return the line by three values or, where a part of E is all of it, four; None where they do not tell F.

        A curve through values is right at its end by making, so that a jump does not show there. It shows where a value
        is left out: over all of E that changes no more than a part has told.
        """
        if not self._are_worth_trying(length):
            return None
        line = self.few.by_values(length)
        left_out = line.without(line.nodes[LEFT_OUT])
        worst = self._within(left_out, line, self._tolerance) if self._is_whole else None
        if worst is not None and self._bend_alike(left_out, line):
            return Candidate(line, worst)
        fine = self.few.refined(line)
        if (worst := self._within(line, fine, self._allowed)) is None or not self._bend_alike(line, fine):
            return None
        if self._is_whole:
            return Candidate(fine, worst)
        of_all = self.whole.by_values(length)
        told = self._apart(self.few, left_out, line)
        for name, found in self._apart(self.whole, of_all.without(of_all.nodes[LEFT_OUT]), of_all).items():
            expected = (PART_KNOWS * at.off for at in told[name])
            if any(at.off > self._tolerance * at.size + off for at, off in zip(found, expected, strict=True)):
                return None
        return Candidate(of_all, {name: PART_KNOWS * off for name, off in worst.items()})

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
            if float(rounding) > WORTH_TRYING * allowed:
                return False
        return True

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
        floor = (LOW_PRECISION_UNITS if eps > tolerance else TANGENT_UNITS) * eps
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


def part_of(rollouts: Rollouts) -> tuple[Tensor, Rollouts]:
    """Return some rows of E and their rollouts, spread evenly; all where that would not be many fewer.

    Rows of one prompt come in pairs, or alone where the prompt has no other: an observable may compare them.
    """
    total = rollouts.ids.shape[0]
    fewer = total // max(FEWEST, total // SHARE)  # of so many pairs one is taken
    if fewer < LEAST_SAVED:
        return torch.arange(total, device=rollouts.ids.device), rollouts
    prompts, counts = rollouts.group_ids.unique(return_inverse=True, return_counts=True)[1:]
    order = prompts.argsort(stable=True)
    rank = torch.arange(total, device=order.device) - (counts.cumsum(0) - counts)[prompts[order]]
    size = counts[prompts[order]]
    paired = (rank // 2 * 2 + 2 <= size) | (size == 1)
    first = paired & (rank % 2 == 0)
    rows = order[paired & torch.isin(first.cumsum(0) - 1, torch.arange(0, total, fewer, device=order.device))]
    return rows.sort().values, take(rollouts, rows.sort().values)


def apart(held: Held, x: float, observable: Observable) -> Apart:
    """Return by how much a node more changes ΔF of all of E.

    What it changes is a sum over rows, of which some are known: with their mean μ and spread σ the sum over all N is
    `√(N²μ² + Nσ²)`, where μ² is what the n known ones show, less σ² (1/n − 1/N), which is chance.
    """
    evidence = Evidence(held.rollouts, held.fine.anchor, held.fine.scores(x))
    size = evidence.magnitude(observable)
    if size <= evidence.noise(observable):
        return Apart(0.0, SMALL)
    c = engine.cotangents(evidence.of(observable), evidence.after)
    parts = engine.each(lambda c, one, other: (c * (one - other)).sum(1), c, held.coarse.scores(x), evidence.after)
    rows, total = engine.fields(parts).sum(0), held.total
    n, spread = len(rows), float(rows.var()) if len(rows) > 1 else 0.0
    square = max(0.0, float(rows.mean()) ** 2 - spread * (1 / n - 1 / total))
    off = math.sqrt(total**2 * square + (total * spread if total > n else 0.0))
    # scores are sums of the anchor and a change, rounded to float64: of a tiny change that is all that differs
    rounding = 2 * one_rounding(evidence, observable, EPS64)
    change = abs(float(evidence.change(observable))) / size
    return Apart(max(0.0, off * n / total - rounding) / size, max(change, SMALL))
