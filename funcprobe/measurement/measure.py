"""The effect of a step on observables on held-out rollouts: ΔF measured, δF₁ (and δF₂) predicted, with error bars."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from funcprobe import engine, tree
from funcprobe.errors import InputError, NumericsError
from funcprobe.estimators.importance import WeightHealth, log_ratios, weight_health
from funcprobe.estimators.observables import entropy_family
from funcprobe.estimators.uncertainty import Bar, Replicates
from funcprobe.measurement.apart import Apart, first_of_stored, told_apart
from funcprobe.measurement.cautions import after_measuring, check_ess
from funcprobe.measurement.change import Measured, measure_change
from funcprobe.measurement.continuity import remarks
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import FirstOrder
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.move import Move
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading, Sampled, sample, with_bars
from funcprobe.types import Estimate, Observable, TokenScores

#: Above this ratio of rounding to update, the rounding row is worth a pass of its own.
ROUNDING_WORTH_A_PASS = 1e-3


#: The eps above which a model's arithmetic is coarser than float32.
LOW_PRECISION = 1e-6


def measure(
    measurement: Measurement,
    move: Move,
    first: FirstOrder,
    info: Mapping[str, float],
    scores_after: TokenScores | None = None,
) -> tuple[Outcome, Evidence]:
    """Return all that one step does to the observables, given its first order; and the scores that it was read from.

    `info` is what the step reported. `scores_after` are the scores at θ′, where a caller has them already.

    Raises:
        NumericsError: If a path that was asked for misses its tolerance or a jump, or a score is not finite.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below the threshold.
    """
    return outcome_of(measurement, move, first, info, _both(measurement, move, first, scores_after))


def outcome_of(
    measurement: Measurement, move: Move, first: FirstOrder, info: Mapping[str, float], both: Both
) -> tuple[Outcome, Evidence]:
    """Return all that a measured step tells, and the scores that it was read from; no model is run for ΔF.

    Raises:
        NumericsError: If a number is not finite.
        EffectiveSampleSizeError: As `measure`.
    """
    evaluation, options, messages = measurement.passes.evaluation, measurement.options, measurement.messages
    measured, other = both.measured, both.other
    evidence = measured.evidence
    row = _rounding_row(measurement, move, first, evidence) if both.row is None else both.row
    healths = {name: _health(evidence, o) for name, o in measurement.observables.items()}
    health = healths[measurement.main[0]]
    messages.warn(*after_measuring(first.scores, evaluation, health))
    for name, o in measurement.observables.items():
        check_ess(healths[name], o, options.ess_threshold, options.on_low_ess, messages)
    readings = {
        name: _reading(measurement, move, first, evidence, name, o, measured)
        for name, o in measurement.observables.items()
    }
    _say(measurement, move, first, readings, measured)
    sampled = _sampled(measurement, evidence, first.orders)
    if sampled is not None:
        readings = with_bars(measurement, readings, sampled, evidence, healths)
    if other is not None:
        readings = {name: _beside(measurement, name, reading, both, other) for name, reading in readings.items()}
    outcome = Outcome(
        readings=readings,
        exchange=_exchange(readings, sampled, options.level),
        health=health,
        lr=info.get("lr"),
        delta_norm=move.size.norm,
        rounding_ratio=move.size.rounding_ratio,
        unmoved=move.size.unmoved,
        rounding=row,
        info={name: value for name, value in info.items() if name != "lr"},
        routing=measured.routing,
        sampled=sampled,
        warnings=tuple(messages.warnings),
        notes=tuple(messages.notes),
    )
    return outcome, evidence


class Both(NamedTuple):
    """A step as it was measured, and, where storing sets θ′ apart from θ + Δθ, the other of the two."""

    measured: Measured  #: the main one
    of_delta: bool  #: whether that is θ + Δθ
    other: Evidence | None = None
    subtractions: Mapping[str, float | None] | None = None  #: of θ′ as stored
    row: float | None = None  #: the rounding row, where it came with the tangents along θ′ − θ


def _both(measurement: Measurement, move: Move, first: FirstOrder, scores_after: TokenScores | None) -> Both:
    """Return the measured outcome: of one step, or of two where storing θ′ sets it apart from θ + Δθ.

    Where a run stores what it steps in a narrower dtype than the arithmetic's, the main one is θ + Δθ at every learning
    rate, so that ΔF is compared with its own first order, unless a difference was asked for, which sees θ′.
    """
    apart = told_apart(measurement, move, first)
    if apart is None:
        measured = measure_change(measurement, move, first, scores_after)
        return Both(measured, measured.method == "path")
    method, order = measurement.options.method, measurement.options.degree
    exactly = move.narrow and apart.held and method != "difference"
    if exactly and scores_after is None and method != "path":
        scores_after = measurement.passes.scores(move.after, "E at θ′", 0 if first.along is None else order)
    measured = measure_change(measurement, *((apart.exact, first, None) if exactly else (move, first, scores_after)))
    if exactly or measured.method == "path":
        return stored_of(measurement, apart, first, measured, scores_after)
    if not apart.held:  # the path did not converge: θ′ is all there is
        return Both(measured, of_delta=False)
    exact = measure_change(measurement, apart.exact, first, None)
    return Both(measured, False, exact.evidence, measured.subtractions)


def stored_of(
    measurement: Measurement,
    apart: Apart,
    first: FirstOrder,
    exact: Measured,
    scores_after: TokenScores | None = None,
) -> Both:
    """Return a step of which θ + Δθ was measured, with θ′ as its dtype stores it beside."""
    along = first_of_stored(measurement, apart.stored, first)
    stored = _measured_as_stored(measurement, apart, first, along, scores_after)
    row = None
    if along is not None:
        row = _value(along, measurement, stored.evidence) - _value(first, measurement, exact.evidence)
    return Both(exact, True, stored.evidence, stored.subtractions, row)


def _measured_as_stored(
    measurement: Measurement,
    apart: Apart,
    first: FirstOrder,
    along: FirstOrder | None,
    scores_after: TokenScores | None,
) -> Measured:
    """Return θ′ measured: by subtraction alone where there are no tangents along θ′ − θ, as in a sweep."""
    if along is not None:
        return measure_change(measurement, apart.stored, along, scores_after)
    plain = measurement._replace(options=dataclasses.replace(measurement.options, method="difference"))
    return measure_change(plain, apart.stored, first, scores_after)


def _value(first: FirstOrder, measurement: Measurement, evidence: Evidence) -> float:
    """Return δF₁ of the first observable along the direction of some tangents."""
    assert first.along is not None
    return float(engine.derivative(evidence.of(measurement.main[1]), first.along)[1])


def _beside(measurement: Measurement, name: str, reading: Reading, both: Both, other: Evidence) -> Reading:
    """Return a reading with ΔF of both θ + Δθ and θ′ as stored, the other one with its error bar."""
    observable, bars = measurement.observables[name], dict(reading.bars)
    found = float(other.change(observable))
    found = 0.0 if abs(found) <= other.noise(observable) else found
    what = "stored" if both.of_delta else "exact"
    sampled = _sampled(measurement, other) if bars else None
    if sampled is not None:
        bars[what] = sampled.bar(name, "change", measurement.options.level)
    exact, stored = (reading.change, found) if both.of_delta else (found, reading.change)
    subtraction = None if both.subtractions is None else both.subtractions[name]
    return reading._replace(exact=exact, stored=stored, of_delta=both.of_delta, subtraction=subtraction, bars=bars)


def family_of(measurement: Measurement, move: Move, first: FirstOrder, evidence: Evidence) -> dict[str, Estimate]:
    """Return every member of the entropy family on the same scores; no model is run."""
    proposal = measurement.main[1].proposal
    return {o.name: _estimate(measurement, move, first, evidence, o) for o in entropy_family(proposal)}


def _reading(
    measurement: Measurement,
    move: Move,
    first: FirstOrder,
    evidence: Evidence,
    name: str,
    observable: Observable,
    measured: Measured,
) -> Reading:
    slope = first.value(name, observable, evidence, move.delta)
    assert slope is not None  # every observable that was asked for has its gradient
    second = first.second(name, observable, evidence)
    before, change = float(evidence.before(observable)), float(evidence.change(observable))
    if max(abs(change), abs(slope)) <= evidence.noise(observable):
        change = slope = 0.0  # what is left of an observable that does not move is rounding of its value
    if not (math.isfinite(change) and math.isfinite(slope)):
        raise NumericsError(
            f"'{name}' is {before:g} before the step, and its change is {change:g}, its first order {slope:g}: the "
            "step is too large for these rollouts, or the observable divides by what becomes 0."
        )
    return Reading(
        observable.name,
        observable.unit,
        before,
        change,
        slope,
        second,
        measured.method,
        measured.nodes,
        measured.errors[name],
        measured.subtractions.get(name),
        of_delta=measured.method in ("path", "values"),
    )


def _say(
    measurement: Measurement, move: Move, first: FirstOrder, readings: Mapping[str, Reading], measured: Measured
) -> None:
    """Say which readings float error has eaten, and where F jumps."""
    warned, noted = remarks(readings, measured.routing, move.size.rounding_ratio)
    measurement.messages.warn(*warned)
    measurement.messages.add(noted)
    if lost := [name for name, reading in readings.items() if reading.is_lost]:
        listed = ", ".join(f"'{name}'" for name in lost)
        wider = "float64" if first.eps is not None and first.eps < LOW_PRECISION else "float32"
        measurement.messages.note(
            "lost",
            f"ΔF of {listed} is lost in float error, which is above a tenth of it; δF₁, a derivative, keeps its "
            f"accuracy. Take a larger learning rate, or load the model in {wider}",
        )


def _sampled(measurement: Measurement, evidence: Evidence, orders: Replicates | None = None) -> Sampled | None:
    """Return replicates over prompts; None where none were asked for, or "auto" finds that there can be none.

    Raises:
        InputError: If a named method cannot be used.
        NumericsError: The same for a replicate that is not finite.
    """
    options = measurement.options
    if options.bars is None:
        return None
    try:
        with measurement.passes.clock("error bars"):
            generator = torch.Generator().manual_seed(options.seed)
            return sample(evidence, measurement.observables, options.bars, generator, orders)
    except (InputError, NumericsError) as error:
        if options.bars != "auto":
            raise
        measurement.messages.note("no bars", f"no error bars: {error}")
        return None


def _health(evidence: Evidence, observable: Observable) -> WeightHealth:
    d = log_ratios(evidence.after, evidence.anchor, evidence.rollouts, observable.proposal)
    return weight_health(d, evidence.rollouts)


def _exchange(readings: dict[str, Reading], sampled: Sampled | None, level: float) -> dict[str, Bar]:
    """Return ΔF of the first observable per ΔF of each other; divergences, without first order, have none."""
    main, *others = readings
    found = {}
    for other in others:
        if readings[other].first_order == 0.0 or readings[other].change == 0.0:
            continue
        if readings[main].is_lost or readings[other].is_lost:
            continue  # a ratio of rounding
        value = readings[main].change / readings[other].change
        barred = sampled is not None and readings[main].bars and readings[other].bars
        unknown = Bar(value, math.inf, -math.inf, math.inf, level)
        found[f"{main} per {other}"] = sampled.exchange(main, other, level) if barred and sampled else unknown
    return found


def _estimate(
    measurement: Measurement, move: Move, first: FirstOrder, evidence: Evidence, member: Observable
) -> Estimate:
    """Return a member of the entropy family from the same scores."""
    name = next((name for name, o in measurement.observables.items() if o == member), "")
    slope = first.value(name, member, evidence, move.delta)
    before, change = float(evidence.before(member)), float(evidence.change(member))
    return Estimate(before, before + change, change, slope)


def wants_rounding(measurement: Measurement, move: Move) -> bool:
    """Return whether the rounding row is worth a forward-mode derivative."""
    wanted = measurement.options.rounding
    return wanted is True or (wanted == "auto" and move.size.rounding_ratio > ROUNDING_WORTH_A_PASS)


def _rounding_row(measurement: Measurement, move: Move, first: FirstOrder, evidence: Evidence) -> float | None:
    """Return ⟨∇F, (θ′ − θ) − Δθ⟩ of the first observable: free in reverse mode, a pass in forward mode."""
    name, observable = measurement.main
    if name in first.gradients:
        return float(tree.dot(first.gradients[name], move.rounding()))
    if not wants_rounding(measurement, move):
        if measurement.options.rounding == "auto":
            ratio = move.size.rounding_ratio
            measurement.messages.note(
                "no rounding row", f"the rounding row was not computed: rounding is {ratio:.1e} of ‖Δθ‖"
            )
        return None
    along = first.rounding or measurement.passes.directional(move.params, move.rounding(), "E, rounding row")
    return float(engine.derivative(evidence.of(observable), along)[1])
