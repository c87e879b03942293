"""Which parameters, prompts and tokens moved a functional of the policy: the parts of one step's δF₁, all of them.

    δF₁ = Σ_n ⟨∇F_n, Δθ_n⟩                                  leaves n of the parameters
        = Σ_it c_it · ṡ_it                                  tokens of E: c = ∂F/∂s, ṡ along Δθ
        = Σ_jt (∂loss/∂s_jt) · ṡ_jt + ⟨∇F, offset⟩           tokens of U: ṡ along ∇F carried back through the step

Three sums of one number. Forward over E is held against reverse over E, and the ∇F of that against forward over U, so
that each pass checks another: `completeness` holds how far the sums are apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Unpack

import torch

from funcprobe import engine
from funcprobe.analysis.probe import result_of
from funcprobe.arguments import checked
from funcprobe.attribution.conditioning import cautions, concentrations
from funcprobe.attribution.decoding import vocabulary_of
from funcprobe.attribution.influence import check_influence, influence_of
from funcprobe.attribution.parameter_parts import leaf_parts
from funcprobe.attribution.part_bars import check_bars_of, part_bars
from funcprobe.attribution.predictors import STATS, check_stats, predictions
from funcprobe.attribution.step_parts import StepParts
from funcprobe.attribution.token_parts import TokenParts, token_parts
from funcprobe.errors import ForwardModeError, InputError
from funcprobe.measurement.cautions import step
from funcprobe.measurement.first_order import first_order
from funcprobe.measurement.measure import measure
from funcprobe.measurement.measurement import Measurement, Observables, named
from funcprobe.measurement.options import Given, Options, options_of
from funcprobe.measurement.update import Update
from funcprobe.results.attribution import Attribution
from funcprobe.results.probe import ProbeResult
from funcprobe.training.response import Form, Response, form_of
from funcprobe.types import Observable, Progress, Rollouts


@checked
def attribute(
    update: Update,
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    form: Form = "auto",
    influence: Literal["sequences", "prompts"] | None = None,
    leaves: Collection[str] | Callable[[str], bool] | None = None,
    bars_of: Collection[str] = (),
    chunk: int = 8,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> Attribution:
    """Return which parameters, prompts and tokens of an update moved an observable, and how far.

    Estimand: the parts of `δF₁ = ⟨∇F, Δθ⟩`, with the sampling error of E that δF₁ itself has (the result's error bar).
    Beside the passes of a probe it takes a backward pass over E (∇F) and a forward-mode pass over U.

    `form="additive"` writes `Δθ = offset + scale ⊙ g`, with denominators and clip factor at their actual values, so
    that tokens of U, momentum and weight decay sum to δF₁. `form="jacobian"` asks what would be if a token weighed a
    little less: `(∂Δθ/∂g)ᵀ ∇F`, through denominators and clipping; where the step is not linear in the gradient that
    does not sum, and the ledger has a row "rest". "auto" is additive where the optimizer has that form, else jacobian.

    Args:
        update: θ and how it is about to change: an update that was made from a batch.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observables: One, or several by name, of which the first is attributed and all are measured; by default the
            entropy per token.
        form: How the gradient is weighed: "auto", "additive" or "jacobian".
        influence: Whether to make the matrix of what every update sequence does to every evaluation sequence, or
            prompt: a backward pass and a forward-mode pass over U for each.
        leaves: The leaves whose influence is looked at, as names or as a predicate; None takes all of them.
        bars_of: The tables whose rows get error bars over E's prompts, of ledger, parameters, layers, kinds, modules,
            pairs, and prompts and sequences of U: two forward passes over E a row (three of the ledger), and for a row
            of U its gradient.
        chunk: How many rows of the influence matrix, or of bars, share a pass; memory of tangents grows with it.
        tokenizer: Decodes token ids for tables and pages; without one they show ids.
        progress: Called as progress(what, done, total).
        **options: See `Options`; mode is forward, and keep_scores can do nothing here.

    Raises:
        InputError: If an option, a batch or the optimizer is not usable, or the update knows no batch.
        NumericsError: If scores, gradients or contributions are not finite; the message names the sequences.
        ForwardModeError: If the model has no forward derivative.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below `ess_threshold` of the sample.
    """
    update.need("batch", "An attribution")
    assert update.step is not None
    assert update.batch is not None
    vocabulary = vocabulary_of(tokenizer, (evaluation, update.batch))
    measurement = Measurement.of(update, evaluation, observables, _forward(options), progress)
    chosen = form_of(update.step.optimizer, form)
    check_stats(update.step.objective)
    check_influence(influence, chunk, leaves, update.params)
    check_bars_of(bars_of, chosen, measurement.options.bars)
    move, info = step(measurement, update)
    with _no_other_mode():
        first = first_order(measurement, update.params, move.delta)
    outcome, evidence = measure(measurement, move, first, info)
    assert first.along is not None  # forward mode was asked for
    name, main = measurement.main
    c = engine.cotangents(evidence.of(main), first.along.scores)
    gradient_of_f = measurement.passes.pull_back(c, update.params, "E, gradient of F")
    parts = StepParts.of(update, move, measurement.passes.cut_of(update.step.microbatch), chosen)
    response = parts.carried(gradient_of_f)
    of_batch = _on_batch(measurement, parts, response, info["lr"])
    if form == "auto" and chosen == "jacobian":
        measurement.messages.note("jacobian", NO_ADDITIVE_FORM)
    found = concentrations(parts, response.direction, of_batch.total.sum(1))
    warned = tuple(cautions(found, chosen))
    measurement.messages.warn(*warned)
    matrix = None
    if influence is not None:
        matrix = influence_of(measurement.passes, c, parts, by=influence, leaves=leaves, chunk=chunk)
    bars = part_bars(measurement, evidence, parts, bars_of, chunk)
    outcome = dataclasses.replace(
        outcome, notes=tuple(measurement.messages.notes), warnings=(*outcome.warnings, *warned)
    )
    return Attribution(
        probe=result_of(measurement, update, move, first, outcome, evidence),
        observable=name,
        form=chosen,
        leaves=leaf_parts(gradient_of_f, move.delta, parts.gradient, response.direction, response.offsets),
        evaluation=token_parts(c, first.along, measurement.passes.evaluation, "evaluation"),
        batch=of_batch,
        influence=matrix,
        vocabulary=vocabulary,
        bars=bars,
        concentrations=found,
    )


NO_ADDITIVE_FORM = "the optimizer has no additive form; tokens of U are attributed by its Jacobian"


@checked
def attribute_evaluation(result: ProbeResult, observable: Observable | None = None) -> TokenParts:
    """Return the contribution of every token of E to δF₁ of an observable, from the scores that a probe kept.

    No model is run. `observable` is by default the entropy per token; any that the probe's scores have the statistics
    for will do.

    Raises:
        InputError: If the result kept no scores, or no tangents.
        NumericsError: If a contribution is not finite; the message names the sequence.
    """
    main = next(iter(named(observable).values()))
    evidence = result.evidence
    if evidence is None:
        raise InputError(
            "This result kept no scores, and contributions of tokens are made of them; call probe(..., "
            "keep_scores=True), or attribute(...), which needs no such option."
        )
    if evidence.along is None:
        raise InputError(
            "This result was made in reverse mode, which keeps no tangents of tokens; use mode='forward' or 'auto'."
        )
    if missing := [name for name in main.stats if name not in evidence.anchor.extra]:
        raise InputError(
            f"The scores that this probe kept have no statistic '{missing[0]}', which '{main.name}' needs; probe with "
            "it among the observables."
        )
    c = engine.cotangents(evidence.of(main), evidence.along.scores)
    return token_parts(c, evidence.along, evidence.rollouts, "evaluation")


def _forward(options: Mapping[str, Any]) -> Options:
    if options.get("mode", "auto") not in ("auto", "forward"):
        raise InputError(
            f"mode is {options['mode']!r}, and attribution is made of forward-mode passes; leave it out, or take "
            "probe(..., mode='reverse')."
        )
    return options_of({**options, "mode": "forward"}, "an attribution", ("keep_scores",))


@contextmanager
def _no_other_mode() -> Iterator[None]:
    """Say where to turn when a model has no forward derivative: another mode of attribution does not exist.

    Raises:
        ForwardModeError: In place of one that names another mode.
    """
    try:
        yield
    except ForwardModeError as error:
        raise error.but("what tokens did needs one; probe(..., mode='reverse') gives δF₁ alone") from error


def _on_batch(measurement: Measurement, parts: StepParts, response: Response, lr: float) -> TokenParts:
    """Return the parts of U's tokens: one forward-mode pass, with the predictors' statistics in it."""
    passes, what = measurement.passes, "U, forward mode"
    with passes.clock(what):
        along = engine.directional(
            parts.step.policy,
            parts.params,
            response.direction,
            parts.prepared,
            as_training=True,
            stats={**STATS, **parts.step.objective.stats},
            microbatch=parts.microbatch,
            progress=passes.progress,
            what=what,
        )
    still = {name: torch.zeros_like(along.scores.logp) for name in STATS}  # the loss does not read them
    c = parts.on_batch._replace(extra={**still, **parts.on_batch.extra})
    predictors = {}
    if parts.prepared.advantages is not None:
        predictors = predictions(along.scores, parts.prepared, lr).tokens
    return token_parts(c, along, parts.prepared, "update", predictors)
