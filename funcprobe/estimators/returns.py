"""Reward and length of completions: expected reward and mean length, importance-sampled from scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.estimators.control_variate import controlled_sum
from funcprobe.estimators.importance import log_ratios, prefix_weights, sequence_weights
from funcprobe.types import Proposal, Rollouts, Statistic, TokenScores, Weighting


@dataclass(frozen=True)
class ExpectedReward:
    """The policy's expected reward, as a function of scores; see `expected_reward`."""

    control_variate: bool = False

    proposal: ClassVar[Proposal] = "anchor"
    inclusive: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Return 'expected reward', with '/control_variate' where there is one."""
        return "expected reward" + ("/control_variate" if self.control_variate else "")

    @property
    def unit(self) -> str:
        """Return 'reward', whatever the reward function counts."""
        return "reward"

    @property
    def weighting(self) -> Weighting:
        """Return 'sequence': a reward belongs to a whole completion."""
        return "sequence"

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """Return no statistics: log-probabilities are enough."""
        return {}

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the estimate at `scores` from rollouts drawn at `anchor`, a float64 scalar.

        Raises:
            InputError: If the rollouts carry no rewards, or a control variate meets a prompt with a single rollout.
        """
        if rollouts.rewards is None:
            raise InputError(
                "The expected reward needs rewards, and these rollouts carry none; give one number a row "
                "(rollouts._replace(rewards=...), or rewards=[...] where they are built, or reward= where sampled)."
            )
        w = sequence_weights(log_ratios(scores, anchor, rollouts), rollouts.weight)
        if not self.control_variate:
            return (w * rollouts.rewards).sum()
        earned = rollouts.rewards.unsqueeze(-1)
        return controlled_sum(w.unsqueeze(-1), earned, earned, rollouts)


@dataclass(frozen=True)
class MeanLength:
    """The mean number of tokens that the policy generates, as a function of scores; see `mean_length`."""

    proposal: ClassVar[Proposal] = "anchor"
    inclusive: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Return 'mean length'."""
        return "mean length"

    @property
    def unit(self) -> str:
        """Return 'tokens'."""
        return "tokens"

    @property
    def weighting(self) -> Weighting:
        """Return 'per_decision': whether there is a token at t depends on those before it."""
        return "per_decision"

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """Return no statistics: log-probabilities are enough."""
        return {}

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the estimate at `scores` from rollouts drawn at `anchor`, a float64 scalar."""
        prefix = prefix_weights(log_ratios(scores, anchor, rollouts), rollouts.weight)
        return (prefix * rollouts.completion_mask).sum()


def expected_reward(*, control_variate: bool = False) -> ExpectedReward:
    """Return the estimator `Σ_i w_i R_i` of the policy's expected reward, w the sequence weights of `importance`.

    Estimand: E[R] over prompts and completions, in the units of the reward. Bias: O(1/N) from self-normalisation, zero
    where the base weights are the exact probabilities of an enumeration. `control_variate` subtracts the mean reward
    of a prompt's other rollouts (see `control_variate`): the same estimand, a smaller error where prompts differ much
    in difficulty and a slightly larger one where they hardly do. It needs at least two rollouts a prompt.

    Example:
        >>> expected_reward().name, expected_reward(control_variate=True).name
        ('expected reward', 'expected reward/control_variate')
    """
    return ExpectedReward(control_variate)


def mean_length() -> MeanLength:
    """Return the estimator `Σ_t Σ_i w̄_it m_it` of the mean completion length, w̄ the prefix weights, m the mask.

    Estimand: E[T], in tokens, counting those that the policy chose (not a tool's). Bias: O(1/N) from
    self-normalisation, zero where the base weights are the exact probabilities of an enumeration.

    Example:
        >>> mean_length().name, mean_length().unit
        ('mean length', 'tokens')
    """
    return MeanLength()
