"""One update, measured and predicted: ΔF on held-out rollouts, δF₁ from the very same step, error bars of both."""

from __future__ import annotations

from typing import Unpack

import torch

from funcprobe import tree
from funcprobe.arguments import checked
from funcprobe.measurement.cautions import about_the_copy, step
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import FirstOrder, first_order
from funcprobe.measurement.measure import family_of, measure, wants_rounding
from funcprobe.measurement.measurement import Measurement, Observables
from funcprobe.measurement.move import Move
from funcprobe.measurement.options import Given, options_of
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.update import Update
from funcprobe.parallel.shards import gather_leaves
from funcprobe.results.environment import describe_environment
from funcprobe.results.probe import ProbeResult
from funcprobe.results.provenance import BatchCounts, Provenance
from funcprobe.types import Leaves, Params, Progress, Rollouts


@checked
def probe(
    update: Update,
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> ProbeResult:
    """Take one update and return how far observables move on `evaluation`, measured and predicted.

    Measured: `ΔF = F(θ′) − F(θ)`, importance-sampled on rollouts drawn at θ. Predicted: `δF₁ = ⟨∇F, Δθ⟩` with Δθ the
    step as a value. Both come from the same rollouts, so on one batch they agree to O(‖Δθ‖²); their common sampling
    error is that of the estimator (see `entropy`). Nothing that is passed in changes.

    Args:
        update: θ and how it is about to change; any depth will do. See `Update`.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observables: One, or several by name, all read from the same passes; by default the entropy per token. Exchange
            rates are ΔF of the first per ΔF of each other one.
        progress: Called as progress(what, done, total).
        **options: See `Options`.

    Raises:
        InputError: If an option, an observable, a batch or the learning rate is out of range.
        NumericsError: If scores or gradients are not finite, or a path that was asked for misses its tolerance or a
            jump.
        ForwardModeError: In `mode="forward"`, `method="path"` or `order=2`, if the model has no forward derivative.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below `ess_threshold` of the sample.
    """
    chosen = options_of(options, "a probe")
    measurement = Measurement.of(update, evaluation, observables, chosen, progress)
    move, info = step(measurement, update)
    rounding = move.rounding() if wants_rounding(measurement, move) else None
    first = first_order(measurement, update.params, move.delta, rounding)
    outcome, evidence = measure(measurement, move, first, info)
    return result_of(measurement, update, move, first, outcome, evidence)


def result_of(
    measurement: Measurement, update: Update, move: Move, first: FirstOrder, outcome: Outcome, evidence: Evidence
) -> ProbeResult:
    """Return an outcome with all that a probe tells beside it."""
    options = measurement.options
    return ProbeResult(
        outcome=outcome,
        provenance=provenance_of(measurement, update, first.mode),
        top=move.top(options.top_k),
        family=family_of(measurement, move, first, evidence) if outcome.main.is_measured else {},
        delta=_portable(move.delta) if options.keep_delta else None,
        evidence=evidence if options.keep_scores else None,
    )


def provenance_of(measurement: Measurement, update: Update, mode: str) -> Provenance:
    """Return how the numbers of a measurement were made."""
    passes = measurement.passes
    return Provenance(
        evaluation=BatchCounts.of(passes.evaluation),
        batch=None if update.batch is None else BatchCounts.of(update.batch),
        mode=mode,
        environment=describe_environment(passes.policy.device, update.params, update.storage),
        timings=passes.clock.seconds,
        checks=tuple(about_the_copy(update)),
    )


def _portable(delta: Leaves) -> Params:
    whole = (gather_leaves({name: d}) if isinstance(name, tree.Part) else {name: d} for name, d in delta.items())
    return {name: d.detach().to("cpu", torch.float32) for leaf in whole for name, d in leaf.items()}
