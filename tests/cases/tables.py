"""The tables that laws run over: every policy, objective, optimizer and observable of the suite, each once, by name.

A suite that needs fewer names those that it takes, and says why beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.objectives.variants import clip_cov, drop_negatives, entropy_bonus, kl_cov, top_entropy_quantile
from funcprobe.optimizers.groups import Group
from funcprobe.types import Objective, Observable, Optimizer, Params, Rollouts
from tests.cases import models

#: Real policies. Qwen2 normalises in float32 whatever its dtype, so that it is held to what float32 gives.
POLICIES: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "two lines": models.two_lines,
        "gpt2": models.gpt2,
        "qwen2, tied": partial(models.qwen2, torch.float64),
        "qwen2, lora": partial(models.lora, torch.float64),
        "padding row": partial(models.padded, tied=False),
        "padding row, tied": partial(models.padded, tied=True),
        "two lines, float32": partial(models.two_lines, torch.float32),
        "gpt2, float32": partial(models.gpt2, torch.float32),
        "qwen2, tied, float32": models.qwen2,
        "qwen2, lora, float32": models.lora,
    }
)
#: Those that compute in float64 from end to end.
FLOAT64 = ("two lines", "gpt2", "padding row", "padding row, tied")
#: One of each architecture, in float64: for suites that run a model many times.
KINDS = ("two lines", "gpt2", "qwen2, tied", "qwen2, lora")

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "reinforce": fp.reinforce(),
        "rloo": fp.rloo(),
        "rloo, delta": fp.rloo(delta=3.0),
        "rloo, kl": fp.rloo(beta=0.3),
        "rloo, kl without the ratio": fp.rloo(beta=0.1, use_bias_correction_kl=False),
        "grpo": fp.grpo(),
        "grpo, delta": fp.grpo(delta=3.0),
        "grpo, low delta": fp.grpo(delta=0.5),
        "grpo, kl": fp.grpo(beta=0.3),
        "grpo, kl without the ratio": fp.grpo(beta=0.3, use_bias_correction_kl=False),
        "bnpo": fp.bnpo(),
        "dr_grpo": fp.dr_grpo(),
        "dapo": fp.dapo(),
        "dapo, narrow": fp.dapo(epsilon=0.1),
        "gspo": fp.gspo(),
        "gspo, wide": fp.gspo(epsilon=0.05),
        "gspo, kl": fp.gspo(beta=0.3),
        "cispo": fp.cispo(),
        "cispo, kl": fp.cispo(beta=0.3),
        "entropy_bonus": entropy_bonus("grpo", entropy_coef=0.1),
        "entropy_bonus over rloo": entropy_bonus("rloo"),
        "drop_negatives": drop_negatives("grpo"),
        "drop_negatives over dapo": drop_negatives("dapo"),
        "top_entropy_quantile": top_entropy_quantile("grpo", top_entropy_quantile=0.35),
        "clip_cov": clip_cov("grpo", clip_cov_ratio=0.1, clip_cov_lb=-5.0, clip_cov_ub=5.0),
        "kl_cov": kl_cov("dapo", kl_cov_ratio=0.2),
        "two modifiers": entropy_bonus(top_entropy_quantile("dapo", beta=0.1)),
    }
)
#: The losses with their defaults, which need no more of a batch than its rewards.
PLAIN = ("reinforce", "rloo", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")

LR = 1e-2


def grouped(params: Params) -> list[Group]:
    """Return two groups of leaves with learning rates and decays of their own."""
    names = list(params)
    return [
        Group(tuple(names[::2]), {"lr": 3e-2, "weight_decay": 0.2}),
        Group(tuple(names[1::2]), {"weight_decay": 0.0}),
    ]


#: Optimizers in closed form, made for the leaves of a policy.
CLOSED_FORM: Mapping[str, Callable[[Params], Optimizer]] = MappingProxyType(
    {
        "sgd": lambda p: fp.sgd(LR),
        "sgd, decay": lambda p: fp.sgd(LR, weight_decay=0.2, maximize=True),
        "sgd, momentum": lambda p: fp.sgd(LR, momentum=0.9, dampening=0.3, weight_decay=0.1),
        "sgd, maximize": lambda p: fp.sgd(LR, momentum=0.9, dampening=0.4, weight_decay=0.2, maximize=True),
        "sgd, nesterov": lambda p: fp.sgd(LR, momentum=0.8, nesterov=True, weight_decay=0.05),
        "sgd, nesterov, maximize": lambda p: fp.sgd(LR, momentum=0.9, nesterov=True, maximize=True),
        "sgd, foreach": lambda p: fp.sgd(LR, momentum=0.8, nesterov=True, foreach=True),
        "sgd, groups": lambda p: fp.sgd(LR, momentum=0.9, groups=grouped(p)),
        "adam": lambda p: fp.adam(LR),
        "adam, coupled": lambda p: fp.adam(LR, weight_decay=0.1),
        "adam, maximize": lambda p: fp.adam(LR, weight_decay=0.2, maximize=True, betas=(0.7, 0.9), eps=1e-3),
        "adam, amsgrad": lambda p: fp.adam(LR, amsgrad=True),
        "adamw": lambda p: fp.adamw(LR, weight_decay=0.1),
        "adamw, maximize": lambda p: fp.adamw(LR, maximize=True),
        "adamw, amsgrad": lambda p: fp.adamw(LR, amsgrad=True, weight_decay=0.4, maximize=True),
        "adamw, fused": lambda p: fp.adamw(LR, fused=True),
        "adamw, groups": lambda p: fp.adamw(LR, groups=grouped(p)),
    }
)
#: Those, and classes that are run themselves.
OPTIMIZERS: Mapping[str, Callable[[Params], Optimizer]] = MappingProxyType(
    {
        **CLOSED_FORM,
        "rmsprop": lambda p: fp.from_torch(torch.optim.RMSprop, lr=LR, momentum=0.5, weight_decay=0.1),
        "nadam": lambda p: fp.from_torch(torch.optim.NAdam, lr=LR),
        "adafactor": lambda p: fp.from_torch(torch.optim.Adafactor, lr=LR),
    }
)

#: Every class of torch.optim that steps on dense gradients without a closure, in every implementation for a CPU.
TORCH_CLASSES: Mapping[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = MappingProxyType(
    {
        "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
        "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
        "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
        "Adam fused": (torch.optim.Adam, {"amsgrad": True, "fused": True}),
        "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
        "AdamW foreach": (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
        "AdamW fused": (torch.optim.AdamW, {"fused": True}),
        "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True, "weight_decay": 0.1}),
        "RMSprop foreach": (torch.optim.RMSprop, {"foreach": True}),
        "Adagrad": (torch.optim.Adagrad, {}),
        "Adagrad fused": (torch.optim.Adagrad, {"fused": True}),
        "NAdam": (torch.optim.NAdam, {}),
        "RAdam": (torch.optim.RAdam, {}),
        "Adamax": (torch.optim.Adamax, {}),
        "Adadelta": (torch.optim.Adadelta, {}),
        "ASGD": (torch.optim.ASGD, {}),
        "Rprop": (torch.optim.Rprop, {}),
        "Adafactor": (torch.optim.Adafactor, {}),
        "Adafactor decay": (torch.optim.Adafactor, {"weight_decay": 0.1}),
        "Adafactor foreach": (torch.optim.Adafactor, {"foreach": True}),
        "Muon": (torch.optim.Muon, {}),
    }
)


def squared(log_probs: Tensor, token: Tensor) -> Tensor:
    """Return Σp², the probability that two draws agree, with its derivative."""
    return (2 * log_probs).exp().sum(-1, dtype=torch.float64)


class Collision:
    """An observable of one's own that reads a statistic: the mean collision probability, importance-weighted."""

    name, unit, stats = "collision probability", "", MappingProxyType({"collision": squared})
    weighting, proposal, inclusive = "none", "anchor", False

    def __call__(self, scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: Rollouts) -> Tensor:
        """Return Σ w m Σp² / Σ w m with the weights of tokens."""
        weight = (scores.logp - anchor.logp).exp() * rollouts.completion_mask * rollouts.weight[:, None]
        return (weight * scores.extra["collision"]).sum() / weight.sum()


#: Entropies with a control variate, and the reward with one.
CONTROLLED: tuple[Observable, ...] = (
    *(fp.entropy(o.integrand, o.weighting, o.per, control_variate=True) for o in fp.entropy_family()),
    fp.expected_reward(control_variate=True),
)
OBSERVABLES: Mapping[str, Observable] = MappingProxyType(
    {
        **{o.name: o for o in (*fp.entropy_family(), *CONTROLLED)},
        "reward": fp.expected_reward(),
        "length": fp.mean_length(),
        "kl": fp.kl(),
        "kl before": fp.kl("before"),
        "collision": Collision(),
    }
)
_SHORT = {
    "entropy": fp.entropy().name,
    "surprisal": fp.entropy("surprisal", "sequence", "sequence").name,
    "controlled": fp.entropy(control_variate=True).name,
}


def observables(*names: str) -> dict[str, Observable]:
    """Return some observables of the table by the names given, short ones among them."""
    return {name: OBSERVABLES[_SHORT.get(name, name)] for name in names}
