"""Kullback–Leibler divergence between the policy before and after, both ways, from scores and without cancellation.

With `d = log π′ − log π` of a token and `r = e^d`, every term below is nonnegative and of second order in d:

    KL(π′‖π)   E_π[r d − r + 1]     KL(π‖π′)   E_π[r − 1 − d]

So the relative noise is that of d² and stays about .1 at any step size, where sums of d alone drown in their own
first order. And so the first order is exactly 0 at the anchor: what a small step costs is the second, the Fisher form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.estimators.importance import log_ratios, prefix_weights
from funcprobe.types import Proposal, Rollouts, Statistic, TokenScores, Weighting

Of = Literal["after", "before"]

#: |d| below which a Taylor polynomial is more accurate than a difference, and its degree: at |d| = .5 the first term
#: left out is 1e-17 of the sum, and the difference loses a factor of 4 to cancellation.
SMALL, DEGREE = 0.5, 16

_ORDERS = range(2, DEGREE + 1)


@dataclass(frozen=True)
class Divergence:
    """A Kullback–Leibler divergence between two policies, as a function of scores; see `kl`."""

    of: Of = "after"

    def __post_init__(self) -> None:
        if self.of not in ("after", "before"):
            raise InputError(f"kl(): unknown of '{self.of}'; expected 'after' or 'before'.")

    proposal: ClassVar[Proposal] = "anchor"
    inclusive: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Return 'kl(after‖before)' or 'kl(before‖after)'."""
        return "kl(after‖before)" if self.of == "after" else "kl(before‖after)"

    @property
    def unit(self) -> str:
        """Return 'nats per sequence'."""
        return "nats per sequence"

    @property
    def weighting(self) -> Weighting:
        """Return 'per_decision', or 'none' for the divergence of the policy that sampled: a plain mean."""
        return "per_decision" if self.of == "after" else "none"

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """Return no statistics: log-probabilities are enough."""
        return {}

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the estimate at `scores` from rollouts drawn at `anchor`, a float64 scalar in nats, never negative."""
        d, a = log_ratios(scores, anchor, rollouts), rollouts.weight
        d = torch.where(a.unsqueeze(-1) > 0, d, 0.0)  # 0 · e^d of a row that does not count: no NaN where d is huge
        if self.of == "after":
            return (prefix_weights(d, a) * reverse_terms(d)).sum()
        return (a.unsqueeze(-1) * forward_terms(d)).sum() / a.sum()


def kl(of: Of = "after") -> Divergence:
    """Return an estimator of the divergence between the policy π′ at the scores and the anchor π, over completions.

        of="after"     KL(π′‖π) = Σ_t Σ_i w̄_it (r d − r + 1), w̄ the prefix weights of `importance` (s < t)
        of="before"    KL(π‖π′) = Σ_i ā_i Σ_t (r − 1 − d), ā the base weights, normalised

    Estimand: E[log π′ − log π] under π′, or E[log π − log π′] under π, over whole completions, averaged over prompts,
    in nats per sequence. Bias: O(1/N) from self-normalisation for "after", none for "before"; zero for both where the
    base weights are the exact probabilities of an enumeration. "before" uses no importance weight of a prefix, so it
    does not degenerate with the length. "k3" of http://joschu.net/blog/kl-approx.html is the term of "before".

    Raises:
        InputError: If `of` is neither.

    Example:
        >>> kl().name, kl("before").name
        ('kl(after‖before)', 'kl(before‖after)')
    """
    return Divergence(of)


def reverse_terms(d: Tensor) -> Tensor:
    """Return `r d − r + 1` with `r = e^d`, to rounding at every d, and so its derivatives.

    Example:
        >>> bool((reverse_terms(torch.tensor(1e-8).double()) / 0.5e-16 - 1).abs() < 1e-7)
        True
    """
    coefficients = [(k - 1) / math.factorial(k) for k in _ORDERS]
    return _pieced(d, coefficients, d * torch.exp(d) - torch.expm1(d))


def forward_terms(d: Tensor) -> Tensor:
    """Return `r − 1 − d` with `r = e^d`, to rounding at every d, and so its derivatives.

    Example:
        >>> bool((forward_terms(torch.tensor(1e-8).double()) / 0.5e-16 - 1).abs() < 1e-7)
        True
    """
    coefficients = [1 / math.factorial(k) for k in _ORDERS]
    return _pieced(d, coefficients, torch.expm1(d) - d)


def _pieced(d: Tensor, coefficients: Sequence[float], far: Tensor) -> Tensor:
    """Return `d² (c₀ + c₁ d + ...)` where |d| is small, and `far` elsewhere."""
    small = d.abs() < SMALL
    near = torch.where(small, d, 0.0)  # powers of a large d would overflow, and a derivative of that be NaN
    polynomial = torch.full_like(near, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        polynomial = polynomial * near + c
    return torch.where(small, near * near * polynomial, far)
