"""One optimizer step as a value: (params, opt_state, U) -> StepResult. Nothing to snapshot, nothing to restore."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from funcprobe import engine, tree
from funcprobe.errors import FuncprobeWarning, NumericsError
from funcprobe.estimators.importance import sampler_mismatch
from funcprobe.optimizers.factories import clip_by_global_norm
from funcprobe.optimizers.groups import check_lr
from funcprobe.optimizers.unreached import check_reached, reached
from funcprobe.policy.module import Policy
from funcprobe.policy.training_only import training_cautions
from funcprobe.types import (
    Gradients,
    Microbatch,
    Objective,
    Optimizer,
    OptState,
    Params,
    Progress,
    Rollouts,
    StepResult,
    TokenScores,
)


def make_step(
    policy: Policy,
    objective: Objective,
    optimizer: Optimizer,
    max_grad_norm: float | None = None,
    microbatch: Microbatch = None,
) -> Step:
    """Return the step `θ′ = optimizer(θ, clip(∇ loss(U)))`, exactly one, as a pure function.

    Args:
        policy: What scores the rollouts.
        objective: The loss, as a function of scores.
        optimizer: The pure optimizer.
        max_grad_norm: The global norm to which the gradient is clipped; None leaves it as it is. Training frameworks
            do not store it in a checkpoint (TRL and transformers default to 1.0).
        microbatch: How the batch is cut for the model; it changes memory and no result.

    Raises:
        InputError: If max_grad_norm is not above 0.
    """
    if max_grad_norm is not None:
        clip_by_global_norm({}, max_grad_norm)  # refuses a bound that is out of range before any model runs
    return Step(policy, objective, optimizer, max_grad_norm, microbatch)


class LossGradient(NamedTuple):
    """The gradient of the loss, and what it was taken at."""

    gradient: Gradients  #: unclipped; None at leaves that no score of U depends on
    info: dict[str, float]  #: loss and what the objective reported
    scores: TokenScores  #: [B, T] of U, with the objective's statistics


@dataclass(frozen=True)
class Step:
    """A step in two halves, `gradient` and `apply`; calling it does both, so a sweep can share the gradient."""

    policy: Policy
    objective: Objective
    optimizer: Optimizer
    max_grad_norm: float | None = None
    microbatch: Microbatch = None

    def __call__(self, params: Params, opt_state: OptState, rollouts: Rollouts, lr: float | None = None) -> StepResult:
        """Return parameters, update, state, raw gradient and info after one step on the rollouts.

        Raises:
            InputError: If rollouts, state or learning rate do not fit.
            NumericsError: If a score, the gradient, the step or a stepped parameter is not finite.
        """
        gradient, info = self.gradient(params, rollouts)
        return self._apply(params, opt_state, gradient, lr, info)

    def gradient(
        self, params: Params, rollouts: Rollouts, progress: Progress | None = None
    ) -> tuple[Gradients, dict[str, float]]:
        """Return the gradient of the loss in the parameters, unclipped, and what the objective reported with `loss`.

        It is None at a leaf that no score of the rollouts depends on, where a training loop leaves `.grad` None.

        Where the rollouts carry `sampling_logps`, info says how far they are from the recomputed ones: `sampler_gap`,
        the mean of `|logp − sampling_logps|` in nats per completion token, and `sampler_ratio`, that of
        `exp(logp − sampling_logps)`.

        Raises:
            InputError: If the objective cannot use the rollouts, or no score depends on any leaf.
            NumericsError: If a score or the gradient is not finite; the message names the sequence or the leaf.
        """
        found = self.loss_gradient(params, rollouts, progress)
        return found.gradient, found.info

    def loss_gradient(self, params: Params, rollouts: Rollouts, progress: Progress | None = None) -> LossGradient:
        """Return what `gradient` returns, and the scores `[B, T]` of U at which it was taken.

        Warns with FuncprobeWarning of what training adds to the model and this step does not have: dropout, noise, a
        router's loss, each with its probability or coefficient.

        Raises:
            InputError: As `gradient`.
            NumericsError: As `gradient`.
        """
        found = engine.gradient(
            self.objective,
            self.policy,
            {name: leaf.detach() for name, leaf in params.items()},
            self.objective.prepare(rollouts),
            separable=self.objective.separable,
            stats=self.objective.stats,
            microbatch=self.microbatch,
            progress=progress,
            what="gradient",
        )
        self._caution(rollouts)
        gradient = {name: None if name in found.unreached else g for name, g in found.gradient.items()}
        check_reached(gradient)
        _check_finite(found.gradient, "gradient of the loss")
        info = {"loss": float(found.value), **{name: float(x) for name, x in found.info.items()}}
        mismatch = sampler_mismatch(found.scores, rollouts)
        sampler = {} if mismatch is None else {"sampler_gap": mismatch.gap, "sampler_ratio": mismatch.ratio}
        return LossGradient(gradient, {**info, **sampler}, found.scores)

    def _caution(self, rollouts: Rollouts) -> None:
        terms = () if self.policy.checks is None else self.policy.checks.training
        for text in training_cautions(tuple(term for term in terms if term.kind != "left padding"), rollouts):
            warnings.warn(text, FuncprobeWarning, stacklevel=4)

    def apply(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        info: Mapping[str, float] | None = None,
    ) -> StepResult:
        """Return the step along a gradient: clip, then the optimizer; `lr` overrides every group's for this call.

        A leaf whose gradient is None is left alone, as torch.optim does: same parameters, same state, update 0.

        The result's gradient is the raw one as it was given, detached and sharing storage; nothing else in the result
        shares storage with an argument, and no argument is changed. Its info is `info` with `grad_norm`,
        `clip_coefficient`, `lr` (the first group's, where groups differ) and, where there are leaves whose gradient is
        None, their number: `leaves_without_gradient`.

        Raises:
            InputError: If names, shapes or the learning rate do not fit, or no leaf has a gradient.
            NumericsError: If the gradient, the step or a stepped parameter is not finite; the message names the leaf.
        """
        check_reached(gradient)
        _check_finite(reached(gradient), "gradient")
        detached = {name: None if g is None else g.detach() for name, g in gradient.items()}
        return self._apply(params, opt_state, detached, lr, info or {})

    def clipped(self, gradient: Gradients) -> tuple[Gradients, float, float]:
        """Return (the gradient as the optimizer gets it, the clip factor, the norm of the raw one)."""
        if self.max_grad_norm is None:
            return gradient, 1.0, float(tree.norm(reached(gradient)))
        coefficient, norm = clip_by_global_norm(gradient, self.max_grad_norm)
        if coefficient == 1.0:
            return gradient, coefficient, norm
        return {name: None if g is None else g * coefficient for name, g in gradient.items()}, coefficient, norm

    def _apply(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None, info: Mapping[str, float]
    ) -> StepResult:
        lr = None if lr is None else check_lr(lr)
        clipped, coefficient, norm = self.clipped(gradient)
        params_after, update, state_after = self.optimizer.apply(params, opt_state, clipped, lr)
        _check_finite(update, "update")
        _check_finite(params_after, "stepped parameter")  # a finite step may still leave the range of float16
        reported = {"grad_norm": norm, "clip_coefficient": coefficient, "lr": self.optimizer.lr if lr is None else lr}
        if alone := len(gradient) - len(reached(gradient)):
            reported["leaves_without_gradient"] = float(alone)
        return StepResult(params_after, update, state_after, gradient, {**info, **reported})


def _check_finite(leaves: Params, what: str) -> None:
    bad = [name for name, leaf in leaves.items() if not bool(torch.isfinite(leaf).all())]
    if bad:
        raise NumericsError(
            f"The {what} is not finite at '{bad[0]}' ({str(leaves[bad[0]].dtype).removeprefix('torch.')})"
            + (f" and {len(bad) - 1} more leaves" if len(bad) > 1 else "")
            + "; check the log-probabilities and the optimizer state, or load the model in a wider dtype."
        )
