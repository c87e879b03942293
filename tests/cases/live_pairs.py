"""Modules beside their optimizers in the middle of a run, and the batches that a probe of them is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from funcprobe.types import Rollouts
from tests.cases import models


def lora(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return LoRA over GPT-2, which computes in float64 throughout; both factors away from zero."""
    options = {"lora_dropout": 0.3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    return models.adapted(models.gpt2(torch.float64), dtype, seed=9, **options)


def full(dtype: torch.dtype = torch.float64) -> nn.Module:
    return models.gpt2(torch.float64).to(dtype)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups_of(module), lr=1e-3, momentum=0.9, nesterov=True)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(module), lr=1e-3)


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in every hyperparameter they can, as trainers make them."""
    leaves = [p for p in module.parameters() if p.requires_grad]
    return [{"params": leaves[::2], "weight_decay": 0.1}, {"params": leaves[1::2], "weight_decay": 0.0, "lr": 2e-3}]


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Take a few real steps of next-token prediction, so that moments are moments."""
    ids = torch.randint(models.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
    module.eval()
    for row in range(steps):
        optimizer.zero_grad()
        found = module(ids[row : row + 2])
        logits = getattr(found, "logits", found)[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[row : row + 2, 1:].flatten()).backward()
        optimizer.step()
    optimizer.zero_grad()


def batches(old_logps: bool = False) -> tuple[Rollouts, Rollouts]:
    """Return E and U: ragged, with holes, weighted; U with the log-probabilities of an older policy where asked."""
    evaluation, update = models.rollouts(11, seed=1, holes=True), models.rollouts(9, seed=2, holes=True)
    g = torch.Generator().manual_seed(4)
    evaluation = evaluation._replace(
        weight=torch.randint(0, 4, (11,), generator=g).double() + torch.eye(11)[0].double()
    )
    update = update._replace(weight=torch.rand(9, generator=g, dtype=torch.float64) + 0.5)
    if old_logps:
        # uniform over 7 and noise: where trained policies go, ratios of .3 to 3, of which half are clipped
        noise = torch.randn(update.completion_mask.shape, generator=g, dtype=torch.float64)
        old = (noise * 0.5 - math.log(models.VOCABULARY)) * update.completion_mask
        update = update._replace(old_logps=old)
    return evaluation, update
