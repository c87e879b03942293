"""Modifiers that pick tokens by their rank in the whole batch: by covariance, or by entropy.

A pick depends on the scores of all tokens, so an objective with one of these is not separable: the engine scores the
batch once, without gradients, before it takes the gradient. Picks carry no gradient. What is picked from is the
completion tokens of rows whose base weight is above 0, each once: a row of weight 0 is as good as absent, and other
weights weigh the loss only. verl picks within each micro-batch of a device instead, where a share of 2e-4 is one token
of every micro-batch of fewer than 10,000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.objectives.checks import check_number, check_seed
from funcprobe.objectives.modifiers import Change, Modifier, TokenTerms
from funcprobe.types import Rollouts


@dataclass(frozen=True)
class ClipCov(Modifier):
    """Clip-Cov: a random few of the tokens with a large covariance do not train. arXiv 2505.22617.

    Candidates have `clip_cov_lb < cov < clip_cov_ub` and are not held by the clip range; `max(1, ⌊clip_cov_ratio · n⌋)`
    of them (all, where there are fewer) are drawn without replacement, n the number of counted tokens.
    """

    name = "clip_cov"
    separable = False

    clip_cov_ratio: float = 2e-4  #: share of the tokens that is drawn
    clip_cov_lb: float = 1.0  #: lower bound of a candidate's covariance
    clip_cov_ub: float = 5.0  #: upper bound of a candidate's covariance
    seed: int = 0  #: of the draw

    def __post_init__(self) -> None:
        _check_ratio("clip_cov_ratio", self.clip_cov_ratio)
        for option in ("clip_cov_lb", "clip_cov_ub"):
            check_number(option, getattr(self, option), "a finite number", lambda x: True)
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise InputError(
                f"clip_cov_lb is {self.clip_cov_lb} and clip_cov_ub is {self.clip_cov_ub}; the lower bound must be "
                "below the upper one."
            )
        check_seed("seed", self.seed)

    def __call__(self, terms: TokenTerms) -> Change:
        """Return the factor that is 0 on the drawn tokens and 1 elsewhere."""
        cov = covariance(terms)
        candidate = (cov > self.clip_cov_lb) & (cov < self.clip_cov_ub) & terms.counted & ~terms.clipped
        tickets = _tickets(terms.counted, self.seed)
        chosen = _largest(-tickets, candidate, _share(self.clip_cov_ratio, terms.counted))
        return Change(keep=(~chosen).to(terms.logp.dtype), chosen=chosen)


@dataclass(frozen=True)
class KlCov(Modifier):
    """KL-Cov: the tokens with the largest covariance pay `ppo_kl_coef · |log π − log π_old|`. arXiv 2505.22617.

    `max(1, ⌊kl_cov_ratio · n⌋)` tokens, n the number of counted tokens; of equal ones those of earlier rows.
    """

    name = "kl_cov"
    separable = False
    adds = "the penalty of kl_cov"

    kl_cov_ratio: float = 2e-4  #: share of the tokens that pays
    ppo_kl_coef: float = 1.0  #: per nat

    def __post_init__(self) -> None:
        _check_ratio("kl_cov_ratio", self.kl_cov_ratio)
        check_number("ppo_kl_coef", self.ppo_kl_coef, "a number at or above 0", lambda x: x >= 0)

    def __call__(self, terms: TokenTerms) -> Change:
        """Return the penalty on the tokens with the largest covariance, with its gradient."""
        chosen = _largest(covariance(terms), terms.counted, _share(self.kl_cov_ratio, terms.counted))
        return Change(penalty=self.ppo_kl_coef * torch.where(chosen, terms.log_ratio.abs(), 0.0), chosen=chosen)

    def caution(self, rollouts: Rollouts) -> str | None:
        """Say that the penalty has no gradient, where the step is the first one on its rollouts."""
        if rollouts.old_logps is not None:
            return None
        return (
            "The rollouts have no old_logps, so log π − log π_old is 0 on every token and the gradient of its absolute "
            "value too: kl_cov changes nothing in a first step. Give the old_logps of an earlier policy to see it act."
        )


@dataclass(frozen=True)
class TopEntropyQuantile(Modifier):
    """Only the tokens of the highest entropy train: `H_t ≥ the (1 − top_entropy_quantile) quantile`. arXiv 2506.01939.

    The quantile of n values interpolates at `q (n − 1)`, and no value lies between its two neighbours, so the tokens at
    or above it are those at or above the value of rank `⌈q (n − 1)⌉`. Ties with it train: equal entropies share a fate.
    """

    name = "top_entropy_quantile"
    separable = False

    top_entropy_quantile: float = 0.2  #: share ρ of the tokens that trains; 1 is all, 0 the highest only

    def __post_init__(self) -> None:
        check_number("top_entropy_quantile", self.top_entropy_quantile, "a number from 0 to 1", lambda x: 0 <= x <= 1)

    def __call__(self, terms: TokenTerms) -> Change:
        """Return the factor that is 1 on the tokens at or above the quantile and 0 elsewhere."""
        entropy = terms.entropy.detach()
        last = max(int(terms.counted.sum()) - 1, 0)
        rank = math.ceil((1 - _exactly(self.top_entropy_quantile)) * last)
        threshold = torch.where(terms.counted, entropy, torch.inf).flatten().kthvalue(rank + 1).values
        low = (entropy < threshold) & terms.counted
        return Change(keep=(~low).to(terms.logp.dtype), chosen=low)


def covariance(terms: TokenTerms) -> Tensor:
    """Return `(log π − mean log π)(A − mean A)` `[B, T]`, nats; means over the counted tokens, without gradient.

    Its mean is the covariance of log-probability and advantage that drives the entropy down. arXiv 2505.22617. Where
    all advantages are equal it is exactly 0, and not the rounding of a mean.
    """
    tokens = terms.counted.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        above = x - torch.where(terms.counted, x, torch.inf).min()
        return above - torch.where(terms.counted, above, 0.0).sum() / tokens

    return centred(terms.logp.detach()) * centred(terms.advantage.detach())


def _tickets(counted: Tensor, seed: int) -> Tensor:
    """Return a uniform number for every token `[B, T]`; the k-th counted token, row by row, always gets the same.

    They are drawn on the CPU, from a generator of their own, and know neither scores nor padding nor rows that do not
    count. So rounding moves no other token's ticket; in another order of rows the draw is another one.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(max(int(counted.sum()), 1), generator=generator, dtype=torch.float64).to(counted.device)
    place = counted.flatten().cumsum(0).clamp(min=1) - 1
    return drawn[place].view_as(counted)


def _largest(values: Tensor, among: Tensor, number: int) -> Tensor:
    """Return where the `number` largest values `[B, T]` stand, among those allowed; of equal ones the first."""
    order = torch.where(among, values, -torch.inf).flatten().argsort(descending=True, stable=True)
    taken = torch.zeros_like(among.flatten()).scatter(0, order[:number], True)
    return taken.view_as(among) & among


def _share(ratio: float, counted: Tensor) -> int:
    return max(1, math.floor(_exactly(ratio) * int(counted.sum())))


def _exactly(decimal: float) -> Fraction:
    """Return the number as it is written: 0.29 of 100 tokens are 29, which floats would round to 28."""
    return Fraction(str(decimal))


def _check_ratio(option: str, value: float) -> None:
    check_number(option, value, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
