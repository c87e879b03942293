"""A step that has been taken, measured from its end: rollouts of θ_b, weighted back to θ_a.

    ΔF = F(θ_b) − F(θ_a),   both on E ~ θ_b, anchored there
    δF₁ = ⟨∇F(θ_b), θ_b − θ_a⟩

The batch that a trainer draws after a step is a fresh sample of the stepped policy and did not make that step, so it is
an honest E for it, and costs nothing. What is measured is the step back, from θ_b to θ_a; every order changes its sign,
and so δF₂ is −½ D²F(θ_b)[Δθ, Δθ].

Estimand: the change of F between the two policies, over prompts as they were drawn. Bias: that of the observable, with
the second policy as its anchor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from funcprobe import engine
from funcprobe.errors import InputError
from funcprobe.estimators.divergence import Divergence
from funcprobe.estimators.importance import sampler_mismatch
from funcprobe.estimators.observables import entropy
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.cautions import step
from funcprobe.measurement.first_order import first_order
from funcprobe.measurement.measure import measure
from funcprobe.measurement.measurement import Measurement, named
from funcprobe.measurement.move import displacement
from funcprobe.measurement.options import Options
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.measurement.update import Update
from funcprobe.policy.module import Policy
from funcprobe.types import Observable, Params, Progress, Rollouts, TokenScores

#: Mean |Δ log p| between a sampler and the anchor, nats per token, above which rollouts are another policy's: what
#: engines and precisions differ by is a tenth of it.
ANOTHER_POLICY = 0.3


class LookedBack(NamedTuple):
    """The measurement of a step from its end."""

    readings: dict[str, Reading]  #: signed forward
    outcome: Outcome  #: of the step back, as it was measured
    covector: Params  #: ∇F of the first observable at θ_b
    sampler_gap: float | None  #: mean |Δ log p| between the sampler and the anchor, nats per token


def look_back(
    policy: Policy,
    now: Params,
    before: Params,
    evaluation: Rollouts,
    observables: Mapping[str, Observable],
    options: Options,
    progress: Progress | None = None,
) -> LookedBack:
    """Return the change that led from `before` to `now`, on rollouts drawn at `now`; no rollouts are sampled.

    Raises:
        InputError: If the rollouts hold no tokens, cannot serve an observable, or are another policy's.
        NumericsError: If scores are not finite.
    """
    if not bool(evaluation.completion_mask.any()):
        raise InputError("The rollouts hold no completion token, so nothing can be measured on them.")
    back = Update.from_delta(policy, now, displacement(now, before), before)
    mirrored = {name: _mirrored(o) for name, o in observables.items()}
    measurement = Measurement.of(back, evaluation, mirrored, options, progress, quiet=True)
    move, info = step(measurement, back)
    first = first_order(measurement, now, move.delta)
    gap = _checked_gap(first.scores, evaluation)
    outcome, evidence = measure(measurement, move, first, info)
    name, main = measurement.main
    covector = first.gradients.get(name)
    if covector is None:
        c = engine.cotangents(evidence.of(main), first.scores)
        covector = measurement.passes.pull_back(c, now, "E, gradient of F")
    readings = {n: _forward(reading, observables[n]) for n, reading in outcome.readings.items()}
    return LookedBack(readings, outcome, covector, gap)


def observables_of(observables: Observable | Mapping[str, Observable] | None) -> dict[str, Observable]:
    """Return observables by name, of which the first can be split: it has a first order.

    Raises:
        InputError: If there is none, one is no observable, or the first is a divergence.
    """
    found = named({"entropy": entropy()} if observables is None else observables)
    if isinstance(next(iter(found.values())), Divergence):
        raise InputError(
            "The first observable is a divergence, whose first order is 0, so there is nothing to split; give it after "
            "another, such as {'entropy': entropy(), 'kl': kl()}."
        )
    return found


def _mirrored(observable: Observable) -> Observable:
    """Return the observable seen from the other end: the anchor of a divergence is the second policy."""
    if isinstance(observable, Divergence):
        return replace(observable, of="before" if observable.of == "after" else "after")
    return observable


def _forward(back: Reading, observable: Observable) -> Reading:
    """Return the reading of a step back as that of the step: from its beginning to its end."""
    if isinstance(observable, Divergence):
        return back._replace(observable=observable.name)
    return back._replace(
        before=back.after,
        change=-back.change,
        first_order=-back.first_order,
        second_order=None if back.second_order is None else -back.second_order,
        subtraction=None if back.subtraction is None else -back.subtraction,
        exact=None if back.exact is None else -back.exact,
        stored=None if back.stored is None else -back.stored,
        bars={name: bar if name == "ratio" else _negative(bar) for name, bar in back.bars.items()},
    )


def _negative(bar: Bar) -> Bar:
    return Bar(-bar.value, bar.error, -bar.high, -bar.low, bar.level)


def _checked_gap(anchor: TokenScores, evaluation: Rollouts) -> float | None:
    """Return how far the sampler's log-probabilities are from the anchor's; None where there are none.

    Raises:
        InputError: If they are another policy's.
    """
    theirs = evaluation.sampling_logps if evaluation.sampling_logps is not None else evaluation.old_logps
    mismatch = sampler_mismatch(anchor, evaluation._replace(sampling_logps=theirs))
    if mismatch is None:
        return None
    if not mismatch.gap <= ANOTHER_POLICY:
        raise InputError(
            f"The rollouts are not this policy's: their log-probabilities differ from its own by {mismatch.gap:.3g} "
            f"nats per token, and at most {ANOTHER_POLICY} is engine and precision; give rollouts that were drawn from "
            "the parameters of this moment, with the temperature that they were drawn at.",
            kind="another policy",
            found=mismatch.gap,
        )
    return mismatch.gap
