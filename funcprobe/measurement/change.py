"""How ΔF is measured, and how far float error lets it be told: by two evaluations, or along a path between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.errors import InputError, NumericsError, percent
from funcprobe.measurement.continuity import disagree
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import FirstOrder
from funcprobe.measurement.line import along_line
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.move import Move
from funcprobe.measurement.path import ROUNDING_UNITS, RULES, Path, path, subtraction_error
from funcprobe.measurement.readings import sample
from funcprobe.measurement.routing import Choices, Routing, watched
from funcprobe.types import Observable, TokenScores

#: Above this fraction of ΔF, the estimated float error of a subtraction is worth a path.
SUBTRACTION_WORTH_A_PATH = 1e-3

#: Up to this fraction of ΔF it is not, where it is a small part of the error bar of ΔF as well; and up to which part.
SUBTRACTION_WITHIN_BARS, PART_OF_A_BAR = 1e-2, 0.05

#: And, where the second order was asked for, above this fraction of it: the remainder is to be seen beside it.
CURVATURE_WORTH_A_PATH = 1e-2

#: What two rules of a path can agree to, in units of eps, where autocast rounds activations inside every node.
LOW_PRECISION_UNITS = 8.0

#: In reverse mode, above this fraction of ΔF, a bound on the float error is worth a scoring pass that estimates it.
BOUND_WORTH_A_PASS = 1e-2


class Measured(NamedTuple):
    """How ΔF of every observable was measured."""

    evidence: Evidence  #: with scores at θ′ as stored, or at θ + Δθ by a path
    method: str
    nodes: int
    errors: Mapping[str, float]  #: estimated float error of ΔF
    subtractions: Mapping[str, float]  #: ΔF by two evaluations where they were made, whatever was chosen
    routing: Routing | None  #: how many tokens are sent elsewhere at θ′; None where the model sends none, or not known


def measure_change(
    measurement: Measurement, move: Move, first: FirstOrder, scores_after: TokenScores | None
) -> Measured:
    """Return ΔF by two evaluations or, where their subtraction is too coarse and F does not jump, by a path.

    Left to itself it takes one node of a path and no more: where one is not enough, the step is large, and a
    subtraction of two evaluations is accurate.

    Raises:
        NumericsError: If `method="path"` does not reach the tolerance, or F jumps on the way.
    """
    options, eps = measurement.options, eps_of(first)
    difference = difference_of(measurement, move, first, scores_after)
    if options.method == "path":
        return _checked(measurement, move, first, difference)
    if first.along is None or options.method == "difference" or _is_fine(measurement, difference):
        return difference
    if eps > options.path_tolerance and not is_walkable(measurement, move):
        measurement.messages.note(
            "subtraction",
            f"ΔF is a subtraction, and float error shows in it: the model's arithmetic (eps {eps:.1e}) is too "
            "coarse for a path; load it in float32",
        )
        return difference
    if _is_rerouted(difference):
        measurement.messages.note(
            "subtraction",
            "ΔF is a subtraction, though float error shows in it: a path misses the jumps where tokens change experts",
        )
        return difference
    if _is_within_bars(measurement, difference):
        measurement.messages.note(
            "subtraction",
            f"ΔF is a subtraction: its float error is at most {percent(SUBTRACTION_WITHIN_BARS, 0)} of it and "
            f"{percent(PART_OF_A_BAR, 0)} of its error bar, so no path was walked; method='path' walks one",
        )
        return difference
    return _preferred(measurement, move, first, difference)


def _checked(measurement: Measurement, move: Move, first: FirstOrder, difference: Measured) -> Measured:
    """Return ΔF by the path that was asked for.

    Raises:
        NumericsError: If it misses the tolerance, or F jumps on the way.
    """
    if (routing := difference.routing) is not None and routing.changed:
        raise NumericsError(
            f"{routing.changed} of {routing.tokens} tokens of E are sent to other experts at θ′ than at θ: F jumps "
            "there, and a path, being an integral of derivatives, misses it; use method='auto' or 'difference'."
        )
    found = _path(measurement, move, first)
    by_path = _by(found, difference)
    # a jump first: it would keep rules from agreeing as well
    if names := told_otherwise(measurement, move, first, difference, by_path):
        raise NumericsError(f"{_jumps(names)}; use method='auto' or 'difference'.")
    if not found.converged:
        raise NumericsError(_not_converged(measurement, found))
    return by_path


def _preferred(measurement: Measurement, move: Move, first: FirstOrder, difference: Measured) -> Measured:
    """Return ΔF by one node of a path, unless the difference is better, or shows that the path misses something."""
    found = _path(measurement, move, first, RULES[:1])
    by_path = _by(found, difference)
    if names := told_otherwise(measurement, move, first, difference, by_path):
        measurement.messages.note("jump", f"{_jumps(names)}; the difference is what is reported")
        return difference
    if found.converged:
        return by_path
    left = max(
        difference.errors[n] / (by_path.evidence.magnitude(o) or 1.0) for n, o in measurement.observables.items()
    )
    better = difference if left < found.reached else by_path
    measurement.messages.note(
        "path",
        f"ΔF is known to about {min(left, found.reached):.1e} of the size of its terms, by a {better.method}: one node "
        "of a path leaves no less, nor does a subtraction; method='path' takes more nodes",
    )
    return better


def difference_of(
    measurement: Measurement, move: Move, first: FirstOrder, scores_after: TokenScores | None
) -> Measured:
    """Return ΔF by two evaluations, with its float error."""
    passes, along = measurement.passes, first.along
    choices, routing = Choices(passes), None
    if scores_after is None:
        order = 0 if along is None else measurement.options.degree
        scores_after = watched(passes, choices).scores(move.after, "E at θ′", order)
        routing = None if first.choices is None else first.choices.against(choices)
    evidence = Evidence(passes.evaluation, first.scores, scores_after, along)
    changes = {name: float(evidence.change(o)) for name, o in measurement.observables.items()}
    if along is None:
        errors = _without_tangents(measurement, move, first, evidence, changes)
    else:
        errors = {name: subtraction_error(evidence, o, eps_of(first)) for name, o in measurement.observables.items()}
    return Measured(evidence, "difference", 0, errors, changes, routing)


def _without_tangents(
    measurement: Measurement, move: Move, first: FirstOrder, evidence: Evidence, changes: Mapping[str, float]
) -> dict[str, float]:
    """Return an estimate of the float error of each difference in reverse mode, where no ṡ explains a score's change.

    Left unexplained altogether, it bounds the error from above; where that bound is too wide, a pass halfway stands in
    for the derivative: `2 (s(θ + ½Δθ) − s)` leaves half as much curvature unexplained as ṡ, and rounding of three times
    the variance. Neither sees a change that is too small to change any bit of the scores. But what such changes add up
    to is known, `ΔF − δF₁`, and it is float error as far as one rounding of every score explains it.
    """
    observables = measurement.observables
    bounds = _left_by(measurement, first, evidence, engine.each(torch.zeros_like, first.scores))
    narrow = [bounds[n] <= max(BOUND_WORTH_A_PASS * abs(changes[n]), evidence.noise(o)) for n, o in observables.items()]
    if not all(narrow):
        halfway = measurement.passes.scores(along_line(move.params, move.delta, 0.5), "E at θ + ½Δθ")
        explained = engine.each(lambda middle, anchor: 2 * (middle - anchor), halfway, first.scores)
        found = _left_by(measurement, first, evidence, explained)
        bounds = {name: min(bounds[name], found[name] / math.sqrt(3)) for name in bounds}
    for name, o in observables.items():
        slope = first.value(name, o, evidence, move.delta)
        assert slope is not None  # every observable that was asked for has its gradient
        unseen = min(abs(changes[name] - slope), one_rounding(evidence, o, eps_of(first)))
        bounds[name] = max(bounds[name], unseen)
    return bounds


def _left_by(
    measurement: Measurement, first: FirstOrder, evidence: Evidence, explained: TokenScores
) -> dict[str, float]:
    """Return the float errors that a part of every score's change leaves, which stands for its derivative."""
    explaining = evidence._replace(along=engine.Directional(first.scores, explained))
    return {name: subtraction_error(explaining, o, eps_of(first)) for name, o in measurement.observables.items()}


