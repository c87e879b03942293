"""The stateful system's importance weights: truncated ones, and the health of those that were used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from funcprobe.estimators.importance import effective_sample_size, log_ratios
from funcprobe.estimators.observables import Entropy
from funcprobe.results.probe import ProbeResult
from funcprobe.types import Rollouts, TokenScores


@dataclass(frozen=True)
class Clipped(Entropy):
    """An entropy under sequence weights `w_i ∝ a_i min(exp(Σ_t d_it), c)`, c > 1.

    Bias: truncation adds one where weights exceed c, for less variance (Ionides 2008). At the anchor every
    importance weight is 1 and nothing is clipped, so value and derivative there are the entropy's.
    """

    c: float = math.inf  #: the largest weight, where that of an unmoved sequence is 1

    @property
    def name(self) -> str:
        """The entropy's name and the bound."""
        return f"{super().name}/clip {self.c:g}"

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the estimate: the base weight of a row takes back the excess of its importance weight over c."""
        excess = torch.relu(log_ratios(scores, anchor, rollouts).sum(-1) - math.log(self.c))
        return super().__call__(scores, anchor, rollouts._replace(weight=rollouts.weight * torch.exp(-excess)))


def weight_diagnostics(found: ProbeResult, largest: float) -> dict[str, float | int]:
    """Return the health of the importance weights of sequences, cut at `largest`, of a probe with keep_scores.

    `logw_*` are those before the cut, `w_*` and the ESS those after it, in units of the largest; base weights
    are not in them.
    """
    assert found.evidence is not None
    rollouts, anchor, after, _ = found.evidence
    log_weight = log_ratios(after, anchor, rollouts).sum(-1)
    used = log_weight.clamp(max=math.log(largest))
    w = torch.exp(used - used.max())
    ess = float(effective_sample_size(w))
    return {
        "ESS": ess,
        "ESS_fraction": ess / len(w),
        "N_total": len(w),
        "logw_max_global": float(log_weight.max()),
        "logw_mean": float(log_weight.mean()),
        "logw_std": float(log_weight.std(correction=0)),
        "w_max": float(w.max()),
        "w_min": float(w.min()),
        "w_sum_global": float(w.sum()),
    }
