"""Importance-sampled entropy of a policy near the one that sampled E, and its gradient where the two coincide.

Notation: h_it the entropy of the distribution at position t of row i, m_it the completion mask, a_i the base weight,
`d_it = logp_it(θ′) − logp_it(θ)` the log-ratio of a token; h, logp and d are 0 where m is 0.

    per_decision   w_it ∝ a_i exp(Σ_{s<t} d_is)         sequence   w_it = w_i ∝ a_i exp(Σ_s d_is)

normalised over all rows at every position, finished rows included. Then `H = Σ w h / Σ w m` in nats per token, or
`H = Σ w h` in nats per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from funcprobe.types import Microbatch, Rollouts

from .scoring import Scores, gathered, pieces, token_entropy, token_log_probs, token_logp

WEIGHTINGS = ("per_decision", "sequence")
PER = ("token", "sequence")


def entropy(scores: Scores, anchor: Scores, rollouts: Rollouts, weighting: str, per: str) -> float:
    """Return H at `scores`, from rollouts drawn where the scores were `anchor`; all terms are positive."""
    w = importance_weights(scores.logp - anchor.logp, rollouts, weighting)
    total, tokens = (w * scores.entropy).sum(), (w * rollouts.completion_mask).sum()
    return float(total / tokens if per == "token" else total)


def importance_weights(d: Tensor, rollouts: Rollouts, weighting: str) -> Tensor:
    """Return the self-normalised weights `[B, T]` of log-ratios `[B, T]`; every column sums to 1."""
    through = d.cumsum(1)
    exponent = through - d if weighting == "per_decision" else through[:, -1:].expand_as(d)
    return torch.softmax(rollouts.weight.log()[:, None] + exponent, dim=0)  # softmax shifts by the maximum itself


def gradient_coefficients(anchor: Scores, rollouts: Rollouts, weighting: str, per: str) -> tuple[Tensor, Tensor]:
    """Return `(c, e)`, both `[B, T]`, with `∇H = Σ_it c_it ∇logp_it + e_it ∇h_it` at the anchor.

    With `P_it` the sum of log-probabilities in the exponent of `w_it`, and weights `ā_i = a_i / Σ a` at the anchor,

        ∇w_it = ā_i (∇P_it − Σ_j ā_j ∇P_jt)     so     ∇ Σ_it w_it x_it = Σ_it ā_i [(x_it − x̄_t) ∇P_it + ∇x_it]

    with the baseline `x̄_t = Σ_j ā_j x_jt`. Per token, H is a ratio and `∇H = (∇ Σ w h − H ∇ Σ w m) / Σ w m`: take
    `x = h − H m` and divide by the number of tokens. Exchanging the sums over t and over the tokens s in P_it, the
    coefficient of ∇logp_is is `ā_i Σ_t (x_it − x̄_t)` over the positions t whose weight holds token s: those after it
    (per decision), or all of them (sequence).
    """
    mask = rollouts.completion_mask.double()
    a = (rollouts.weight / rollouts.weight.sum())[:, None]
    tokens = (a * mask).sum() if per == "token" else 1.0
    x = anchor.entropy - (a * anchor.entropy).sum() / tokens * mask if per == "token" else anchor.entropy
    centred = x - (a * x).sum(0)
    to_go = centred.sum(1, keepdim=True)
    if weighting == "per_decision":
        to_go = to_go - centred.cumsum(1)
    return a * to_go * mask / tokens, a * mask / tokens


def accumulate_entropy_gradient(
    module: nn.Module, rollouts: Rollouts, coefficients: tuple[Tensor, Tensor], microbatch: Microbatch
) -> None:
    """Add ∇H to `.grad`: a backward pass per microbatch of the surrogate `Σ c logp + e h`, its coefficients constant.

    They come from the scores of the whole batch, which measuring H at θ has made already.
    """
    of_logp, of_entropy = coefficients
    for rows, part in pieces(rollouts, microbatch):
        log_probs = token_log_probs(module, part)
        through_logp = (gathered(of_logp, rows, part) * token_logp(log_probs, part)).sum()
        through_entropy = (gathered(of_entropy, rows, part) * token_entropy(log_probs)).sum()
        (through_logp + through_entropy).backward()
