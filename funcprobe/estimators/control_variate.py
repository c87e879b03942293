"""A control variate from the other rollouts of a prompt: their mean at the anchor is the expectation of this one.

Importance sampling over several prompts pays for the spread *between* prompts, of which a step changes little: part of
what a rollout gives is its prompt's, and the prompt's other rollouts say how much. Subtracting it leaves the spread
within prompts. But a few rollouts know their mean only so well: where prompts hardly differ, that uncertainty is added
for nothing. With 8 rollouts a prompt, benchmarks/variance.py measured errors of .49 times those without it where
rewards differed much between prompts, and of .96 to 1.06 times elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.types import Rollouts


def controlled_sum(w: Tensor, terms: Tensor, at_anchor: Tensor, rollouts: Rollouts) -> Tensor:
    """Return `Σ_i w_i (x_i − b₋ᵢ) + Σ_i ā_i b₋ᵢ`, summed over positions too, with b₋ᵢ held constant.

    `w` are weights that sum to 1 over rows, at every position (`[B, T]`) or for whole sequences (`[B, 1]`); `terms` the
    x at the scores and `at_anchor` those at the anchor, `[B, T]`; ā the base weights, normalised; b₋ᵢ `leave_one_out`
    of `at_anchor`.

    Estimand: that of `Σ w x`, since b₋ᵢ does not depend on rollout i once its prompt is given and importance ratios
    have mean 1. Bias: O(1/N) from self-normalisation; the part of the first order that goes through the weights, which
    `Σ w x` makes smaller by the factor 1 − 1/N, is unbiased here wherever a prompt's rollouts have equal weights. At
    the anchor itself the value is that of `Σ w x`.

    Raises:
        InputError: If a prompt has a single rollout.
    """
    b = leave_one_out(at_anchor, rollouts).detach()
    a = rollouts.weight / rollouts.weight.sum()
    return (w * (terms - b)).sum() + (a.unsqueeze(-1) * b).sum()


def leave_one_out(x: Tensor, rollouts: Rollouts) -> Tensor:
    """Return `b₋ᵢ [B, T]`, the mean of `x [B, T]` over the *other* rollouts of row i's prompt, by base weight.

    A prompt's weights may all be multiplied by one number, 0 included: its b₋ᵢ stays what it was, or 0 where no other
    rollout has a weight. Nothing here looks at weights from Python, so `vmap` over them works.

    Raises:
        InputError: If a prompt has a single rollout.

    Example:
        >>> from funcprobe.data.rollouts import rollouts_from_lists
        >>> pairs = rollouts_from_lists([[1], [1], [2], [2]], [[3]] * 4, temperature=1.0)
        >>> leave_one_out(torch.tensor([[1.0], [2.0], [5.0], [7.0]]), pairs).squeeze(1).tolist()
        [2.0, 1.0, 7.0, 5.0]
    """
    prompt, count = _prompts(rollouts)
    a = rollouts.weight.unsqueeze(-1)
    sums, weights = (_per_prompt(v, prompt, count) for v in (a * x, a))
    rest = weights - a  # not below 0 in floating point either: adding what is not negative never makes a sum smaller
    return torch.where(rest > 0, (sums - a * x) / torch.where(rest > 0, rest, 1.0), 0.0)


def _prompts(rollouts: Rollouts) -> tuple[Tensor, int]:
    """Return every row's prompt, numbered from 0, and how many prompts there are.

    Raises:
        InputError: If a prompt has a single rollout.
    """
    found, prompt, rows = rollouts.group_ids.unique(return_inverse=True, return_counts=True)
    if alone := found[rows == 1].tolist():
        raise InputError(
            f"A control variate compares the rollouts of one prompt, and {len(alone)} of {len(found)} prompts have a "
            f"single one (group {alone[0]}); draw at least two completions a prompt or leave control_variate out."
        )
    return prompt, len(found)


def _per_prompt(values: Tensor, prompt: Tensor, count: int) -> Tensor:
    """Return for every row the sum of `values [B, T]` over the rows of its prompt."""
    return values.new_zeros(count, values.shape[1]).index_add(0, prompt, values)[prompt]
