"""How ΔF is measured, and how far float error lets it be told: by two evaluations, or along a path between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from funcprobe import engine
from funcprobe.analysis.continuity import disagree
from funcprobe.analysis.evidence import Evidence
from funcprobe.analysis.expansion import Path, along_line, path, subtraction_error
from funcprobe.analysis.first_order import First
from funcprobe.analysis.inquiry import Inquiry
from funcprobe.analysis.movement import Move
from funcprobe.analysis.routing import Choices, Routing, watched
from funcprobe.errors import NumericsError
from funcprobe.types import TokenScores

#: Above this fraction of ΔF, the estimated float error of a subtraction is worth a path.
SUBTRACTION_WORTH_A_PATH = 1e-3

#: And, where the second order was asked for, above this fraction of it: the remainder is to be seen beside it.
CURVATURE_WORTH_A_PATH = 1e-2

#: In reverse mode, above this fraction of ΔF, a bound on the float error is worth a scoring pass that estimates it.
BOUND_WORTH_A_PASS = 1e-2


class Measured(NamedTuple):
    """How ΔF of every observable was measured."""

    evidence: Evidence  #: with scores at θ′ as stored, or at θ + Δθ by a path
    method: str
    nodes: int
    errors: Mapping[str, float]  #: estimated float error of ΔF
    subtractions: Mapping[str, float]  #: ΔF by two evaluations, whatever was chosen
    routing: Routing | None  #: how many tokens are sent elsewhere at θ′; None where the model sends none, or not known


def measure_change(asked: Inquiry, move: Move, first: First, scores_after: TokenScores | None) -> Measured:
    """Return ΔF by two evaluations or, where their subtraction is too coarse and F does not jump, by a path.

    Raises:
        NumericsError: If `method="path"` does not reach the tolerance, or F jumps on the way.
    """
    options, eps = asked.options, first.eps
    assert eps is not None
    difference = _difference(asked, move, first, scores_after)
    if options.method == "path":
        return _checked(asked, move, first, difference)
    if first.along is None or options.method == "difference" or _is_fine(asked, difference):
        return difference
    if eps > options.tolerance:
        asked.said.notes.append(
            f"ΔF is a subtraction, and float error shows in it: the model's arithmetic (eps {eps:.1e}) is too "
            "coarse for a path; load it in float32"
        )
        return difference
    if _is_rerouted(difference):
        asked.said.notes.append(
            "ΔF is a subtraction, though float error shows in it: a path misses the jumps where tokens change experts"
        )
        return difference
    return _preferred(asked, move, first, difference)


def _checked(asked: Inquiry, move: Move, first: First, difference: Measured) -> Measured:
    """Return ΔF by the path that was asked for.

    Raises:
        NumericsError: If it misses the tolerance, or F jumps on the way.
    """
    if (routing := difference.routing) is not None and routing.changed:
        raise NumericsError(
            f"{routing.changed} of {routing.tokens} tokens of E are sent to other experts at θ′ than at θ: F jumps "
            "there, and a path, being an integral of derivatives, misses it; use method='auto' or 'difference'."
        )
    found = _path(asked, move, first)
    if not found.converged:
        raise NumericsError(_not_converged(asked, found))
    by_path = _by(found, difference)
    if names := _apart(asked, move, difference, by_path):
        raise NumericsError(f"{_jumps(names)}; use method='auto' or 'difference'.")
    return by_path


def _preferred(asked: Inquiry, move: Move, first: First, difference: Measured) -> Measured:
    """Return ΔF by a path, unless that is no better, or the difference shows that it misses something."""
    found = _path(asked, move, first)
    by_path = _by(found, difference)
    if names := _apart(asked, move, difference, by_path):
        asked.said.notes.append(f"{_jumps(names)}; the difference is what is reported")
        return difference
    if found.converged:
        return by_path
    asked.said.notes.append(_not_converged(asked, found))
    better = any(difference.errors[name] < found.errors[name] for name in found.errors)
    return difference if better else by_path


def _difference(asked: Inquiry, move: Move, first: First, scores_after: TokenScores | None) -> Measured:
    """Return ΔF by two evaluations, with its float error."""
    passes, along = asked.passes, first.along
    choices, routing = Choices(len(passes.evaluation.ids)), None
    if scores_after is None:
        order = 0 if along is None else asked.options.order
        scores_after = watched(passes, choices).scores(move.after, "E at θ′", order)
        routing = None if first.choices is None else first.choices.against(choices)
    evidence = Evidence(passes.evaluation, first.scores, scores_after, along)
    changes = {name: float(evidence.change(o)) for name, o in asked.observables.items()}
    errors = _float_errors(asked, move, first, evidence, changes)
    return Measured(evidence, "difference", 0, errors, changes, routing)


def _float_errors(
    asked: Inquiry, move: Move, first: First, evidence: Evidence, changes: Mapping[str, float]
) -> dict[str, float]:
    """Return an estimate of the float error of each difference.

    In reverse mode there is no ṡ to explain the change of a score. Left unexplained altogether, it bounds the error
    from above; where that bound is too wide, a pass halfway stands in for the derivative: `2 (s(θ + ½Δθ) − s)` leaves
    half as much curvature unexplained as ṡ, and three times the variance of rounding.
    """
    eps, observables = first.eps, asked.observables
    assert eps is not None
    if first.along is not None:
        return {name: subtraction_error(evidence, o, eps) for name, o in observables.items()}

    def left_by(explained: TokenScores) -> dict[str, float]:
        explaining = evidence._replace(along=engine.Directional(first.scores, explained))
        return {name: subtraction_error(explaining, o, eps) for name, o in observables.items()}

    bounds = left_by(engine.each(torch.zeros_like, first.scores))
    narrow = [bounds[n] <= max(BOUND_WORTH_A_PASS * abs(changes[n]), evidence.noise(o)) for n, o in observables.items()]
    if all(narrow):
        return bounds
    halfway = asked.passes.scores(along_line(move.params, move.update, 0.5), "E at θ + ½Δθ")
    found = left_by(engine.each(lambda middle, anchor: 2 * (middle - anchor), halfway, first.scores))
    return {name: min(bounds[name], found[name] / math.sqrt(3)) for name in bounds}


def _path(asked: Inquiry, move: Move, first: First) -> Path:
    assert first.along is not None  # a path is refused in reverse mode
    assert first.eps is not None
    tolerance = asked.options.tolerance
    return path(asked.passes, move.params, move.update, first.along, asked.observables, tolerance, first.eps)


def _by(found: Path, difference: Measured) -> Measured:
    evidence = difference.evidence._replace(after=found.scores)
    return difference._replace(evidence=evidence, method="path", nodes=found.nodes, errors=found.errors)


def _apart(asked: Inquiry, move: Move, difference: Measured, by_path: Measured) -> list[str]:
    """Return the observables of which difference and path disagree by more than float error, and rounding of θ′."""
    errors = {n: math.hypot(difference.errors[n], by_path.errors[n]) for n in asked.observables}
    off = {n: difference.subtractions[n] - float(by_path.evidence.change(o)) for n, o in asked.observables.items()}
    suspects = [name for name in off if disagree(off[name], errors[name])]
    if not suspects:
        return []
    # a difference sees θ′ as stored, a path θ + Δθ
    rounded = asked.passes.directional(move.after, move.rounding(), "E at θ′, along its rounding")
    for name in suspects:
        off[name] -= float(engine.derivative(difference.evidence.of(asked.observables[name]), rounded)[1])
    return [name for name in suspects if disagree(off[name], errors[name])]


def _jumps(names: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names)
    return (
        f"ΔF of {listed} by a difference is not that of a path, by more than the float error of both: F jumps between "
        "θ and θ′, which a path, being an integral of derivatives, misses"
    )


def _not_converged(asked: Inquiry, found: Path) -> str:
    return (
        f"The path integral reached {found.reached:.1e} of the size of its terms with {found.nodes} nodes; the "
        f"tolerance is {asked.options.tolerance:.1e}. Ask for a larger tolerance, a smaller learning rate, or load the "
        "model in a wider dtype."
    )


def _is_rerouted(difference: Measured) -> bool:
    return difference.routing is not None and difference.routing.changed > 0


def _is_fine(asked: Inquiry, difference: Measured) -> bool:
    """Return whether float error leaves every ΔF alone, and what it has beyond first order where that was asked for."""
    evidence, errors, subtractions = difference.evidence, difference.errors, difference.subtractions
    curved = evidence.along is not None and evidence.along.curvatures is not None
    for name, o in asked.observables.items():
        if abs(subtractions[name]) <= evidence.noise(o) and errors[name] <= evidence.noise(o):
            continue  # it does not move
        limits = [SUBTRACTION_WORTH_A_PATH * abs(subtractions[name])]
        limits += [CURVATURE_WORTH_A_PATH * abs(float(evidence.second_order(o)))] if curved else []
        if errors[name] > min(limits):
            return False
    return True
