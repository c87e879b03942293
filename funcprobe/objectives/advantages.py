"""Advantages from rewards: a baseline per prompt, and a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.types import Rollouts

#: What is subtracted from a reward, and what the difference is divided by.
BASELINES = ("group", "leave_one_out", "none")
SCALES = ("group", "batch", "none")

#: Added to the standard deviation, as TRL does.
STD_EPSILON = 1e-4


def advantages(rollouts: Rollouts, baseline: str = "group", scale_rewards: str = "group") -> Tensor:
    """Return the advantages `[B]`, float64: those that the rollouts bring, or `(R − baseline) / (std + 1e-4)`.

    Those that the rollouts bring may be `[B, T]`, one of every token, and come back as they are.

    The baseline is the mean reward of the row's group, the mean of the group's *other* rows (leave-one-out), or 0. The
    standard deviation is the unbiased one of the group or of the whole batch; `none` divides by nothing. A group
    whose rewards are all equal gets exactly 0 over a group baseline. Base weights play no part here.

    Raises:
        InputError: If there are neither advantages nor rewards, if they are not finite, or if a group (or batch) of
            one has no standard deviation or no other rows.
    """
    if rollouts.advantages is not None:
        return _finite("advantages", rollouts.advantages, rollouts.completion_mask)
    if rollouts.rewards is None:
        raise InputError(
            "The rollouts have neither rewards nor advantages, and a policy gradient needs one of them; add a 'reward' "
            "or an 'advantage' to every row."
        )
    rewards = _finite("rewards", rollouts.rewards).double()
    ids, group = torch.unique(rollouts.group_ids, return_inverse=True)
    count = torch.bincount(group, minlength=len(ids)).double()  # integer quotients would be float32
    if scale_rewards == "group" or baseline == "leave_one_out":
        _check_group_sizes(ids, group, count, scale_rewards)
    centred = _centred(rewards, group, count)
    numerator = {
        "group": lambda: centred,
        "leave_one_out": lambda: centred * (count / (count - 1))[group],  # R − mean of the others
        "none": lambda: rewards,
    }[baseline]()
    return numerator / _scale(rewards, centred, group, count, scale_rewards)


def by_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return advantages `[B]` or `[B, T]` for terms of tokens: `[B, 1]`, or `[B, T]` with 0 where the mask is 0."""
    return torch.where(mask, advantages, 0.0) if advantages.ndim == 2 else advantages[:, None]


def _centred(rewards: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Return R − group mean, exactly 0 where all rewards of a group are equal."""
    low = torch.full_like(count, torch.inf).scatter_reduce(0, group, rewards, "amin")
    above = rewards - low[group]  # equal rewards leave exact zeros, whose mean is exactly zero
    return above - (_group_sum(above, group, count) / count)[group]


def _scale(rewards: Tensor, centred: Tensor, group: Tensor, count: Tensor, scale_rewards: str) -> Tensor:
    if scale_rewards == "none":
        return torch.ones((), dtype=rewards.dtype, device=rewards.device)
    if scale_rewards == "batch":
        if len(rewards) < 2:
            raise InputError(
                "The batch has one rollout, whose standard deviation is undefined; bring more, or use "
                "scale_rewards='none'."
            )
        return rewards.std(correction=1) + STD_EPSILON
    variance = _group_sum(centred * centred, group, count) / (count - 1)
    return (torch.sqrt(variance) + STD_EPSILON)[group]


def _group_sum(values: Tensor, group: Tensor, count: Tensor) -> Tensor:
    return torch.zeros_like(count).index_add(0, group, values)


def _check_group_sizes(ids: Tensor, group: Tensor, count: Tensor, scale_rewards: str) -> None:
    if not bool((count < 2).any()):
        return
    alone = int((count < 2).int().argmax())
    row = int((group == alone).int().argmax())
    lacks = "standard deviation" if scale_rewards == "group" else "other rollout to take a baseline from"
    instead = "scale_rewards='batch' or 'none'" if scale_rewards == "group" else "another objective"
    raise InputError(
        f"Group {int(ids[alone])} has a single rollout (row {row}) and therefore no {lacks}; bring at least two "
        f"rollouts of every prompt, use {instead}, or give advantages."
    )


def _finite(name: str, values: Tensor, mask: Tensor | None = None) -> Tensor:
    wrong = ~torch.isfinite(values)
    if mask is not None and values.ndim == 2:
        wrong = wrong & mask  # what stands in holes is never looked at
    if bool(wrong.any()):
        row, *position = wrong.nonzero()[0].tolist()
        raise InputError(f"Row {row}: {name} is {float(values[row, *position])}; every row needs a finite number.")
    return values
