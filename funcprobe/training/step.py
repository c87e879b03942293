"""One optimizer step as a value: (params, opt_state, U) -> StepResult. Nothing to snapshot, nothing to restore."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from funcprobe import engine
from funcprobe.arguments import checked
from funcprobe.errors import FuncprobeWarning, InputError, Note
from funcprobe.estimators.importance import sampler_mismatch
from funcprobe.optimizers.unreached import check_reached
from funcprobe.policy.module import Policy
from funcprobe.policy.training_only import training_cautions
from funcprobe.training.rule import Rule, check_finite
from funcprobe.types import (
    Gradients,
    Microbatch,
    Objective,
    Optimizer,
    OptState,
    Params,
    Progress,
    Rollouts,
    Statistic,
    StepResult,
    TokenScores,
)


@checked
def make_step(
    policy: Policy,
    objective: Objective,
    optimizer: Optimizer,
    max_grad_norm: float | None = None,
    microbatch: Microbatch = None,
    offload: Literal["cpu"] | None = None,
) -> Step:
    """Return the step `θ′ = optimizer(θ, clip(∇ loss(U)))`, exactly one, as a pure function.

    Args:
        policy: What scores the rollouts.
        objective: The loss, as a function of scores.
        optimizer: The pure optimizer.
        max_grad_norm: The global norm to which the gradient is clipped; None leaves it as it is. Training frameworks
            do not store it in a checkpoint (TRL and transformers default to 1.0).
        microbatch: How the batch is cut for the model; it changes memory and no result.
        offload: "cpu" keeps the gradient in the memory of the machine, from where the step takes it a piece at a time;
            None keeps it beside the parameters. The optimizer's state may lie there too, whatever is given here.

    Raises:
        InputError: If max_grad_norm is not above 0, or offload is something else.
    """
    Rule(optimizer, max_grad_norm)  # refuses a bound that is out of range before any model runs
    check_offload(offload)
    return Step(policy, objective, optimizer, max_grad_norm, microbatch, offload)


def check_offload(offload: str | None) -> None:
    """Check where a gradient and an optimizer's state are to be kept.

    Raises:
        InputError: If it is neither "cpu" nor None.
    """
    if offload not in (None, "cpu"):
        raise InputError(f"offload is {offload!r}; expected 'cpu', or None to keep all beside the parameters.")


class LossGradient(NamedTuple):
    """The gradient of the loss, and the scores at which it was taken."""

    gradient: Gradients  #: unclipped; None at leaves that no score of U depends on
    info: dict[str, float]  #: loss and what the objective reported
    scores: TokenScores | None  #: [B, T] of U, with the objective's statistics; None for a gradient that was given


@dataclass(frozen=True)
class Step:
    """A step in two halves, `gradient` and `apply`; calling it does both, so a sweep can share the gradient."""

    policy: Policy
    objective: Objective
    optimizer: Optimizer
    max_grad_norm: float | None = None
    microbatch: Microbatch = None
    offload: Literal["cpu"] | None = None

    def __call__(self, params: Params, opt_state: OptState, rollouts: Rollouts, lr: float | None = None) -> StepResult:
        """Return parameters, delta, state, raw gradient and info after one step on the rollouts.

        Raises:
            InputError: If rollouts, state or learning rate do not fit.
            NumericsError: If a score, the gradient, the step or a stepped parameter is not finite.
        """
        gradient, info = self.gradient(params, rollouts)
        return self.rule.apply(params, opt_state, gradient, lr, info)

    def gradient(
        self, params: Params, rollouts: Rollouts, progress: Progress | None = None
    ) -> tuple[Gradients, dict[str, float]]:
        """Return the gradient of the loss in the parameters, unclipped, and the info of the objective with `loss`.

        It is None at a leaf that no score of the rollouts depends on, where a training loop leaves `.grad` None.

        Where the rollouts carry `sampling_logps`, info says how far they are from the recomputed ones: `sampler_gap`,
        the mean of `|logp − sampling_logps|` in nats per completion token, and `sampler_ratio`, that of
        `exp(logp − sampling_logps)`.

        Raises:
            InputError: If the objective cannot use the rollouts, or no score depends on any leaf.
            NumericsError: If a score or the gradient is not finite; the message names the sequence or the leaf.
        """
        loss = self.loss_gradient(params, rollouts, progress)
        return loss.gradient, loss.info

    def loss_gradient(self, params: Params, rollouts: Rollouts, progress: Progress | None = None) -> LossGradient:
        """Return the gradient and info as `gradient` does, and the scores `[B, T]` of U at which it was taken.

        Warns with FuncprobeWarning of what training adds to the model and this step does not have: dropout, noise, a
        router's loss, each with its probability or coefficient.

        Raises:
            InputError: As `gradient`.
            NumericsError: As `gradient`.
        """
        return loss_gradients([self], params, rollouts, progress)[0]

    def _loss_gradient(self, taken: engine.Gradient, rollouts: Rollouts) -> LossGradient:
        """Return the gradient that the engine took, checked and with its info."""
        self._caution(rollouts)
        gradient = {name: None if name in taken.unreached else g for name, g in taken.gradient.items()}
        check_reached(gradient)
        check_finite(taken.gradient, "gradient of the loss")
        info = {"loss": float(taken.value), **{name: float(x) for name, x in taken.info.items()}}
        mismatch = sampler_mismatch(taken.scores, rollouts)
        sampler = {} if mismatch is None else {"sampler_gap": mismatch.gap, "sampler_ratio": mismatch.ratio}
        return LossGradient(gradient, {**info, **sampler}, taken.scores)

    def caution(self, rollouts: Rollouts) -> None:
        """Issue the warnings that come with a gradient on a batch, without one.

        Raises:
            InputError: If the objective cannot use the rollouts.
        """
        self.objective.prepare(rollouts)
        self._caution(rollouts)

    def _caution(self, rollouts: Rollouts) -> None:
        terms = () if self.policy.checks is None else self.policy.checks.training
        for text in training_cautions(tuple(term for term in terms if term.kind != "left padding"), rollouts):
            warnings.warn(Note("training only", text), FuncprobeWarning, stacklevel=4)

    @property
    def rule(self) -> Rule:
        """The half of the step that needs no model."""
        return Rule(self.optimizer, self.max_grad_norm)

    def apply(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        info: Mapping[str, float] | None = None,
    ) -> StepResult:
        """Return the step along a gradient; see `Rule.apply`.

        Raises:
            InputError: As `Rule.apply`.
            NumericsError: As `Rule.apply`.
        """
        return self.rule.apply(params, opt_state, gradient, lr, info)


def loss_gradients(
    steps: Sequence[Step], params: Params, rollouts: Rollouts, progress: Progress | None = None
) -> list[LossGradient]:
    """Return the result of `Step.loss_gradient` for steps of several objectives, which share the passes over U.

    The steps have one policy, microbatch and place for gradients. A pass over U is one forward pass for all of them and
    two for each: u + 2u a step, in place of 3u.

    Raises:
        InputError: If an objective cannot use the rollouts, or no score depends on any leaf.
        NumericsError: If a score or a gradient is not finite.
    """
    first = steps[0]
    stats: dict[str, Statistic] = {}
    for step in steps:
        stats |= step.objective.stats
    taken = engine.gradients(
        [engine.Wanted(s.objective, s.objective.prepare(rollouts), s.objective.separable) for s in steps],
        first.policy,
        {name: leaf.detach() for name, leaf in params.items()},
        stats=stats,
        offload=first.offload,
        microbatch=first.microbatch,
        progress=progress,
        what="gradient",
    )
    return [step._loss_gradient(each, rollouts) for step, each in zip(steps, taken, strict=True)]


def share_passes(steps: Sequence[Step]) -> bool:
    """Return whether steps can share the passes over a batch: of one policy, cut alike, with statistics of one mind."""
    first, known = steps[0], dict[str, Statistic]()
    return all(
        (step.policy is first.policy and step.microbatch == first.microbatch and step.offload == first.offload)
        and all(known.setdefault(name, stat) is stat for name, stat in step.objective.stats.items())
        for step in steps
    )
