"""Cases for the suites of attribution: real policies, every loss and optimizer, and rollouts with holes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import funcprobe as fp
from funcprobe.training.step import Step
from funcprobe.types import Objective, Observable, Optimizer, OptState, Params, Rollouts
from tests.cases.probes import E, U, prompted
from tests.cases.tables import LR, OBJECTIVES, OPTIMIZERS, POLICIES


def holed(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts with a hole in the middle of every longer completion, as a tool leaves one."""
    mask = rollouts.completion_mask.clone()
    mask[mask.sum(1) > 3, 1] = False
    return rollouts._replace(completion_mask=mask)


def weighted(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts with unequal base weights, one of them 0."""
    weight = 0.5 + torch.arange(len(rollouts.ids), dtype=torch.float64) / 5
    weight[1] = 0.0
    return rollouts._replace(weight=weight)


class Stepped:
    """A policy before a step: its optimizer has stepped twice already, and U has old and reference log-probabilities.

    The old ones are so far from the policy's own that clipping bites.
    """

    def __init__(
        self,
        model: str = "gpt2",
        objective: str | Objective = "grpo",
        optimizer: str | Optimizer = "adamw",
        clip: float | None = None,
        *,
        cold: bool = False,
        batch: Rollouts = U,
        stale: bool = True,
    ) -> None:
        self.module, self.policy, self.params = policy_of(model)
        made = OBJECTIVES[objective] if isinstance(objective, str) else objective
        self.optimizer = OPTIMIZERS[optimizer](self.params) if isinstance(optimizer, str) else optimizer
        self.step: Step = fp.make_step(self.policy, made, self.optimizer, clip)
        self.state: OptState = self.optimizer.init(self.params)
        for gradient in () if cold else earlier(model):
            self.state = self.step.apply(self.params, self.state, gradient).opt_state
        self.batch = aged(self.policy, self.params, batch) if stale else batch

    def attribute(self, observable: Observable | None = None, **options: Any) -> fp.Attribution:
        """Attribute the step; error bars, which are no concern of most tests, are left out."""
        given: dict[str, Any] = {"bars": None, **options}
        evaluation, batch, lr = given.pop("evaluation", E), given.pop("batch", self.batch), given.pop("lr", None)
        update = fp.Update.from_step(self.step, self.params, self.state, batch, lr)
        return fp.attribute(update, evaluation, observable, **given)


@functools.cache
def policy_of(model: str) -> tuple[nn.Module, fp.Policy, Params]:
    """Return a module, its policy and its parameters."""
    module = POLICIES[model]()
    return module, *fp.from_module(module)


@functools.cache
def earlier(model: str) -> tuple[Params, ...]:
    """Return the gradients of two earlier steps, from which moments are made."""
    _, policy, params = policy_of(model)
    step = fp.make_step(policy, fp.grpo(), fp.sgd(LR))
    return tuple(step.gradient(params, prompted(3, 3, seed=s, first=80))[0] for s in (9, 10))


def aged(policy: fp.Policy, params: Params, rollouts: Rollouts) -> Rollouts:
    """Return the rollouts with old and reference log-probabilities away from the policy's own."""
    own, g = fp.score(policy, params, rollouts).logp, torch.Generator().manual_seed(6)
    old, ref = (
        (own + size * torch.randn(own.shape, generator=g, dtype=torch.float64)) * rollouts.completion_mask
        for size in (0.3, 0.6)
    )
    return rollouts._replace(old_logps=old, ref_logps=ref)
