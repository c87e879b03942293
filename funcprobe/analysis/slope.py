"""The first order of one update by itself: δF₁ of observables, without a pass at θ′."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

from funcprobe.arguments import checked
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import first_order
from funcprobe.measurement.measurement import Measurement, Observables
from funcprobe.measurement.options import OF_ONE_STEP, Given, options_of
from funcprobe.measurement.update import Update
from funcprobe.types import Progress, Rollouts

#: Options of a probe that can do nothing where nothing is measured.
OF_A_MEASUREMENT: Collection[str] = (
    *("method", "tolerance", "order", "bars", "level", "seed", "ess_threshold", "on_low_ess"),
    *OF_ONE_STEP,
)


@checked
def slope(
    update: Update,
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> dict[str, float]:
    """Return `δF₁ = ⟨∇F, Δθ⟩` of each observable: the predicted half of a probe, from one pass over E.

    Args:
        update: θ and how it is about to change; any depth will do.
        evaluation: Rollouts E, drawn at θ.
        observables: One, or several by name; by default the entropy per token.
        progress: Called as progress(what, done, total).
        **options: See `Options`: mode and microbatch.

    Raises:
        InputError: If an option, an observable or a batch cannot be used.
        NumericsError: If scores or gradients are not finite.
        ForwardModeError: In `mode="forward"`, if the model has no forward derivative.
    """
    given = options_of(options, "a first order", OF_A_MEASUREMENT)
    measurement = Measurement.of(update, evaluation, observables, given, progress)
    delta = update.move(progress)[0].delta
    measurement.messages.warn(*update.warnings)
    first = first_order(measurement, update.params, delta)
    evidence = Evidence(measurement.passes.evaluation, first.scores, first.scores, first.along)
    slopes = {name: first.value(name, o, evidence, delta) for name, o in measurement.observables.items()}
    return {name: value for name, value in slopes.items() if value is not None}
