"""One step, measured and predicted: ΔF on held-out rollouts, δF₁ from the very same step, and how far to trust both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from funcprobe import tree
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import DEFAULT_MICROBATCH, Passes
from funcprobe.errors import InputError
from funcprobe.estimators.custom import check_observable
from funcprobe.estimators.observables import entropy
from funcprobe.measurement.cautions import about_the_copy, before_measuring, is_independent, left_alone, unequal_groups
from funcprobe.measurement.first_order import First, first_order
from funcprobe.measurement.measure import Measurement, family_of, measure_step
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Move
from funcprobe.measurement.options import PATH_TOLERANCE, Inquiry, MeasureMethod, Mode, Options, named
from funcprobe.measurement.readings import BarMethod
from funcprobe.optimizers.stored import is_stored, storage_name
from funcprobe.policy.module import Policy
from funcprobe.results.environment import describe_environment
from funcprobe.results.probe import BatchCounts, ProbeResult
from funcprobe.training.step import LossGradient, Step
from funcprobe.types import Microbatch, Observable, OptState, Params, Progress, Rollouts, TokenScores

#: Rao–Blackwell, per decision, per token.
DEFAULT_OBSERVABLE: Observable = entropy()


def probe(
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
    mode: Mode = "auto",
    method: MeasureMethod = "auto",
    tolerance: float = PATH_TOLERANCE,
    order: Literal[1, 2] = 1,
    bars: BarMethod | None = "auto",
    level: float = 0.95,
    seed: int = 0,
    microbatch: Microbatch = DEFAULT_MICROBATCH,
    rounding: bool | Literal["auto"] = "auto",
    ess_threshold: float = 0.1,
    on_low_ess: Literal["warn", "raise"] = "warn",
    top_k: int = 10,
    keep_delta: bool = False,
    keep_scores: bool = False,
    progress: Progress | None = None,
) -> ProbeResult:
    """Take one pure step on `update` and return how far observables move on `evaluation`, measured and predicted.

    Measured: `ΔF = F(θ′) − F(θ)`, importance-sampled on rollouts drawn at θ = `params`. Predicted: `δF₁ = ⟨∇F, Δθ⟩`
    with Δθ the step as a value. Both come from the same rollouts, so on one batch they agree to O(‖Δθ‖²); their common
    sampling error is that of the estimator (see `entropy`). Nothing that is passed in changes.

    Args:
        policy: What scores the rollouts; see `from_module` and `load_checkpoint`.
        step: The pure step; see `make_step`.
        params: θ, at which the evaluation rollouts were drawn.
        opt_state: The optimizer's state before the step.
        evaluation: Rollouts E, drawn at θ, apart from U.
        update: Rollouts U, which the step is taken on.
        observable: What is measured; by default the entropy per token.
        observables: Several by name, in place of `observable`, all read from the same passes. Exchange rates are ΔF of
            the first per ΔF of each other one.
        lr: Learning rate of this step; None takes the optimizer's.
        mode: How the first order is taken. "auto" takes forward mode, and reverse mode where an operation of the model
            has no forward derivative.
        method: How ΔF is measured: by "difference" of two evaluations, along a "path" from θ to θ + Δθ on which
            nothing cancels, or, with "auto", by the path where the float error of the difference is above 0.1 % of it.
            A difference sees θ′ as stored, a path the update itself: they differ by the rounding row. Where that is
            above 1 % of the update (a bfloat16 run), both are measured, as the reading's `exact` and `stored`, each by
            this method; with a `stored` optimizer and "auto" the change itself is then that of θ + Δθ. A path is an
            integral of derivatives and misses jumps: where tokens change experts, or the difference disagrees with it
            beyond float error, "auto" takes the difference and says so, and "path" is refused.
        tolerance: What two rules of the path have to agree to, relative to Σ|terms|.
        order: 2 adds `δF₂ = ½ D²F[Δθ, Δθ]` and the crossover learning rate.
        bars: Error bars over prompts: "jackknife", "infinitesimal", "bootstrap", None, or "auto": the exact jackknife
            where it is cheap, and no bars where there is one prompt only.
        level: Coverage of the bars' intervals.
        seed: Of the bootstrap.
        microbatch: How E is cut for the model; it changes memory and no result.
        rounding: Whether the row `⟨∇F, (θ′ − θ) − Δθ⟩` is computed. It is free in reverse mode; in forward mode it
            takes one more pass, which "auto" spends only where rounding is above 0.1 % of the update.
        ess_threshold: The least effective sample, as a fraction of E.
        on_low_ess: Whether to "warn" or to "raise" below it.
        top_k: How many of the most moved leaves are listed.
        keep_delta: Whether the result carries Δθ.
        keep_scores: Whether the result carries the scores that it was read from, for `plot_weights` and the like; they
            are not saved.
        progress: Called as progress(what, done, total).

    Raises:
        InputError: If an option, an observable, a batch or the learning rate is out of range.
        NumericsError: If scores or gradients are not finite, or a path that was asked for misses its tolerance or a
            jump.
        ForwardModeError: In `mode="forward"`, `method="path"` or `order=2`, if the model has no forward derivative.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below `ess_threshold` of the sample.
    """
    options = Options(mode, method, tolerance, order, bars, level, seed, rounding, ess_threshold, on_low_ess)
    wanted = asked_for(observable, observables, evaluation)
    asked = inquire(policy, evaluation, update, wanted, options, microbatch, progress)
    taken = take_step(asked, step, params, opt_state, update, lr)
    taken = taken._replace(loss=None)  # let go before E needs the memory
    first = first_order(asked, params, taken.move.update)
    found = measure_step(asked, taken.move, first)
    return result_of(asked, taken, first, found, update, top_k, keep_delta, keep_scores)


class Taken(NamedTuple):
    """One step that was taken, and what it was made of."""

    move: Move
    info: dict[str, float]  #: loss, grad_norm, clip_coefficient, lr and what the objective reported
    loss: LossGradient | None  #: the gradient of the loss before clipping, with U's scores; None once it was let go
    storage: str  #: the dtype that θ′ is stored in, as a word


def inquire(
    policy: Policy,
    evaluation: Rollouts,
    update: Rollouts,
    observables: Mapping[str, Observable],
    options: Options,
    microbatch: Microbatch,
    progress: Progress | None,
) -> Inquiry:
    """Return what is asked of steps made from `update`; refused early where no pass could give it.

    Raises:
        InputError: If it is refused.
    """
    passes = Passes.over(policy, evaluation, observables, microbatch, progress, Clock())
    asked = Inquiry(passes, observables, options, Messages(), is_independent(evaluation, update))
    asked.check()
    return asked


def take_step(
    asked: Inquiry, step: Step, params: Params, opt_state: OptState, update: Rollouts, lr: float | None
) -> Taken:
    """Take one pure step, and say what should be known of it.

    Raises:
        InputError: If rollouts, state or learning rate do not fit.
        NumericsError: If scores, gradient or step are not finite.
    """
    passes, said = asked.passes, asked.said
    with said.recording(), passes.clock("gradient on U"):
        loss = step.loss_gradient(params, update, progress=passes.progress)
    with passes.clock("optimizer step"):
        after = step.apply(params, opt_state, loss.gradient, lr=lr, info=loss.info)
        move = Move.of(params, after.params, after.update, narrow=is_stored(step.optimizer))
        taken = Taken(move, dict(after.info), loss, storage_name(step.optimizer, params))
    said.notes += left_alone(loss.gradient)
    said.also(before_measuring(passes.evaluation, update, taken.move.size, taken.info))
    if lr is not None:
        said.also(unequal_groups(step.optimizer))
    return taken


def result_of(
    asked: Inquiry,
    taken: Taken,
    first: First,
    found: Measurement,
    update: Rollouts,
    top_k: int,
    keep_delta: bool,
    keep_scores: bool,
) -> ProbeResult:
    """Return what was found as a result."""
    move, passes, said = taken.move, asked.passes, asked.said
    return ProbeResult(
        readings=found.readings,
        exchange=found.exchange,
        mode=first.mode,
        rounding=found.rounding,
        rounding_ratio=move.size.rounding_ratio,
        delta_norm=move.size.norm,
        lr=taken.info["lr"],
        unmoved=move.size.unmoved,
        top=tuple(tree.top_k(move.update, top_k)),
        family=family_of(asked, move, first, found.evidence),
        health=found.health,
        routing=found.routing,
        checks=tuple(about_the_copy(passes.policy, update)),
        step=taken.info,
        evaluation=BatchCounts.of(passes.evaluation),
        update_batch=BatchCounts.of(update),
        warnings=tuple(said.warnings),
        notes=tuple(said.notes),
        timings=passes.clock.seconds,
        environment=describe_environment(passes.policy.device, move.params, taken.storage),
        update=_portable(move.update) if keep_delta else None,
        evidence=found.evidence if keep_scores else None,
    )


def asked_for(
    observable: Observable | None, observables: Mapping[str, Observable] | None, evaluation: Rollouts
) -> dict[str, Observable]:
    """Return the observables by name, each checked on made-up scores of the evaluation rollouts: no model is run.

    Raises:
        InputError: If both forms are given, or an observable cannot be used on these rollouts.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode is on, in which nothing can be differentiated; leave it, or use no_grad."
        )
    if observable is not None and observables is not None:
        raise InputError("observable and observables were both given; put all of them into observables.")
    found = named(observables if observables is not None else DEFAULT_OBSERVABLE if observable is None else observable)
    mask = evaluation.completion_mask.double()
    for o in found.values():
        check_observable(o, TokenScores(-0.7 * mask, 0.5 * mask, dict.fromkeys(o.stats, 0.3 * mask)), evaluation)
    return found


def _portable(update: Params) -> Params:
    return {name: u.detach().to("cpu", torch.float32) for name, u in update.items()}
