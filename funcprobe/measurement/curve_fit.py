"""The fit of a curve over learning rates: as long as candidates are good, and checked at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from funcprobe.estimators.importance import effective_sample_size, log_ratios, sequence_weights
from funcprobe.measurement.change import difference_of, eps_of, is_walkable, told_otherwise
from funcprobe.measurement.continuity import DISAGREE
from funcprobe.measurement.curve import SMALL, ScoreCurve
from funcprobe.measurement.curve_candidates import Candidates, Keep
from funcprobe.measurement.learning_rates import LearningRates, naming
from funcprobe.measurement.line import Line
from funcprobe.measurement.messages import Messages
from funcprobe.types import TokenScores

#: By what factor a curve is made shorter where none is good enough, and how often.
SHORTER, ATTEMPTS = 4.0, 6

#: What a node more leaves of a miss, if it leaves it: within this factor either way. So does a jump.
STAYS = 2.0

#: Effective sample that first order must leave, as a fraction: beyond it θ′ is another policy, and is scored.
LEAST_SAMPLE = 0.2


def computed(kind: str, lr: float, compute: Callable[[], TokenScores]) -> TokenScores:
    """Return the slope at the node of a learning rate, computed: nothing is kept."""
    return compute()


def fitted(
    family: LearningRates,
    lr_max: float,
    keep: Keep | None = None,
    low: float = 0.0,
    bends: bool = False,
) -> ScoreCurve | None:
    """Return the curve up to a learning rate, or as far as one reaches; None where there is none.

    It is fitted on a part of E, with a node more each time until that changes nothing beyond the tolerance, and then
    taken on all of it. Its nodes are values where these tell ΔF, and tangents elsewhere; a curve of tangents is held
    against two evaluations at its end, where a jump of F shows. Where no curve of few nodes is as good, a shorter one
    is fitted, which ends before the jump if there is one. Where it `bends`, δF₂ is read off it, which rounding of
    values has to leave alone as well.

    There is none where forward mode cannot be used, the arithmetic is too coarse, tokens go to experts, steps are not
    proportional to the learning rate, or F jumps: the measurement's messages say so.
    """
    if not _is_possible(family, lr_max):
        return None
    tolerance = family.measurement.options.curve_tolerance
    candidates, jumped = Candidates.of(family, keep or computed, bends), False
    longest = _sampled_length(family, lr_max / family.reference_lr)
    for length in (longest / SHORTER**k for k in range(ATTEMPTS)):
        if length < longest and length * family.reference_lr <= low:
            break
        missed = dict[str, float]()
        for line, worst in candidates.up_to(length):
            curve, misses, is_within = _ended(family, line, worst, tolerance)
            if is_within:
                return curve
            if stay := [name for name, by in missed.items() if 1 / STAYS < misses.get(name, 0.0) / by < STAYS]:
                if jumped:  # at two lengths: where slow convergence stays like this, a fourth of the way is enough
                    names = "ΔF of " + ", ".join(f"'{name}'" for name in stay)
                    family.measurement.messages.note("no curve", JUMPED.format(names=names, lr=curve.reach))
                    return None
                jumped = True
                break  # a node more does not mend it
            missed = misses or missed
    family.measurement.messages.note("no curve", NO_CURVE)
    return None


NO_CURVE = (
    "learning rates were scored one by one, because no curve of a few nodes follows the scores, however short it is"
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


def _ended(
    family: LearningRates, line: Line, worst: Mapping[str, float], tolerance: float
) -> tuple[ScoreCurve, dict[str, float], bool]:
    """Return the curve with two evaluations at its end, where its error is the largest, and how it compares with them.

    Where they tell ΔF of some observables otherwise, which come with what the curve misses, either F jumps on the way,
    or a part of E has told too small an error of the curve. And whether the curve is as good as they tell: they tell
    nothing where storing θ′ has moved it further than the tolerance.
    """
    measurement, lr = family.measurement._replace(messages=Messages(quiet=True)), line.length * family.reference_lr
    with naming(lr):
        move, first = family.move(lr), family.first.scaled(line.length)
        end = difference_of(measurement, move, first, line.scores(line.length) if line.by_values else None)
        curve = ScoreCurve(family, line, worst, end)
        measured = curve.measured(line.length, first)
        names = told_otherwise(measurement, move, first, end, measured)
    changes = {n: float(measured.evidence.change(o)) for n, o in measurement.observables.items()}
    sizes = {n: measured.evidence.magnitude(o) for n, o in measurement.observables.items()}
    missed = {n: end.subtractions[n] - change for n, change in changes.items()}
    if not line.by_values:  # what all of E shows there, beyond what a part of it has told
        shown = {n: max(0.0, abs(by) - end.errors[n]) / (sizes[n] or 1.0) for n, by in missed.items()}
        curve = replace(curve, worst={n: max(off, shown[n]) for n, off in worst.items()})
    unseen = move.size.rounding_ratio > tolerance
    known = all(math.isfinite(error) for error in measured.errors.values())
    allowed = {n: tolerance * max(abs(change), SMALL * sizes[n]) for n, change in changes.items()}
    # which no NaN is
    is_close = all(abs(by) <= allowed[n] + DISAGREE * end.errors[n] for n, by in missed.items())
    return curve, {name: missed[name] for name in names}, known and not names and (unseen or is_close)
