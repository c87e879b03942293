"""Which parameters, prompts and tokens moved a functional of the policy: the parts of one step's δF₁, all of them.

    δF₁ = Σ_n ⟨∇F_n, Δθ_n⟩                                  leaves n of the parameters
        = Σ_it c_it · ṡ_it                                  tokens of E: c = ∂F/∂s, ṡ along Δθ
        = Σ_jt (∂loss/∂s_jt) · ṡ_jt + ⟨∇F, offset⟩           tokens of U: ṡ along ∇F carried back through the step

Three sums of one number. Forward over E is held against reverse over E, and the ∇F of that against forward over U, so
that each pass checks another: `completeness` holds how far the sums are apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from funcprobe import engine
from funcprobe.analysis.probe import DEFAULT_OBSERVABLE, Taken, asked_for, inquire, result_of, take_step
from funcprobe.attribution.decoding import vocabulary_of
from funcprobe.attribution.influence import check_influence, influence_of
from funcprobe.attribution.parameter_parts import leaf_parts
from funcprobe.attribution.part_bars import check_bars_of, part_bars
from funcprobe.attribution.predictors import STATS, check_stats, predictions
from funcprobe.attribution.step_parts import Grounds
from funcprobe.attribution.token_parts import TokenParts, token_parts
from funcprobe.data.rollouts import to_device
from funcprobe.engine.passes import DEFAULT_MICROBATCH
from funcprobe.errors import ForwardModeError, FuncprobeWarning, InputError
from funcprobe.measurement.first_order import first_order
from funcprobe.measurement.measure import measure_step
from funcprobe.measurement.options import Inquiry, Options, named, options_of
from funcprobe.policy.module import Policy
from funcprobe.results.attribution import Attribution
from funcprobe.results.probe import ProbeResult
from funcprobe.training.response import Form, Response, form_of
from funcprobe.training.step import Step
from funcprobe.types import Microbatch, Observable, OptState, Params, Progress, Rollouts


def attribute(
    policy: Policy,
    step: Step,
    params: Params,
    opt_state: OptState,
    evaluation: Rollouts,
    update: Rollouts,
    observable: Observable | None = None,
    *,
    observables: Mapping[str, Observable] | None = None,
    lr: float | None = None,
    form: Form = "auto",
    influence: Literal["sequences", "prompts"] | None = None,
    leaves: Collection[str] | Callable[[str], bool] | None = None,
    bars_of: Collection[str] = (),
    chunk: int = 8,
    tokenizer: Any = None,
    microbatch: Microbatch = DEFAULT_MICROBATCH,
    top_k: int = 10,
    keep_delta: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Attribution:
    """Take one pure step on `update` and return which parameters, prompts and tokens moved an observable, and how far.

    Estimand: the parts of `δF₁ = ⟨∇F, Δθ⟩`, with the sampling error of E that δF₁ itself has (the result's error bar).
    Beside the passes of a probe it takes a backward pass over E (∇F) and a forward-mode pass over U.

    `form="additive"` writes `Δθ = offset + scale ⊙ g`, with denominators and clip factor at their actual values, so
    that tokens of U, momentum and weight decay sum to δF₁. `form="jacobian"` asks what would be if a token weighed a
    little less: `(∂Δθ/∂g)ᵀ ∇F`, through denominators and clipping; where the step is not linear in the gradient that
    does not sum, and the ledger has a row "rest". "auto" is additive where the optimizer has that form, else jacobian.

    Args:
        policy: What scores the rollouts; see `from_module` and `load_checkpoint`.
        step: The pure step; see `make_step`.
        params: θ, at which the evaluation rollouts were drawn.
        opt_state: The optimizer's state before the step.
        evaluation: Rollouts E, drawn at θ, apart from U.
        update: Rollouts U, which the step is taken on.
        observable: What is attributed; by default the entropy per token.
        observables: Several by name, in place of `observable`; the first is attributed, all of them are measured.
        lr: Learning rate of this step; None takes the optimizer's.
        form: How the gradient is weighed: "auto", "additive" or "jacobian".
        influence: Whether to make the matrix of what every update sequence does to every evaluation sequence, or
            prompt: a backward pass and a forward-mode pass over U for each.
        leaves: The leaves whose influence is looked at, as names or as a predicate; None takes all of them.
        bars_of: The tables whose rows get error bars over E's prompts, of ledger, parameters, layers, kinds, modules,
            pairs, and prompts and sequences of U: two forward passes over E a row (three of the ledger), and for a row
            of U its gradient.
        chunk: How many rows of the influence matrix, or of bars, share a pass; memory of tangents grows with it.
        tokenizer: What decodes token ids for tables and pages; without one they show ids.
        microbatch: How E is cut for the model, and U where the step does not say. It changes memory and no result.
        top_k: How many of the most moved leaves the result lists.
        keep_delta: Whether the result carries Δθ.
        progress: Called as progress(what, done, total).
        **options: The further options of `probe`: method, tolerance, order, bars, level, seed, rounding, ...

    Raises:
        InputError: If an option, a batch or the optimizer is not usable.
        NumericsError: If scores, gradients or contributions are not finite; the message names the sequences.
        ForwardModeError: If the model has no forward derivative.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below `ess_threshold` of the sample.
    """
    vocabulary = vocabulary_of(tokenizer, (evaluation, update))
    wanted = asked_for(observable, observables, evaluation)
    asked = inquire(policy, evaluation, update, wanted, _options(**options), microbatch, progress)
    chosen = form_of(step.optimizer, form)
    check_stats(step.objective)
    check_influence(influence, chunk, leaves, params)
    check_bars_of(bars_of, chosen, asked.options.bars)
    taken = take_step(asked, step, params, opt_state, update, lr)
    with _no_other_mode():
        first = first_order(asked, params, taken.move.update)
    found = measure_step(asked, taken.move, first)
    assert first.along is not None  # forward mode was asked for
    name, main = asked.main
    c = engine.cotangents(found.evidence.of(main), first.along.scores)
    gradient_of_f = asked.passes.pull_back(c, params, "E, gradient of F")
    grounds = _grounds(asked, step, params, opt_state, update, taken, lr, chosen)
    response = grounds.carried(gradient_of_f)
    of_batch = _on_update(asked, grounds, response, taken)
    if form == "auto" and chosen == "jacobian":
        asked.said.notes.append("the optimizer has no additive form; tokens of U are attributed by its Jacobian")
    matrix = None
    if influence is not None:
        matrix = influence_of(asked.passes, c, grounds, by=influence, leaves=leaves, chunk=chunk)
    bars = part_bars(asked, found.evidence, grounds, bars_of, chunk)
    return Attribution(
        result=result_of(asked, taken, first, found, update, top_k, keep_delta, keep_scores=False),
        observable=name,
        form=chosen,
        leaves=leaf_parts(gradient_of_f, taken.move.update, grounds.gradient, response.direction, response.offsets),
        evaluation=token_parts(c, first.along, asked.passes.evaluation, "evaluation"),
        update=of_batch,
        influence=matrix,
        vocabulary=vocabulary,
        bars=bars,
    )


def attribute_evaluation(result: ProbeResult, observable: Observable | None = None) -> TokenParts:
    """Return the contribution of every token of E to δF₁ of an observable, from the scores that a probe kept.

    No model is run. `observable` is by default the entropy per token; any that the probe's scores have the statistics
    for will do.

    Raises:
        InputError: If the result kept no scores, or no tangents.
        NumericsError: If a contribution is not finite; the message names the sequence.
    """
    main = next(iter(named(DEFAULT_OBSERVABLE if observable is None else observable).values()))
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


def _options(mode: str = "forward", **options: Any) -> Options:
    if mode not in ("auto", "forward"):
        raise InputError(
            f"mode is {mode!r}, and attribution is made of forward-mode passes; leave it out, or take probe(..., "
            "mode='reverse')."
        )
    return options_of(mode="forward", **options)


@contextmanager
def _no_other_mode() -> Iterator[None]:
    """Say where to turn when a model has no forward derivative: another mode of attribution does not exist.

    Raises:
        ForwardModeError: In place of one that names another mode.
    """
    instead = "what tokens did needs one; probe(..., mode='reverse') gives δF₁ alone"
    try:
        yield
    except ForwardModeError as error:
        raise ForwardModeError(str(error).replace('use mode="reverse"', instead)) from error


def _grounds(
    asked: Inquiry,
    step: Step,
    params: Params,
    opt_state: OptState,
    update: Rollouts,
    taken: Taken,
    lr: float | None,
    form: Literal["additive", "jacobian"],
) -> Grounds:
    """Return what the step was made of.

    The cotangents of the loss are those of the gradient, taken at its very scores: those of forward mode differ by
    rounding, and where the loss picks tokens by rank, or clips them, they would now and then pick others.
    """
    assert taken.loss is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuncprobeWarning)  # what it warns of was said when the gradient was taken
        prepared = to_device(step.objective.prepare(update), step.policy.device)
    on_update = engine.cotangents(lambda s: step.objective(s, prepared)[0], taken.loss.scores)
    cut = asked.passes.cut_of(step.microbatch)
    made = step, params, opt_state, taken.loss.gradient, taken.move.update
    return Grounds(*made, lr, prepared, on_update, cut, form)


def _on_update(asked: Inquiry, grounds: Grounds, response: Response, taken: Taken) -> TokenParts:
    """Return what the tokens of U did: one forward-mode pass, with the predictors' statistics in it."""
    passes, what = asked.passes, "U, forward mode"
    with passes.clock(what):
        along = engine.directional(
            grounds.step.policy,
            grounds.params,
            response.direction,
            grounds.prepared,
            as_training=True,
            stats={**STATS, **grounds.step.objective.stats},
            microbatch=grounds.microbatch,
            progress=passes.progress,
            what=what,
        )
    still = {name: torch.zeros_like(along.scores.logp) for name in STATS}  # the loss does not read them
    c = grounds.on_update._replace(extra={**still, **grounds.on_update.extra})
    predictors = {}
    if grounds.prepared.advantages is not None:
        predictors = predictions(along.scores, grounds.prepared, taken.info["lr"]).tokens
    return token_parts(c, along, grounds.prepared, "update", predictors)
