"""The contribution of every completion token of a batch to a derivative: cotangents ⊙ tangents of its scores.

For E the tangents run along Δθ and the parts sum to δF₁ (or the part of it that one asks about); for U they run along
∇F carried back through the step, and the parts sum to what the gradient on U did. No part is ever made by subtraction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.data.rollouts import to_device
from funcprobe.errors import NumericsError, listed
from funcprobe.types import Rollouts, TokenScores


class TokenParts(NamedTuple):
    """The contributions of the tokens of one batch, on the CPU in float64."""

    rollouts: Rollouts  #: the batch, with the advantages that were used where an objective made them
    scores: TokenScores  #: [B, T] at θ
    through: dict[
        str, Tensor
    ]  #: [B, T] by field of the scores: "logp" (other states visited), "entropy" (its own), ...
    predictors: Mapping[str, Tensor] = {}  #: [B, T] published predictors of the same tokens, by name

    @property
    def total(self) -> Tensor:
        """The contribution of every token, all fields together, `[B, T]`."""
        return torch.stack(list(self.through.values())).sum(0)

    @property
    def mask(self) -> Tensor:
        """Where there is a completion token, `[B, T]`."""
        return self.rollouts.completion_mask

    def sum(self) -> float:
        """Return the sum over all tokens."""
        return float(self.total.sum())

    def magnitude(self) -> float:
        """Return Σ|parts| over tokens and fields."""
        return float(torch.stack(list(self.through.values())).abs().sum())


def token_parts(
    cotangents: TokenScores,
    along: engine.Directional,
    rollouts: Rollouts,
    which: str,
    predictors: Mapping[str, Tensor] | None = None,
) -> TokenParts:
    """Return `c ⊙ ṡ` token by token and field by field; fields other than logp that have no cotangent are left out.

    Raises:
        NumericsError: If a part is not finite; the message names the batch (`which`) and its sequences.
    """
    parts = engine.each(torch.mul, cotangents, along.tangents)
    found = {"entropy": (cotangents.entropy, parts.entropy)}
    found |= {name: (cotangents.extra[name], x) for name, x in parts.extra.items()}
    through = {"logp": _portable(parts.logp)}
    through |= {name: _portable(x) for name, (c, x) in found.items() if bool(c.any())}
    bad = (~torch.isfinite(torch.stack(list(through.values())))).any(0).any(1).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            f"The contributions of {which} sequence {listed(bad)} are not finite; check the weights of the model and "
            "the optimizer state, or load the model in a wider dtype."
        )
    scores = engine.each(_portable, along.scores)
    beside = {name: _portable(x) for name, x in (predictors or {}).items()}
    return TokenParts(to_device(rollouts, "cpu"), scores, through, beside)


def _portable(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)
