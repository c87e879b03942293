"""The loss of any variant over any base, by the loops of the oracle: what the fast paths are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcprobe.objectives.modifiers import Change, DropNegatives, EntropyBonus, Modifier, TokenTerms
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.token_selection import ClipCov, KlCov, TopEntropyQuantile
from funcprobe.types import Rollouts, TokenScores
from tests.cases.scored import Batch
from tests.oracles import losses

Found = tuple[Tensor, TokenScores]

#: (variant, its own options): shares that pick several tokens of a small batch, bounds that hold some of them.
OWN: list[tuple[str, dict[str, Any]]] = [
    ("clip_cov", {}),
    ("clip_cov", {"clip_cov_ratio": 0.29, "clip_cov_lb": -0.1, "clip_cov_ub": 0.8, "seed": 3}),
    ("clip_cov", {"clip_cov_ratio": 1.0, "clip_cov_lb": -50.0, "clip_cov_ub": 50.0}),
    ("kl_cov", {}),
    ("kl_cov", {"kl_cov_ratio": 0.29, "ppo_kl_coef": 0.7}),
    ("entropy_bonus", {"entropy_coef": 0.3}),
    ("entropy_bonus", {"entropy_coef": -0.3}),
    ("top_entropy_quantile", {}),
    ("top_entropy_quantile", {"top_entropy_quantile": 0.7}),
    ("drop_negatives", {}),
]


def loop_loss(loss: PolicyGradient, base: str, rollouts: Rollouts, logp: Tensor, entropy: Tensor) -> Tensor:
    """Return the loss at logp and entropy `[B, T]`, token by token, differentiable in both."""
    rewards, groups = rollouts.rewards.tolist(), rollouts.group_ids.tolist()
    advantage = (
        losses.leave_one_out(rewards, groups)
        if loss.baseline == "leave_one_out"
        else losses.advantages(rewards, groups, loss.scale_rewards)
    )
    return losses.loss(
        base,
        logp,
        rollouts.completion_mask.tolist(),
        advantage,
        rollouts.old_logps,
        rollouts.ref_logps,
        epsilon=loss.epsilon,
        epsilon_high=loss.epsilon_high,
        delta=loss.delta,
        beta=loss.beta,
        bias_correction=loss.use_bias_correction_kl,
        aggregation=loss.aggregation,
        max_completion_length=loss.max_completion_length,
        changes=tuple(_changes(loss, rollouts, logp, entropy, advantage)),
    )


def value_and_gradient(loss: PolicyGradient, scores: TokenScores, rollouts: Rollouts) -> Found:
    gradient, value = torch.func.grad_and_value(lambda s: loss(s, rollouts)[0])(scores)
    return value, gradient


def terms_of(loss: PolicyGradient, case: Batch) -> TokenTerms:
    """The terms that a modifier is shown."""
    seen: list[TokenTerms] = []

    class Watch(Modifier):
        name, separable = "watch", True

        def __call__(self, terms: TokenTerms) -> Change:
            seen.append(terms)
            return Change()

    value = replace(loss, modifiers=(Watch(),))(case.scores, case.rollouts)
    plain = loss(case.scores, case.rollouts)
    assert torch.equal(value[0], plain[0])
    assert set(value[1]) == set(plain[1])
    return seen[0]


def _changes(
    loss: PolicyGradient, rollouts: Rollouts, logp: Tensor, entropy: Tensor, advantage: list[float]
) -> Iterator[losses.Change]:
    mask, old = rollouts.completion_mask.tolist(), rollouts.old_logps
    high = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    ranges = {"epsilon": loss.epsilon, "epsilon_high": high}
    if loss.surrogate == "log_prob":
        ranges = {"epsilon": math.inf, "epsilon_high": math.inf}
    if loss.surrogate == "capped":
        ranges = {"epsilon": math.inf, "epsilon_high": high - 1}
    held = old
    if old is not None and loss.ratio != "token":  # the ratio is the sequence's: as if each token had it
        on = rollouts.completion_mask
        total = torch.where(on, logp.detach() - old, 0.0).sum(1, keepdim=True)
        held = logp.detach() - (
            total / on.sum(1, keepdim=True).clamp(min=1) if loss.ratio == "sequence_mean" else total
        )
    for m in loss.modifiers:
        if isinstance(m, ClipCov):
            bounds = {"share": m.clip_cov_ratio, "lower": m.clip_cov_lb, "upper": m.clip_cov_ub, "seed": m.seed}
            yield losses.clip_cov(logp, mask, advantage, held, **bounds, **ranges)
        elif isinstance(m, KlCov):
            yield losses.kl_cov(logp, mask, advantage, old, share=m.kl_cov_ratio, coefficient=m.ppo_kl_coef)
        elif isinstance(m, EntropyBonus):
            yield losses.entropy_bonus(entropy, m.entropy_coef)
        elif isinstance(m, TopEntropyQuantile):
            yield losses.top_entropy_quantile(entropy, mask, m.top_entropy_quantile)
        else:
            assert isinstance(m, DropNegatives)
            yield losses.drop_negatives(advantage)
