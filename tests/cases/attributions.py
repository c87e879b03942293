"""Cases for the suites of attribution: real policies, every loss and optimizer, and rollouts with holes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.objectives.variants import clip_cov, drop_negatives, entropy_bonus, kl_cov, top_entropy_quantile
from funcprobe.optimizers.factories import Group
from funcprobe.training.step import Step
from funcprobe.types import Objective, Observable, Optimizer, OptState, Params, Rollouts
from tests.cases import models
from tests.cases.probes import E, U, prompted

LR = 1e-2

#: Real policies by name. Qwen2 normalises in float32 whatever its dtype, so that it is held to what float32 gives.
POLICIES: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "two lines": models.two_lines,
        "gpt2": models.gpt2,
        "padding row": lambda: padded(tied=False),
        "padding row, tied": lambda: padded(tied=True),
        "two lines, float32": lambda: models.two_lines(torch.float32),
        "gpt2, float32": lambda: models.gpt2(torch.float32),
        "qwen2, tied": models.qwen2,
        "qwen2, lora": models.lora,
    }
)
FLOAT64 = ("two lines", "gpt2", "padding row", "padding row, tied")

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "reinforce": fp.reinforce(),
        "grpo": fp.grpo(),
        "grpo, kl": fp.grpo(beta=0.3),
        "dr_grpo": fp.dr_grpo(),
        "dapo": fp.dapo(epsilon=0.1),
        "gspo": fp.gspo(epsilon=0.05),
        "gspo, kl": fp.gspo(beta=0.3),
        "cispo": fp.cispo(),
        "rloo": fp.rloo(),
        "rloo, kl": fp.rloo(beta=0.1, use_bias_correction_kl=False),
        "entropy_bonus": entropy_bonus("grpo", entropy_coef=0.1),
        "drop_negatives": drop_negatives("dapo"),
        "top_entropy_quantile": top_entropy_quantile("grpo", top_entropy_quantile=0.35),
        "clip_cov": clip_cov("grpo", clip_cov_ratio=0.1, clip_cov_lb=-5.0, clip_cov_ub=5.0),
        "kl_cov": kl_cov("dapo", kl_cov_ratio=0.2),
        "two modifiers": entropy_bonus(top_entropy_quantile("dapo", beta=0.1)),
    }
)

#: Optimizers by name, made for the leaves of a policy.
OPTIMIZERS: Mapping[str, Callable[[Params], Optimizer]] = MappingProxyType(
    {
        "sgd": lambda p: fp.sgd(LR),
        "sgd, momentum": lambda p: fp.sgd(LR, momentum=0.9, dampening=0.3, weight_decay=0.1),
        "sgd, nesterov": lambda p: fp.sgd(LR, momentum=0.8, nesterov=True, weight_decay=0.05),
        "adam, coupled": lambda p: fp.adam(LR, weight_decay=0.1),
        "adam, amsgrad": lambda p: fp.adam(LR, amsgrad=True),
        "adamw": lambda p: fp.adamw(LR, weight_decay=0.1),
        "adamw, groups": lambda p: fp.adamw(LR, groups=grouped(p)),
        "sgd, groups": lambda p: fp.sgd(LR, momentum=0.9, groups=grouped(p)),
    }
)


def squared(log_probs: Tensor, token: Tensor) -> Tensor:
    """Return Σp², the probability that two draws agree, with its derivative."""
    return (2 * log_probs).exp().sum(-1, dtype=torch.float64)


class Collision:
    """An observable of one's own that reads a statistic: the mean collision probability, importance-weighted."""

    name, unit, stats = "collision probability", "", MappingProxyType({"collision": squared})

    def __call__(self, scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: Rollouts) -> Tensor:
        """Return Σ w m Σp² / Σ w m with the weights of tokens."""
        weight = (scores.logp - anchor.logp).exp() * rollouts.completion_mask * rollouts.weight[:, None]
        return (weight * scores.extra["collision"]).sum() / weight.sum()


OBSERVABLES: Mapping[str, Observable] = MappingProxyType(
    {
        **{o.name: o for o in fp.entropy_family()},
        "controlled": fp.entropy(control_variate=True),
        "reward": fp.expected_reward(),
        "length": fp.mean_length(),
        "collision": Collision(),
    }
)


def padded(*, tied: bool) -> nn.Module:
    """Return a GPT-2 whose embedding has a padding row, the token 2, which prompts and completions read."""
    module = models.gpt2()
    module.get_input_embeddings().padding_idx = 2
    if not tied:
        module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())
    return module


def grouped(params: Params) -> list[Group]:
    """Return two groups of leaves with learning rates and decays of their own."""
    names = list(params)
    return [
        Group(tuple(names[::2]), {"lr": 3e-2, "weight_decay": 0.2}),
        Group(tuple(names[1::2]), {"weight_decay": 0.0}),
    ]


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
