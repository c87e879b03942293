"""Policies with a direction and rollouts, and an entropy as the engine takes it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import funcprobe as fp
from funcprobe.types import Params, Rollouts, TokenScores
from tests.cases import models, tables


@functools.cache
def setting(build: str, *, holes: bool = True) -> tuple[fp.Policy, Params, Params, Rollouts]:
    """Return policy, parameters, a direction and rollouts."""
    policy, params = fp.from_module(tables.POLICIES[build]())
    return policy, params, models.direction(params), models.rollouts(holes=holes)


def off_policy(rollouts: Rollouts, seed: int = 2) -> Rollouts:
    """Return rollouts whose old and reference log-probs differ from the policy's, so that ratios and KL matter."""
    g = torch.Generator().manual_seed(seed)
    shape = rollouts.completion_mask.shape
    old, ref = (-2.0 - torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return rollouts._replace(old_logps=old, ref_logps=ref)


def entropy_of(observable: fp.entropy, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the observable with its anchor at the scores themselves, as an engine function."""
    anchor = TokenScores(scores.logp.detach(), scores.entropy.detach(), {})
    return observable(scores, anchor, rollouts), {}
