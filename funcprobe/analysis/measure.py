"""One step, measured and predicted: ΔF on held-out rollouts, δF₁ from the very same step, and how far to trust both."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.analysis.diagnostics import Clock, Messages, after_measuring, before_measuring, check_ess
from funcprobe.analysis.environment import describe_environment
from funcprobe.analysis.movement import Movement, movement
from funcprobe.analysis.movement import rounding as rounding_of
from funcprobe.analysis.result import BatchCounts, ProbeResult
from funcprobe.data.rollouts import to_device
from funcprobe.errors import ForwardModeError, InputError
from funcprobe.estimators.importance import Proposal, log_ratios, weight_health
from funcprobe.estimators.observables import entropy, entropy_family
from funcprobe.policy.module import Policy
from funcprobe.training.step import Step
from funcprobe.types import (
    Estimate,
    Microbatch,
    Observable,
    OptState,
    Params,
    Progress,
    Rollouts,
    TokenBudget,
    TokenScores,
)

Mode = Literal["auto", "forward", "reverse"]

#: A microbatch that suits a laptop and a data-centre card alike.
DEFAULT_MICROBATCH = TokenBudget(4096)

#: Rao–Blackwell, per decision, per token.
DEFAULT_OBSERVABLE: Observable = entropy()

#: Above this ratio of rounding to update, the rounding row is worth a pass of its own.
ROUNDING_WORTH_A_PASS = 1e-3


def probe(
    policy: Policy,
    step: Step,
    params: Params,
    opt_state: OptState,
    evaluation: Rollouts,
    update: Rollouts,
    observable: Observable = DEFAULT_OBSERVABLE,
    *,
    lr: float | None = None,
    mode: Mode = "auto",
    microbatch: Microbatch = DEFAULT_MICROBATCH,
    rounding: bool | Literal["auto"] = "auto",
    ess_threshold: float = 0.1,
    on_low_ess: Literal["warn", "raise"] = "warn",
    top_k: int = 10,
    keep_update: bool = False,
    progress: Progress | None = None,
) -> ProbeResult:
    """Take one pure step on `update` and return how far `observable` moves on `evaluation`, measured and predicted.

    Measured: `ΔF = F(θ′) − F(θ)`, importance-sampled on rollouts drawn at θ = `params`. Predicted: `δF₁ = ⟨∇F, Δθ⟩`
    with Δθ the step as a value. Both come from the same rollouts, so on one batch they agree to O(‖Δθ‖²); their common
    sampling error is that of the estimator (see `entropy`). Nothing that is passed in changes.

    `mode="auto"` takes the first order in forward mode, and in reverse mode where an operation of the model has no
    forward derivative. The rounding row, `⟨∇F, (θ′ − θ) − Δθ⟩`, is free in reverse mode; in forward mode it takes one
    more pass, which `rounding="auto"` spends only where rounding is above 0.1 % of the update.

    Raises:
        InputError: If an option, a batch or the learning rate is out of range.
        NumericsError: If scores or gradients are not finite.
        ForwardModeError: In `mode="forward"`, if the model has no forward derivative.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below `ess_threshold` of the sample.
    """
    _check_options(mode, on_low_ess, ess_threshold)
    said, clock = Messages(), Clock()
    after, delta, info = _take(step, params, opt_state, update, lr, clock, said, progress)
    moved = movement(params, after, delta)
    said.also(before_measuring(evaluation, update, moved, info))
    evaluation = to_device(evaluation, policy.device)

    passes = _Passes(policy, params, evaluation, observable, microbatch, progress, clock)
    first, mode_used = _first_order(passes, delta, mode, said)
    one_arithmetic = engine.math_attention() if mode_used == "forward" else nullcontext()
    with one_arithmetic, clock("E at θ′"):
        scores_after = passes.scores(after, "E at θ′")
    rounding_row = _rounding_row(passes, first, after, delta, moved, rounding, said)

    proposal: Proposal = getattr(observable, "proposal", "anchor")
    health = weight_health(log_ratios(scores_after, first.scores, evaluation, proposal), evaluation)
    said.also(after_measuring(first.scores, evaluation, health))
    check_ess(health, observable, ess_threshold, on_low_ess, said)
    main = _estimate(observable, first, scores_after, evaluation)
    assert main.first_order is not None
    return ProbeResult(
        observable=observable.name,
        unit=observable.unit,
        mode=mode_used,
        before=main.before,
        after=main.after,
        change=main.change,
        first_order=main.first_order,
        remainder=main.change - main.first_order,
        rounding=rounding_row,
        rounding_ratio=moved.rounding_ratio,
        update_norm=moved.norm,
        lr=info["lr"],
        unmoved=moved.unmoved,
        top=tuple(tree.top_k(delta, top_k)),
        family={o.name: _estimate(o, first, scores_after, evaluation) for o in entropy_family(proposal)},
        health=health,
        step=info,
        evaluation=BatchCounts.of(evaluation),
        update_batch=BatchCounts.of(update),
        warnings=tuple(said.warnings),
        notes=tuple(said.notes),
        timings=clock.seconds,
        environment=describe_environment(policy.device, params),
        update=_portable(delta) if keep_update else None,
    )


def _take(
    step: Step,
    params: Params,
    opt_state: OptState,
    update: Rollouts,
    lr: float | None,
    clock: Clock,
    said: Messages,
    progress: Progress | None,
) -> tuple[Params, Params, dict[str, float]]:
    """Return (θ′, Δθ, info) of one step; gradient and optimizer state are let go before E needs the memory."""
    with said.recording(), clock("gradient on U"):
        gradient, info = step.gradient(params, update, progress=progress)
    with clock("optimizer step"):
        taken = step.apply(params, opt_state, gradient, lr=lr, info=info)
    return taken.params, taken.update, dict(taken.info)


class _FirstOrder(NamedTuple):
    """The anchor's scores, and the first order in whichever form the mode gives it."""

    scores: TokenScores
    along: engine.Directional | None  #: forward mode: tangents, for every observable at once
    gradient: Params | None  #: reverse mode: ∇F of the observable asked for
    value: Tensor | None  #: reverse mode: ⟨∇F, Δθ⟩
    of: Observable  #: the observable that `value` belongs to


