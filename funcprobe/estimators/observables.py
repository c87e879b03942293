"""The entropy family: functionals of a policy, importance-sampled from scores.

Two integrands, two weightings and two normalisations make eight estimators of two quantities:

    per sequence   E[Σ_t h_t]             the entropy of a whole completion, nats per sequence
    per token      E[Σ_t h_t] / E[T]      the same per generated token, nats per token

They are functions of scores alone, so one set of scores serves all of them. The derivative of an estimator at the
anchor is the derivative of this very function: nobody writes a score-function estimator by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.estimators.control_variate import controlled_sum
from funcprobe.estimators.importance import log_ratios, prefix_weights, sequence_weights
from funcprobe.types import Proposal, Rollouts, Statistic, TokenScores

Integrand = Literal["rao_blackwell", "surprisal"]
Per = Literal["token", "sequence"]
Multiplied = Literal["per_decision", "sequence"]  #: an entropy is always weighted; `Weighting` has "none" as well

_CHOICES = {
    "integrand": ("rao_blackwell", "surprisal"),
    "weighting": ("per_decision", "sequence"),
    "per": ("token", "sequence"),
    "proposal": ("anchor", "sampler"),
}


@dataclass(frozen=True)
class Entropy:
    """One member of the entropy family, as a function of scores; see `entropy`."""

    integrand: Integrand = "rao_blackwell"
    weighting: Multiplied = "per_decision"
    per: Per = "token"
    proposal: Proposal = "anchor"
    control_variate: bool = False
    stats: Mapping[str, Statistic] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            if (found := getattr(self, option)) not in choices:
                raise InputError(f"entropy(): unknown {option} '{found}'; expected one of {', '.join(choices)}.")

    @property
    def name(self) -> str:
        """The name in tables, such as 'rao_blackwell/per_decision/token'; options other than the default are added."""
        proposal = "" if self.proposal == "anchor" else f"/{self.proposal}"
        variate = "/control_variate" if self.control_variate else ""
        return f"{self.integrand}/{self.weighting}/{self.per}{proposal}{variate}"

    @property
    def unit(self) -> str:
        """Return 'nats per token' or 'nats per sequence'."""
        return f"nats per {self.per}"

    @property
    def inclusive(self) -> bool:
        """Whether a term depends on the token itself: a surprisal does."""
        return self.integrand == "surprisal"

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the estimate at `scores` from rollouts drawn at `anchor`, a float64 scalar in nats.

        Raises:
            InputError: If a control variate meets a prompt with a single rollout, or the proposal's log-probs are
                missing.
        """
        d, a = log_ratios(scores, anchor, rollouts, self.proposal), rollouts.weight
        of_terms = of_tokens = sequence_weights(d, a).unsqueeze(-1)
        if self.weighting == "per_decision":
            # a surprisal depends on the token at t itself, so its own ratio belongs to the weight
            of_tokens = prefix_weights(d, a)
            of_terms = of_tokens if self.integrand == "rao_blackwell" else prefix_weights(d, a, inclusive=True)
        total = self._sum(of_terms, self._terms(scores), self._terms(anchor), rollouts)
        if self.per == "sequence":
            return total
        mask = rollouts.completion_mask.to(total.dtype)
        return total / self._sum(of_tokens, mask, mask, rollouts)

    def _terms(self, scores: TokenScores) -> Tensor:
        return scores.entropy if self.integrand == "rao_blackwell" else -scores.logp

    def _sum(self, w: Tensor, terms: Tensor, at_anchor: Tensor, rollouts: Rollouts) -> Tensor:
        return controlled_sum(w, terms, at_anchor, rollouts) if self.control_variate else (w * terms).sum()


def entropy(
    integrand: Integrand = "rao_blackwell",
    weighting: Multiplied = "per_decision",
    per: Per = "token",
    proposal: Proposal = "anchor",
    *,
    control_variate: bool = False,
) -> Entropy:
    """Return an estimator of the policy's entropy: by default Rao–Blackwell, per decision, per token.

    With `w` the sequence weights and `w̄` the per-decision weights of `importance`, m the completion mask:

        per_decision   Σ_t Σ_i w̄_it x_it           sequence   Σ_i w_i Σ_t x_it
        rao_blackwell  x = h, w̄ over s < t         surprisal  x = −logp, w̄ over s ≤ t
        per token      divided by Σ_t Σ_i w̄_it m_it (w̄ over s < t), or by Σ_i w_i Σ_t m_it

    Estimand: E[Σ_t h_t] under the policy at the scores' temperature, or its ratio to E[T]. Bias: O(1/N) from
    self-normalisation (and from the ratio), zero where the base weights are the exact probabilities of an enumeration.
    `proposal="sampler"` weighs against the log-probs that the sampling engine reported; it is never chosen for you,
    because engine mismatch compounds over long sequences and truncated samplers lose support.
    `control_variate` subtracts from every term (and from every token that the ratio counts) the mean over the other
    rollouts of its prompt, at the anchor: the same estimand, a smaller error where prompts differ much and a slightly
    larger one where they hardly do (see `control_variate`). It needs at least two rollouts a prompt.

    Raises:
        InputError: If an option is not one of its choices.

    Example:
        >>> entropy().name, entropy(per="sequence").unit
        ('rao_blackwell/per_decision/token', 'nats per sequence')
    """
    return Entropy(integrand, weighting, per, proposal, control_variate)


def entropy_family(proposal: Proposal = "anchor") -> tuple[Entropy, ...]:
    """Return all eight members without a control variate, the default first."""
    return tuple(
        Entropy(integrand, weighting, per, proposal)  # type: ignore[arg-type]
        for per in _CHOICES["per"]
        for integrand in _CHOICES["integrand"]
        for weighting in _CHOICES["weighting"]
    )
