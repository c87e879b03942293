"""Activation differences: how far a step moves the hidden state that every token is drawn from.

    d_bt = ‖h(θ′)_bt − h(θ)_bt‖₂

It is what model diffing looks at (Minder et al., arXiv 2510.13900), there as a mean over tokens of unrelated text and
here by token. It knows how much a context changed, and neither which token changed it nor in which direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcprobe.engine.batches import gather, of_rows, pieces
from funcprobe.parallel.phases import phase
from funcprobe.policy.module import Policy
from funcprobe.types import Microbatch, Params, Rollouts, TokenScores


def activation_differences(
    policy: Policy, params: Params, after: Params, rollouts: Rollouts, microbatch: Microbatch = None
) -> Tensor:
    """Return the distance `[B, T]` between the hidden states at θ and θ′, float64; 0 where the completion mask is 0.

    The state is the one that predicts the token: the last that the model's head reads, or the logits of a model that
    cannot be cut at its head. Two passes over the rollouts, and no derivative. States of their own dtype are
    subtracted, so what lies below its rounding is rounding.
    """
    with torch.no_grad(), phase("activation differences"):
        found = [
            (rows, of_rows(_distances(policy, params, after, part), rows))
            for rows, part in pieces(policy, rollouts, microbatch)
        ]
        return gather(found, rollouts).logp


def _distances(policy: Policy, params: Params, after: Params, part: Rollouts) -> TokenScores:
    """Return the distances in the place of scores, as which they are gathered."""
    row, position = part.completion_mask.nonzero(as_tuple=True)
    column = part.prompt_lengths[row] + position - 1
    ids = part.ids.masked_fill(~part.attention_mask, 0)
    before, moved = (policy.features(at, ids, part.attention_mask)[row, column].double() for at in (params, after))
    distance = torch.zeros(part.completion_mask.shape, dtype=torch.float64, device=part.ids.device)
    distance[row, position] = (moved - before).norm(dim=-1)
    return TokenScores(distance, distance, {})