def one_rounding(evidence: Evidence, observable: Observable, eps: float) -> float:
    """Return the error in F of one rounding a score, all of a sequence alike: `√Σ_i (Σ_t |c| eps (1 + |s|))²`."""
    c = engine.cotangents(evidence.of(observable), evidence.after)
    parts = engine.each(lambda c, s: (c.abs() * eps * (1 + s.abs())).sum(1), c, evidence.anchor)
    return float(engine.fields(parts).sum(0).norm())


def eps_of(first: FirstOrder) -> float:
    """Return the eps of the arithmetic that made the scores at θ."""
    assert first.eps is not None
    return first.eps


def is_walkable(measurement: Measurement, move: Move) -> bool:
    """Return whether the nodes of a path are different points: leaves as fine as its tolerance, whatever computes."""
    return max(torch.finfo(p.dtype).eps for p in move.params.values()) <= measurement.options.path_tolerance


def _path(measurement: Measurement, move: Move, first: FirstOrder, rules: Sequence[int] = RULES) -> Path:
    """Walk the path. Under autocast each ṡ is as accurate as its arithmetic, and no rule agrees better with another."""
    assert first.along is not None  # a path is refused in reverse mode
    tolerance, eps = measurement.options.path_tolerance, eps_of(first)
    if is_walkable(measurement, move) and eps > tolerance:
        tolerance = LOW_PRECISION_UNITS * eps
    observables = measurement.observables
    return path(measurement.passes, move.params, move.delta, first.along, observables, tolerance, eps, rules)


