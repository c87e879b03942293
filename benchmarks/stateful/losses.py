"""Advantages, token weights and token losses of three objectives: dr_grpo, grpo, reinforce.

    loss = Σ_i Σ_t w_it · l_it       over all rows i of U and completion positions t

    dr_grpo     l = −min(r A, clip(r, .8, 1.2) A)   w = a_i m_it / (N L_max)    A = R − mean_group R
    grpo        l as dr_grpo                        w = a_i m_it / (N L_i)      A = (R − mean) / (std + 1e-4)
    reinforce   l = −A log π                        w as grpo                   A as grpo

r = π/π_old by token, L_i the completion tokens of row i, L_max the longest completion of U (tokens that a tool wrote
included), a the base weights, N = Σ a. The weights hold no score and are made of the whole batch once, so a microbatch
contributes its part of one sum: there is nothing to average over microbatches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.types import Rollouts

OBJECTIVES = ("dr_grpo", "grpo", "reinforce")

#: The ratio is clipped to [1 − EPSILON, 1 + EPSILON].
EPSILON = 0.2

#: Added to the standard deviation of a group's rewards.
STD_EPSILON = 1e-4


class Targets(NamedTuple):
    """What the loss of a batch is made of besides log-probabilities."""

    advantages: Tensor  #: [B, T] float64, the row's advantage at each of its positions
    weights: Tensor  #: [B, T] float64, 0 where the completion mask is 0
    old_logps: Tensor | None  #: [B, T] float64; None where the ratio is 1


def targets(objective: str, rollouts: Rollouts) -> Targets:
    """Return advantages and token weights of the whole batch.

    Raises:
        InputError: If there are neither advantages nor rewards, or nothing to train on.
    """
    mask = rollouts.completion_mask.double()
    weighted = rollouts.weight[:, None] * mask
    if not bool(weighted.any()):
        raise InputError("The update batch has no completion token with a weight above 0; there is nothing to step on.")
    rows = rollouts.weight.sum()
    if objective == "dr_grpo":
        longest = int(rollouts.completion_mask.any(0).nonzero().max()) + 1
        weights = weighted / (rows * longest)
    else:
        weights = weighted / (rows * mask.sum(1, keepdim=True).clamp(min=1))
    return Targets(_advantages(objective, rollouts)[:, None].expand_as(weights), weights, rollouts.old_logps)


def token_losses(objective: str, logp: Tensor, advantage: Tensor, old_logp: Tensor | None) -> Tensor:
    """Return the loss of every token `[n]` at log-probabilities `[n]`; without `old_logp` the ratio is 1."""
    if objective == "reinforce":
        return -advantage * logp
    ratio = torch.exp(logp - (logp.detach() if old_logp is None else old_logp))
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def _advantages(objective: str, rollouts: Rollouts) -> Tensor:
    """Return the advantages `[B]` that the rollouts bring, or those of their rewards within each group."""
    if rollouts.advantages is not None:
        return rollouts.advantages
    if rollouts.rewards is None:
        raise InputError("The update batch has neither rewards nor advantages; a policy gradient needs one of them.")
    found = torch.zeros_like(rollouts.rewards)
    for group in rollouts.group_ids.unique():
        members = rollouts.group_ids == group
        rewards = rollouts.rewards[members]
        if objective != "dr_grpo" and len(rewards) < 2:
            raise InputError(f"Group {int(group)} has one rollout and no standard deviation; bring two, or advantages.")
        scale = 1.0 if objective == "dr_grpo" else rewards.std(correction=1) + STD_EPSILON
        found[members] = (rewards - rewards.mean()) / scale
    return found
