"""Importance weights of rollouts drawn at the anchor, for a policy nearby: sequence and per-decision, and their health.

All functions eat `[B, T]` float64 arrays. `d[b, t] = logp(θ′) − logp(θ)` is the log-ratio of one token, 0 where the
completion mask is 0; `a[b]` the base weight of a row.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.objectives.ratios import LARGEST_REPORTED
from funcprobe.types import Proposal, Rollouts, TokenScores, Weighting

#: Rollouts below which a Pareto tail cannot be fitted.
FEWEST_FOR_KHAT = 25


def log_ratios(scores: TokenScores, anchor: TokenScores, rollouts: Rollouts, proposal: Proposal = "anchor") -> Tensor:
    """Return `d[b, t] = logp(θ′) − log q`, with q the anchor policy or the engine that sampled, 0 where masked.

    Raises:
        InputError: If `proposal="sampler"` and the rollouts carry no `sampling_logps`, or the name is unknown.
    """
    if proposal == "anchor":
        return scores.logp - anchor.logp
    if proposal != "sampler":
        raise InputError(f"Unknown proposal '{proposal}'; expected 'anchor' or 'sampler'.")
    if rollouts.sampling_logps is None:
        raise InputError(
            "proposal='sampler' needs the sampler's log-probabilities, and these rollouts carry none; store "
            "sampling_logps with the rollouts or use proposal='anchor'."
        )
    return torch.where(rollouts.completion_mask, scores.logp - rollouts.sampling_logps, 0.0)


def sequence_weights(d: Tensor, a: Tensor) -> Tensor:
    """Return the self-normalised weights `w[b] ∝ a[b] exp(Σ_t d[b, t])`, summing to 1 over the batch.

    Example:
        >>> sequence_weights(torch.tensor([[0.0, 0.0], [0.5, 0.193147]]), torch.ones(2)).round(decimals=4)
        tensor([0.3333, 0.6667])
    """
    return _normalised(d.sum(-1), a)


def prefix_weights(d: Tensor, a: Tensor, *, inclusive: bool = False) -> Tensor:
    """Return the per-decision weights `w̄[b, t] ∝ a[b] exp(Σ_{s<t} d[b, s])`, summing to 1 at every position t.

    Every row takes part at every position: a sequence that has ended adds nothing to its exponent any more, and
    leaving it out of the normalisation would be inconsistent. `inclusive` lets the product run to `s ≤ t`.
    """
    exponent = d.cumsum(-1)
    if not inclusive:
        exponent = torch.cat([torch.zeros_like(d[:, :1]), exponent[:, :-1]], dim=-1)
    return _normalised(exponent, a.unsqueeze(-1))


def effective_sample_size(weights: Tensor, among: Tensor | None = None) -> Tensor:
    """Return `ESS = (Σw)² / Σw²` over rows: a scalar for `[B]`, one value a position for `[B, T]`.

    `among` (a mask of the weights' shape) restricts the sums, for instance to the rows that contribute a token; a
    position at which nothing contributes gets 0.

    Example:
        >>> effective_sample_size(torch.tensor([0.25, 0.25, 0.5]))
        tensor(2.6667)
    """
    w = weights if among is None else weights * among
    square = (w * w).sum(0)
    return torch.where(square > 0, w.sum(0) ** 2 / square.clamp(min=torch.finfo(w.dtype).tiny), 0.0)


class WeightHealth(NamedTuple):
    """How much of the sample the importance weights still use."""

    ess_sequence: float  #: ESS of the sequence weights, in sequences
    ess_prefix_min: float  #: smallest ESS of the per-decision weights over positions, all rows counted
    ess_prefix_mean: float  #: mean over positions of the same
    ess_inclusive_min: float  #: as ess_prefix_min, for the weights with s ≤ t that a surprisal takes
    ess_contributing_min: float  #: smallest ESS over positions, among rows that have a token there
    ess_contributing_mean: float  #: mean over positions of the same
    ess_base: float  #: ESS of the base weights alone: N, where they are equal
    khat: float | None  #: Pareto k̂ of the sequence weights; None where the sample is too small or nothing moved
    max_weight: float  #: largest sequence weight, times N
    log_weight_max: float  #: largest sequence log-weight, nats
    log_weight_mean: float  #: mean of the same
    log_weight_std: float  #: their standard deviation

    def fraction(self, weighting: Weighting, *, inclusive: bool = False) -> float:
        """Return the ESS of the named weights as a fraction of the ESS of the base weights alone.

        `inclusive` asks for per-decision weights over `s ≤ t`, which a surprisal takes, instead of `s < t`.
        """
        if weighting == "none":  # a plain mean over rollouts uses all of them
            return 1.0
        per_decision = self.ess_inclusive_min if inclusive else self.ess_prefix_min
        return (self.ess_sequence if weighting == "sequence" else per_decision) / self.ess_base


def weight_health(d: Tensor, rollouts: Rollouts) -> WeightHealth:
    """Return the effective sample sizes and the Pareto k̂ of the weights made from log-ratios `d [B, T]`."""
    a, mask = rollouts.weight, rollouts.completion_mask
    used = a > 0
    sequence, prefix = sequence_weights(d, a), prefix_weights(d, a)
    per_position = effective_sample_size(prefix)
    contributing = effective_sample_size(prefix, mask)[(mask & used.unsqueeze(-1)).any(0)]
    log_weights = d.sum(-1)[used]
    return WeightHealth(
        ess_sequence=float(effective_sample_size(sequence)),
        ess_prefix_min=float(per_position.min()),
        ess_prefix_mean=float(per_position.mean()),
        ess_inclusive_min=float(effective_sample_size(prefix_weights(d, a, inclusive=True)).min()),
        ess_contributing_min=float(contributing.min()),
        ess_contributing_mean=float(contributing.mean()),
        ess_base=float(effective_sample_size(a)),
        khat=pareto_khat(log_weights),
        max_weight=float(sequence.max()) * int(used.sum()),
        log_weight_max=float(log_weights.max()),
        log_weight_mean=float(log_weights.mean()),
        log_weight_std=float(log_weights.std(correction=0)),
    )


class SamplerMismatch(NamedTuple):
    """How far the log-probabilities that a sampling engine reported are from the recomputed ones."""

    gap: float  #: mean |recomputed − reported|, nats per token
    ratio: (
        float  #: mean exp(recomputed − reported), of at most e^600: 1 where they agree, about .9 under a nucleus of .9
    )


def sampler_mismatch(scores: TokenScores, rollouts: Rollouts) -> SamplerMismatch | None:
    """Return the mismatch over completion tokens; None where the rollouts carry no `sampling_logps`."""
    if rollouts.sampling_logps is None:
        return None
    mask = rollouts.completion_mask.to(scores.logp.device)
    off = (scores.logp - rollouts.sampling_logps.to(scores.logp.device))[mask]
    return SamplerMismatch(float(off.abs().mean()), float(off.clamp(max=LARGEST_REPORTED).exp().mean()))


def pareto_khat(log_weights: Tensor) -> float | None:
    """Return the Pareto k̂ of the upper tail of `exp(log_weights)`, by arviz-stats.

    Below .7 the sample carries the estimate (Vehtari et al., arXiv 1507.02646). None where fewer than 25 rows, no
    spread, a log-weight that is not finite, or a tail that the library cannot fit (all of it one value, as when a
    policy repeats itself) leave nothing to say: a diagnostic is never what ends a measurement.
    """
    values = log_weights.detach().cpu().double().numpy()
    if values.size < FEWEST_FOR_KHAT or not np.isfinite(values).all() or values.max() == values.min():
        return None
    from arviz_stats.base import array_stats

    silent = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with warnings.catch_warnings(), silent[0], silent[1], np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the number itself says what the warning would
        try:
            _, khat = array_stats.psislw(-values)  # psislw wants the negated log-weights
        except Exception:
            return None
    return float(khat) if np.isfinite(khat) else None


def _normalised(exponent: Tensor, a: Tensor) -> Tensor:
    """Return `a exp(exponent)` normalised over rows; the shift that guards exp is constant and cancels."""
    shift = torch.where(a > 0, exponent, -torch.inf).detach().amax(0, keepdim=True)
    w = a * torch.exp((exponent - shift).clamp(max=0.0))  # the clamp only touches rows of weight 0
    return w / w.sum(0, keepdim=True)