def _by(found: Path, difference: Measured) -> Measured:
    evidence = difference.evidence._replace(after=found.scores)
    return difference._replace(evidence=evidence, method="path", nodes=found.nodes, errors=found.errors)


def told_otherwise(
    measurement: Measurement, move: Move, first: FirstOrder, difference: Measured, by_path: Measured
) -> list[str]:
    """Return the observables of which difference and path disagree by more than rounding can explain.

    Scores that differ by a few roundings of one tell nothing, in whatever way these add up in F; and neither does what
    the rounding of θ′ adds: a difference sees θ′ as stored, a path θ + Δθ.
    """
    tolerance, errors = measurement.options.path_tolerance, {}
    for name, o in measurement.observables.items():  # a path promises no more than its tolerance
        promised = max(by_path.errors[name], tolerance * by_path.evidence.magnitude(o))
        errors[name] = math.hypot(difference.errors[name], promised)
    apart = engine.each(torch.sub, difference.evidence.after, by_path.evidence.after)

    def off(name: str, apart: TokenScores) -> bool:
        beyond = _beyond_rounding(by_path.evidence, measurement.observables[name], apart, eps_of(first))
        return disagree(beyond, errors[name])

    suspects = [name for name in errors if off(name, apart)]
    if not suspects:
        return []
    rounded = measurement.passes.directional(move.after, move.rounding(), "E at θ′, along its rounding")
    apart = engine.each(torch.sub, apart, rounded.tangents)
    return [name for name in suspects if off(name, apart)]


def _beyond_rounding(evidence: Evidence, observable: Observable, apart: TokenScores, eps: float) -> float:
    """Return `F(s + r) − F(s + r̄)`, with r how far scores are from those of a path, and r̄ at most some roundings."""
    f, at = evidence.of(observable), evidence.after

    def explained(r: Tensor, s: Tensor) -> Tensor:
        cap = ROUNDING_UNITS * eps * (1 + s.abs())
        return s + r.clamp(-cap, cap)

    return float(f(engine.each(torch.add, at, apart)) - f(engine.each(explained, apart, at)))


def _jumps(names: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names)
    return (
        f"ΔF of {listed} by a difference is not that of a path, by more than the float error of both: F jumps between "
        "θ and θ′, which a path, being an integral of derivatives, misses"
    )


def _not_converged(measurement: Measurement, found: Path) -> str:
    return (
        f"The path integral reached {found.reached:.1e} of the size of its terms with {found.nodes} nodes; the "
        f"tolerance is {measurement.options.path_tolerance:.1e}. Ask for a larger tolerance, a smaller learning rate, "
        "or load the model in a wider dtype."
    )


def _is_rerouted(difference: Measured) -> bool:
    return difference.routing is not None and difference.routing.changed > 0


def _is_within_bars(measurement: Measurement, difference: Measured) -> bool:
    """Return whether the float error of ΔF is nothing beside its error bar, where there are bars.

    A second order that was asked for is to be seen beside the remainder, which float error may take most of.
    """
    evidence, along = difference.evidence, difference.evidence.along
    if measurement.options.bars is None or (along is not None and along.curvatures is not None):
        return False
    errors, changes = difference.errors, difference.subtractions
    if any(errors[name] > SUBTRACTION_WITHIN_BARS * abs(changes[name]) for name in errors):
        return False
    try:
        sampled = sample(evidence, measurement.observables, "infinitesimal")
    except (InputError, NumericsError):
        return False  # it is said where the bars are made
    bars = {name: sampled.bar(name, "change", measurement.options.level).error for name in errors}
    return all(errors[name] <= PART_OF_A_BAR * bars[name] for name in errors)


def _is_fine(measurement: Measurement, difference: Measured) -> bool:
    """Return whether the float error of every ΔF that moves is a small share of it and, where it is known, of δF₂."""
    evidence, errors, subtractions = difference.evidence, difference.errors, difference.subtractions
    curved = evidence.along is not None and evidence.along.curvatures is not None
    for name, o in measurement.observables.items():
        if abs(subtractions[name]) <= evidence.noise(o) and errors[name] <= evidence.noise(o):
            continue  # it does not move
        limits = [SUBTRACTION_WORTH_A_PATH * abs(subtractions[name])]
        limits += [CURVATURE_WORTH_A_PATH * abs(float(evidence.second_order(o)))] if curved else []
        if errors[name] > min(limits):
            return False
    return True
