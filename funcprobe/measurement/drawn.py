"""How a batch was drawn, as far as its columns and its scores at θ tell; no model is run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from funcprobe.estimators.importance import effective_sample_size, sampler_mismatch, sequence_weights
from funcprobe.measurement.cautions import is_truncated
from funcprobe.types import Rollouts, TokenScores


class Drawn(NamedTuple):
    """The sampler of a batch, and the tokens that the policy chose among those of its completions."""

    temperatures: tuple[float, float]  #: the least and the largest
    steps: tuple[int, int] | None  #: the first and the last training step that rows were drawn at
    truncated: bool  #: whether top_p or top_k held the sampler back
    gap: float | None  #: mean |log π − sampler's|, nats per token; None without sampling_logps, or scores
    tokens: int  #: that the policy chose
    holes: int  #: of the completions that it did not choose


class Ratios(NamedTuple):
    """The importance ratios r = π/π_old of a batch at θ, over the tokens that the policy chose."""

    mean: float  #: mean |log r|, nats per token
    largest: float  #: the largest r of a token
    ess: float  #: effective sample of Π r over rows, as a share of the rows


def drawn_of(rollouts: Rollouts, scores: TokenScores | None) -> Drawn:
    """Return how a batch was drawn; `scores` are those of θ on it, where they are known."""
    mismatch = None if scores is None else sampler_mismatch(scores, rollouts)
    tokens = int(rollouts.completion_mask.sum())
    real = int(rollouts.attention_mask.sum() - rollouts.prompt_lengths.sum())
    steps, temperature = rollouts.step, rollouts.temperature
    return Drawn(
        temperatures=(float(temperature.min()), float(temperature.max())),
        steps=None if steps is None else (int(steps.min()), int(steps.max())),
        truncated=is_truncated(rollouts),
        gap=None if mismatch is None else mismatch.gap,
        tokens=tokens,
        holes=real - tokens,
    )


def ratios_of(rollouts: Rollouts, scores: TokenScores) -> Ratios | None:
    """Return the ratios of a batch; None where it has no old log-probabilities, and every ratio is 1."""
    if rollouts.old_logps is None:
        return None
    logp = scores.logp.detach().cpu().double()
    mask = rollouts.completion_mask.cpu()
    d = torch.where(mask, logp - rollouts.old_logps.cpu(), 0.0)
    a = rollouts.weight.cpu()
    base = effective_sample_size(a)
    share = effective_sample_size(sequence_weights(d, a)) / base
    return Ratios(float(d[mask].abs().mean()), float(d[mask].max().exp()), float(share))
