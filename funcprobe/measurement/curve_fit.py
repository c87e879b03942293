"""The fit of a curve over learning rates: nodes chosen on a part of E, taken on all of it, and checked at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.data.rollouts import take
from funcprobe.estimators.importance import effective_sample_size, log_ratios, sequence_weights
from funcprobe.measurement.change import (
    LOW_PRECISION_UNITS,
    Measured,
    difference_of,
    eps_of,
    is_walkable,
    one_rounding,
    told_otherwise,
)
from funcprobe.measurement.continuity import DISAGREE
from funcprobe.measurement.curve import SMALL, TANGENT_UNITS, ScoreCurve
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.learning_rates import LearningRates, naming
from funcprobe.measurement.line import Line, even, tangents_along, walk
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.path import EPS64
from funcprobe.types import Observable, Rollouts, TokenScores

#: The curve is held against one with a node more on a part of E: this share of the rows, and at least so many. Three
#: rules on a sixteenth of E cost less than half a node.
SHARE, FEWEST = 16, 32

#: By what factor the error that a part of E shows may be above that of all of it: within that factor, all of E decide.
PART_KNOWS = 2.0

#: The most nodes that are tried before the curve is made shorter, by what factor, and how often.
MOST_NODES, SHORTER, ATTEMPTS = 4, 4.0, 6

#: Effective sample that first order must leave, as a fraction: beyond it θ′ is another policy, and is scored.
LEAST_SAMPLE = 0.2

#: Where curves are compared, in units of the largest learning rate.
COMPARED = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.03, 0.01, 0.001)


class Held(NamedTuple):
    """The curve on some rows of E, and one with a node more, which it is held against."""

    rollouts: Rollouts  #: those rows
    total: int  #: how many there are
    coarse: Line
    fine: Line


#: Returns ds/dη at the node of a learning rate η: those that were kept, or those that the function computes.
Keep = Callable[[float, Callable[[], TokenScores]], TokenScores]


def computed(lr: float, compute: Callable[[], TokenScores]) -> TokenScores:
    """Return ds/dη at the node of a learning rate, computed: nothing is kept."""
    return compute()


def fitted(
    family: LearningRates,
    lr_max: float,
    keep: Keep | None = None,
    low: float = 0.0,
) -> ScoreCurve | None:
    """Return the curve up to a learning rate, or as far as one reaches; None where there is none.

    It is fitted on a part of E, with a node more each time until that changes nothing beyond the tolerance, and then
    taken on all of it; at its end it is held against two evaluations, in which a jump of F shows. Where no curve of few
    nodes is as good, a shorter one is fitted.

    There is none where forward mode cannot be used, the arithmetic is too coarse, tokens go to experts, steps are not
    proportional to the learning rate, or F jumps: the measurement's messages say so.
    """
    if not _is_possible(family, lr_max):
        return None
    tolerance = family.measurement.options.curve_tolerance
    passes, move, along = family.measurement.passes, family.reference, family.first.along
    assert along is not None
    tangents_at, keep = tangents_along(passes, move.params, move.delta), keep or computed

    def on_all(x: float) -> TokenScores:
        lr = family.reference_lr
        kept = keep(x * lr, lambda: engine.each(lambda t: t / lr, tangents_at(x)))
        return engine.each(lambda t: t * lr, kept)

    rows, few = _part(passes.evaluation)
    total = passes.evaluation.ids.shape[0]
    whole = len(rows) == total
    on_few = on_all if whole else tangents_along(passes.over_rows(few), move.params, move.delta)
    along_few = along if whole else engine.Directional(*(engine.rows_of(of, rows, few) for of in along[:2]))

    def candidates() -> Iterator[tuple[Line, dict[str, float]]]:
        """Yield curves that a node more does not change on a part of E, taken on all of it: the longest first."""
        longest = _sampled_length(family, lr_max / family.reference_lr)
        for length in (longest / SHORTER**k for k in range(ATTEMPTS)):
            if length < longest and length * family.reference_lr <= low:
                return
            coarse = walk(along_few, even(1), on_few, length)
            for n in range(2, MOST_NODES + 2):
                fine = walk(along_few, even(n), on_few, length)
                worst = _worst(family, Held(few, total, coarse, fine), tolerance if whole else PART_KNOWS * tolerance)
                if worst is not None:
                    yield fine if whole else walk(along, even(n - 1), on_all, length), worst
                coarse = fine

    jumps = 0
    for line, worst in candidates():
        curve, jumped, is_within = _ended(family, line, worst, tolerance)
        if is_within:
            return curve
        if jumped and jumps:  # a node more does not mend it
            family.measurement.messages.note("no curve", JUMPED.format(names=jumped, lr=curve.reach))
            return None
        jumps += bool(jumped)
    family.measurement.messages.note("no curve", NO_CURVE)
    return None


NO_CURVE = (
    "learning rates were scored one by one, because no curve of a few tangents follows the scores, however short it is"
)
WITH_JUMPS = (
    "learning rates were scored one by one, because tokens go to experts: F jumps where one goes elsewhere, and a "
    "curve misses it"
)
TOO_COARSE = (
    "learning rates were scored one by one, because the model's arithmetic (eps {eps:.1e}) is too coarse for a curve; "
    "load it in float32"
)
JUMPED = (
    "learning rates were scored one by one, because {names} at lr {lr:g} is not that of a curve, by more than the "
    "float error of both: F jumps on the way"
)


def _is_possible(family: LearningRates, lr_max: float) -> bool:
    """Return whether there can be a curve; why not goes to the messages, where nothing else says it."""
    measurement, first = family.measurement, family.first
    if measurement.options.method == "difference" or first.along is None:
        return False
    if first.choices:
        measurement.messages.note("no curve", WITH_JUMPS)
        return False
    eps = eps_of(first)
    if eps > measurement.options.path_tolerance and not is_walkable(measurement, family.reference):
        measurement.messages.note("no curve", TOO_COARSE.format(eps=eps))
        return False
    tried = (lr for lr in (lr_max, 0.01 * lr_max) if lr != family.reference_lr)
    return all(family.is_multiple(family.move(lr), lr) for lr in tried)


def _sampled_length(family: LearningRates, length: float) -> float:
    """Return the longest line, by factors, at whose end first order leaves a sample."""
    passes, along = family.measurement.passes, family.first.along
    assert along is not None
    rollouts = passes.evaluation
    for _ in range(ATTEMPTS * 4):
        end = Line.straight(along, length).scores(length)
        weights = sequence_weights(log_ratios(end, along.scores, rollouts), rollouts.weight)
        if float(effective_sample_size(weights) / effective_sample_size(rollouts.weight)) >= LEAST_SAMPLE:
            break
        length /= SHORTER
    return length


def _part(rollouts: Rollouts) -> tuple[Tensor, Rollouts]:
    """Return some rows of E and their rollouts, spread evenly; all where that would not be many fewer.

    Rows of one prompt come in pairs, or alone where the prompt has no other: an observable may compare them.
    """
    total = rollouts.ids.shape[0]
    fewer = total // max(FEWEST, total // SHARE)  # of so many pairs one is taken
    if fewer <= 1:
        return torch.arange(total, device=rollouts.ids.device), rollouts
    prompts, counts = rollouts.group_ids.unique(return_inverse=True, return_counts=True)[1:]
    order = prompts.argsort(stable=True)
    rank = torch.arange(total, device=order.device) - (counts.cumsum(0) - counts)[prompts[order]]
    size = counts[prompts[order]]
    paired = (rank // 2 * 2 + 2 <= size) | (size == 1)
    first = paired & (rank % 2 == 0)
    rows = order[paired & torch.isin(first.cumsum(0) - 1, torch.arange(0, total, fewer, device=order.device))]
    return rows.sort().values, take(rollouts, rows.sort().values)


def _worst(family: LearningRates, held: Held, tolerance: float) -> dict[str, float] | None:
    """Return the most that a node more changes of ΔF anywhere, relative to Σ|terms|; None if beyond the tolerance."""
    eps, worst = eps_of(family.first), {}
    floor = (LOW_PRECISION_UNITS if eps > tolerance else TANGENT_UNITS) * eps
    for name, o in family.measurement.observables.items():
        found = [_off(held, x * held.coarse.length, o) for x in COMPARED]
        if not all(off <= max(tolerance * max(change, SMALL), floor) for off, change in found):
            return None
        worst[name] = max(off for off, _ in found)
    return worst


def _off(held: Held, x: float, observable: Observable) -> tuple[float, float]:
    """Return by how much a node more changes ΔF of all of E, and |ΔF|, both relative to Σ|terms|.

    What it changes is a sum over rows, of which some are known: with their mean μ and spread σ the sum over all N is
    `√(N²μ² + Nσ²)`, where μ² is what the n known ones show, less σ² (1/n − 1/N), which is chance.
    """
    evidence = Evidence(held.rollouts, held.fine.anchor, held.fine.scores(x))
    size = evidence.magnitude(observable)
    if size <= evidence.noise(observable):
        return 0.0, 0.0
    c = engine.cotangents(evidence.of(observable), evidence.after)
    parts = engine.each(lambda c, one, other: (c * (one - other)).sum(1), c, held.coarse.scores(x), evidence.after)
    rows, total = engine.fields(parts).sum(0), held.total
    n, spread = len(rows), float(rows.var()) if len(rows) > 1 else 0.0
    square = max(0.0, float(rows.mean()) ** 2 - spread * (1 / n - 1 / total))
    off = math.sqrt(total**2 * square + (total * spread if total > n else 0.0))
    # scores are sums of the anchor and a change, rounded to float64: of a tiny change that is all that differs
    rounding = 2 * one_rounding(evidence, observable, EPS64)
    return max(0.0, off * n / total - rounding) / size, abs(float(evidence.change(observable))) / size


def _ended(
    family: LearningRates, line: Line, worst: Mapping[str, float], tolerance: float
) -> tuple[ScoreCurve, str, bool]:
    """Return the curve with two evaluations at its end, where its error is the largest, and how it compares with them.

    Where they tell ΔF of some observables otherwise, which come as words, either F jumps on the way, or a part of E has
    told too small an error of the curve. And whether the curve is as good as they tell: they tell nothing where storing
    θ′ has moved it further than the tolerance.
    """
    measurement, lr = family.measurement._replace(messages=Messages(quiet=True)), line.length * family.reference_lr
    with naming(lr):
        move, first = family.move(lr), family.first.scaled(line.length)
        end = difference_of(measurement, move, first, None)
        curve = ScoreCurve(family, line, worst, end)
        measured = curve.measured(line.length, first)
        names = told_otherwise(measurement, move, first, end, measured)
    unseen = move.size.rounding_ratio > tolerance
    is_within = not names and (unseen or _is_within(measurement, measured, end, tolerance))
    return curve, "ΔF of " + ", ".join(f"'{name}'" for name in names) if names else "", is_within


def _is_within(measurement: Measurement, measured: Measured, end: Measured, tolerance: float) -> bool:
    """Return whether every ΔF of a curve agrees with that of two evaluations, within the float error of these."""
    for name, o in measurement.observables.items():
        change = float(measured.evidence.change(o))
        allowed = tolerance * max(abs(change), SMALL * measured.evidence.magnitude(o))
        if abs(change - end.subtractions[name]) > allowed + DISAGREE * end.errors[name]:
            return False
    return True
