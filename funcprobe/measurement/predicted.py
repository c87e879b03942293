"""The outcome of an update of which only the first order was taken: ∇F and Δθ are known, ΔF is not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from funcprobe import tree
from funcprobe.errors import NumericsError
from funcprobe.estimators.importance import log_ratios, weight_health
from funcprobe.measurement.cautions import after_measuring
from funcprobe.measurement.covector import Covector
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.move import Move
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading


def predicted(
    measurement: Measurement, covector: Covector, move: Move, info: Mapping[str, float]
) -> tuple[Outcome, Evidence]:
    """Return `δF₁ = ⟨∇F, Δθ⟩` as an outcome whose ΔF is NaN, and the scores at θ; no model is run.

    The health is that of the weights at θ. There are no error bars: in reverse mode no tangents of E's scores are
    known, which replicates over prompts are made of.

    Raises:
        NumericsError: If δF₁ is not finite.
    """
    evaluation, messages, observable = measurement.passes.evaluation, measurement.messages, covector.observable
    anchor, gradient = covector.first.scores, covector.gradient
    health = weight_health(log_ratios(anchor, anchor, evaluation, observable.proposal), evaluation)
    messages.warn(*after_measuring(anchor, evaluation, health))
    slope, before = float(tree.dot(gradient, move.delta)), float(observable(anchor, anchor, evaluation))
    if not math.isfinite(slope):
        raise NumericsError(
            f"The first order of '{covector.name}' is {slope:g}, and '{covector.name}' itself {before:g}: the step or "
            "∇F is not finite; check the weights and the optimizer state."
        )
    reading = Reading(observable.name, observable.unit, before, math.nan, slope, method="none")
    outcome = Outcome(
        readings={covector.name: reading},
        exchange={},
        health=health,
        lr=info.get("lr"),
        delta_norm=move.size.norm,
        rounding_ratio=move.size.rounding_ratio,
        unmoved=move.size.unmoved,
        rounding=float(tree.dot(gradient, move.rounding())),
        info={name: value for name, value in info.items() if name != "lr"},
        warnings=tuple(messages.warnings),
        notes=tuple(messages.notes),
    )
    return outcome, Evidence(evaluation, anchor, anchor)
