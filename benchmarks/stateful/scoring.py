"""Log-probabilities and entropies of completion tokens, from a live module.

Rows are right-padded and attention is causal: no real token sees a padded one, so the module needs no attention mask.
The softmax is taken in float32 or wider, at completion positions only; what is kept of it is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcprobe.data.rollouts import microbatches, take
from funcprobe.types import Microbatch, Rollouts


class Scores(NamedTuple):
    """Scores of a whole batch, `[B, T]` float64, 0 where the completion mask is 0."""

    logp: Tensor  #: log-probability of the token, nats
    entropy: Tensor  #: entropy of the distribution it was drawn from, nats


def scores(module: nn.Module, rollouts: Rollouts, microbatch: Microbatch) -> Scores:
    """Return the scores of a batch without a graph, one forward pass a microbatch."""
    logp = torch.zeros(rollouts.completion_mask.shape, dtype=torch.float64, device=rollouts.ids.device)
    entropy = torch.zeros_like(logp)
    with torch.no_grad():
        for rows, part in pieces(rollouts, microbatch):
            log_probs = token_log_probs(module, part)
            logp[rows] = spread(token_logp(log_probs, part), part, logp.shape[1])
            entropy[rows] = spread(token_entropy(log_probs), part, logp.shape[1])
    return Scores(logp, entropy)


def token_log_probs(module: nn.Module, part: Rollouts) -> Tensor:
    """Return `log softmax(z/τ)` `[n, V]` at the n completion tokens of a microbatch, in the order of its mask."""
    row, position = part.completion_mask.nonzero(as_tuple=True)
    column = part.prompt_lengths[row] + position - 1  # the logits of one column are about the token in the next
    ids = part.ids.masked_fill(~part.attention_mask, 0)  # padding may hold any number
    find_head = getattr(module, "get_output_embeddings", None)
    if find_head is None:
        logits = module(ids)
    else:
        with _reading(find_head(), row, column):
            logits = module(input_ids=ids, use_cache=False).logits
    if logits.ndim == 3:  # a module without such a head returns all of them
        logits = logits[row, column]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(z / part.temperature[row, None].to(z.dtype), dim=-1)


def token_logp(log_probs: Tensor, part: Rollouts) -> Tensor:
    """Return the log-probability of the n completion tokens, `[n]` float64."""
    row, position = part.completion_mask.nonzero(as_tuple=True)
    token = part.ids[row, part.prompt_lengths[row] + position]
    return log_probs.gather(-1, token[:, None]).squeeze(-1).double()


def token_entropy(log_probs: Tensor) -> Tensor:
    """Return `−Σ_v p_v log p_v` of the n distributions, `[n]` float64."""
    return -(log_probs.exp() * log_probs).sum(-1).double()


def pieces(rollouts: Rollouts, microbatch: Microbatch) -> Iterator[tuple[Tensor, Rollouts]]:
    """Yield (row indices, their rollouts) of every microbatch."""
    for rows in microbatches(rollouts, microbatch):
        yield rows, take(rollouts, rows)


def spread(values: Tensor, part: Rollouts, width: int) -> Tensor:
    """Lay the values `[n]` of a microbatch's completion tokens out as `[b, width]`, 0 elsewhere."""
    laid_out = values.new_zeros(len(part.ids), width)
    laid_out[:, : part.completion_mask.shape[1]][part.completion_mask] = values
    return laid_out


def gathered(values: Tensor, rows: Tensor, part: Rollouts) -> Tensor:
    """Return the entries `[n]` of a batch's `[B, T]` that belong to the completion tokens of one microbatch."""
    return values[rows, : part.completion_mask.shape[1]][part.completion_mask]


@contextmanager
def _reading(head: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Let the head read the hidden states of the given positions alone, so that no other logits are ever made."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][row, column],))
    try:
        yield
    finally:
        hook.remove()
