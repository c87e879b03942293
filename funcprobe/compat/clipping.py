"""Truncated importance weights for any observable: what a sequence's weight has above a bound is taken back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcprobe.estimators.importance import log_ratios
from funcprobe.types import Observable, Proposal, Rollouts, Statistic, TokenScores, Weighting


@dataclass(frozen=True)
class Clipped:
    """An observable under sequence weights `w_i ∝ a_i min(exp(Σ_t d_it), c)`, c > 1.

    Estimand: that of the observable. Bias: truncation adds one where weights exceed c, for less variance (Ionides
    2008). At the anchor every weight is 1 and nothing is clipped, so value and derivative there are the observable's.
    """

    observable: Observable  #: under sequence weights
    c: float  #: the largest weight, where that of an unmoved sequence is 1
    proposal: ClassVar[Proposal] = "anchor"
    inclusive: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Return the observable's name and the bound."""
        return f"{self.observable.name}/clip {self.c:g}"

    @property
    def unit(self) -> str:
        """Return the observable's unit."""
        return self.observable.unit

    @property
    def weighting(self) -> Weighting:
        """Return 'sequence'."""
        return "sequence"

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """Return what the observable needs."""
        return self.observable.stats

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the estimate: the base weight of a row takes back what its importance weight has above c."""
        log_weight = log_ratios(scores, anchor, rollouts).sum(-1)
        excess = torch.relu(log_weight - math.log(self.c))
        return self.observable(scores, anchor, rollouts._replace(weight=rollouts.weight * torch.exp(-excess)))