class _Passes(NamedTuple):
    """The model passes over E that a probe is made of."""

    policy: Policy
    params: Params
    evaluation: Rollouts
    observable: Observable
    microbatch: Microbatch
    progress: Progress | None
    clock: Clock

    def scores(self, params: Params, what: str) -> TokenScores:
        """Return the scores of E at the given parameters."""
        return engine.scores(self.policy, params, self.evaluation, **self._options(what))

    def directional(self, direction: Params, what: str) -> engine.Directional:
        """Return the scores of E at the anchor and their tangents along a direction."""
        return engine.directional(self.policy, self.params, direction, self.evaluation, **self._options(what))

    def forward(self, update: Params) -> _FirstOrder:
        """Return the first order along the update from one forward-mode pass."""
        with self.clock("E and its derivative at θ"):
            along = self.directional(update, "E, forward mode")
        return _FirstOrder(along.scores, along, None, None, self.observable)

    def reverse(self, update: Params) -> _FirstOrder:
        """Return the first order along the update from ∇F, by reverse mode."""

        def f(scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
            return self.observable(scores, engine.detached(scores), rollouts), {}

        with self.clock("E and its derivative at θ"):
            found = engine.gradient(f, self.policy, self.params, self.evaluation, **self._options("E, reverse mode"))
        value = tree.dot(found.gradient, update)
        return _FirstOrder(found.scores, None, found.gradient, value, self.observable)

    def _options(self, what: str) -> dict[str, Any]:
        stats, microbatch, progress = self.observable.stats, self.microbatch, self.progress
        return {"stats": stats, "microbatch": microbatch, "progress": progress, "what": what}


def _first_order(passes: _Passes, update: Params, mode: Mode, said: Messages) -> tuple[_FirstOrder, str]:
    if mode == "reverse":
        return passes.reverse(update), "reverse"
    try:
        return passes.forward(update), "forward"
    except ForwardModeError as error:
        if mode == "forward":
            raise
        said.notes.append(f"reverse mode was used: {error}")
        return passes.reverse(update), "reverse"


def _estimate(observable: Observable, first: _FirstOrder, after: TokenScores, evaluation: Rollouts) -> Estimate:
    anchor = first.scores
    before, changed = observable(anchor, anchor, evaluation), observable(after, anchor, evaluation)
    slope: float | None = None
    if first.along is not None:
        slope = float(engine.derivative(lambda s: observable(s, anchor, evaluation), first.along)[1])
    elif first.value is not None and observable == first.of:
        slope = float(first.value)
    return Estimate(float(before), float(changed), float(changed - before), slope)


def _rounding_row(
    passes: _Passes,
    first: _FirstOrder,
    after: Params,
    delta: Params,
    moved: Movement,
    wanted: bool | Literal["auto"],
    said: Messages,
) -> float | None:
    if first.gradient is not None:
        return float(tree.dot(first.gradient, rounding_of(passes.params, after, delta)))
    if wanted is False or (wanted == "auto" and moved.rounding_ratio <= ROUNDING_WORTH_A_PASS):
        said.notes.append(
            f"the rounding row was not computed: rounding is {moved.rounding_ratio:.1e} of the update's norm"
        )
        return None
    with passes.clock("rounding row"):
        along = passes.directional(rounding_of(passes.params, after, delta), "E, rounding row")
        anchor = first.scores
        return float(engine.derivative(lambda s: passes.observable(s, anchor, passes.evaluation), along)[1])


def _check_options(mode: str, on_low_ess: str, ess_threshold: float) -> None:
    if mode not in ("auto", "forward", "reverse"):
        raise InputError(f"Unknown mode '{mode}'; expected 'auto', 'forward' or 'reverse'.")
    if on_low_ess not in ("warn", "raise"):
        raise InputError(f"Unknown on_low_ess '{on_low_ess}'; expected 'warn' or 'raise'.")
    if not (math.isfinite(ess_threshold) and 0 <= ess_threshold <= 1):
        raise InputError(f"ess_threshold is {ess_threshold}; expected a fraction of the sample between 0 and 1.")


def _portable(update: Params) -> Params:
    return {name: u.detach().to("cpu", torch.float32) for name, u in update.items()}
