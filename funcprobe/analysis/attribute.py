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
from funcprobe.measurement.covector import Covector
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import FirstOrder, first_order
from funcprobe.measurement.measure import measure as measured
from funcprobe.measurement.measurement import Measurement, Observables, named
from funcprobe.measurement.move import Move
from funcprobe.measurement.options import OF_A_CHANGE, Given, Options, options_of
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.predicted import predicted
from funcprobe.measurement.update import Update
from funcprobe.results.attribution import Attribution
from funcprobe.results.probe import ProbeResult
from funcprobe.training.response import Form, Response, form_of
from funcprobe.types import Observable, Params, Progress, Rollouts, TokenScores


@checked
def attribute(
    update: Update,
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    measure: bool = True,
    covector: Covector | None = None,
    form: Form = "auto",
    influence: Literal["sequences", "prompts"] | None = None,
    leaves: Collection[str] | Callable[[str], bool] | None = None,
    bars_of: Collection[str] = (),
    chunk: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> Attribution:
    """Return which parameters, prompts and tokens of an update moved an observable, and how far.

    Estimand: the parts of `δF₁ = ⟨∇F, Δθ⟩`, with the sampling error of E that δF₁ itself has (the result's error bar).
    Beside the passes of a probe it takes a backward pass over E (∇F) and a forward-mode pass over U. With
    `measure=False` these two and the gradient on U are all: δF₁ is ⟨∇F, Δθ⟩, and tokens of E, ΔF and error bars are not
    known.

    `form="additive"` writes `Δθ = offset + scale ⊙ g`, with denominators and clip factor at their actual values, so
    that tokens of U, momentum and weight decay sum to δF₁. `form="jacobian"` asks what would be if a token weighed a
    little less: `(∂Δθ/∂g)ᵀ ∇F`, through denominators and clipping; where the step is not linear in the gradient that
    does not sum, and the ledger has a row "rest". "auto" is additive where the optimizer has that form, else jacobian.

    Args:
        update: θ and how it is about to change: an update that was made from a batch.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observables: One, or several by name, of which the first is attributed and all are measured; by default the
            entropy per token. Where nothing is measured, one.
        measure: Whether ΔF is measured too, with error bars, and δF₁ split by tokens of E.
        covector: ∇F, where it was taken already, for another U at this θ; see `covector`.
        form: How the gradient is weighed: "auto", "additive" or "jacobian".
        influence: Whether to make the matrix of what every update sequence does to every evaluation sequence, or
            prompt: the gradient of every row of either batch, taken one at a time.
        leaves: The leaves whose influence is looked at, as names or as a predicate; None takes all of them.
        bars_of: The tables whose rows get error bars over E's prompts, of ledger, parameters, layers, kinds, modules,
            pairs, and prompts and sequences of U: two forward passes over E a row (three of the ledger), and for a row
            of U its gradient.
        chunk: How many gradients of the influence matrix are held at once, in float32: the other batch is pulled back
            anew for each chunk. And how many rows of bars share a pass, whose tangents grow with it. None holds two
            gibibytes of gradients, and has 8 rows of bars share a pass.
        tokenizer: Decodes token ids for tables and pages; without one they show ids.
        progress: Called as progress(what, done, total).
        **options: See `Options`; mode is forward, and keep_scores can do nothing here. Where nothing is measured,
            microbatch, top_k and keep_delta have a meaning.

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
    wanted = _forward(options) if measure else _unmeasured(options, observables, bars_of)
    measurement = Measurement.of(update, evaluation, observables, wanted, progress)
    chosen = form_of(update.step.optimizer, form)
    check_stats(update.step.objective)
    check_influence(influence, chunk, leaves, update.params)
    check_bars_of(bars_of, chosen, measurement.options.bars)
    name, main = measurement.main
    if covector is not None:
        covector.check(update.params, evaluation, main)
    move, info = step(measurement, update)
    if measure:
        first, outcome, evidence = _measured(measurement, update, move, info)
    else:
        covector = covector or Covector.of(measurement, update.params, evaluation)
        first, (outcome, evidence) = covector.first, predicted(measurement, covector, move, info)
    c = engine.cotangents(evidence.of(main), first.scores)
    gradient_of_f = _gradient_of_f(measurement, c, update.params, covector)
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
    along, own = first.along, measurement.passes.evaluation
    return Attribution(
        probe=result_of(measurement, update, move, first, outcome, evidence),
        observable=name,
        form=chosen,
        leaves=leaf_parts(gradient_of_f, move.delta, parts.gradient, response.direction, response.offsets),
        evaluation=None if along is None else token_parts(c, along, own, "evaluation"),
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


def _unmeasured(options: Mapping[str, Any], observables: Observables, bars_of: Collection[str]) -> Options:
    """Return the options of an attribution that measures nothing: reverse mode, and no error bars.

    Raises:
        InputError: If something was asked for that only a measurement can give.
    """
    if len(names := list(named(observables))) > 1:
        raise InputError(
            f"With measure=False one observable is attributed and no other is looked at; found {', '.join(names)}."
        )
    if bars_of or options.get("bars", "auto") not in ("auto", None):
        raise InputError("Error bars are made of a measurement; leave them out, or leave out measure=False.")
    if options.get("mode", "auto") not in ("auto", "reverse"):
        raise InputError(
            f"mode is {options['mode']!r}, and with measure=False ∇F is taken in reverse mode; leave it out."
        )
    settled = {**options, "mode": "reverse", "bars": None}
    return options_of(settled, "an attribution with measure=False", (*OF_A_CHANGE, "keep_scores"))


def _measured(
    measurement: Measurement, update: Update, move: Move, info: Mapping[str, float]
) -> tuple[FirstOrder, Outcome, Evidence]:
    with _no_other_mode():
        first = first_order(measurement, update.params, move.delta)
    return first, *measured(measurement, move, first, info)


def _gradient_of_f(measurement: Measurement, c: TokenScores, params: Params, known: Covector | None) -> Params:
    """Return ∇F: the one that is known, or that of cotangents of E's scores."""
    return measurement.passes.pull_back(c, params, "E, gradient of F") if known is None else known.gradient


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
