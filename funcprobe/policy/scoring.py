"""Scores of a batch: log-probability, entropy and named statistics of every completion token.

`features` runs the model once; only the positions that predict a completion token go on to `readout`. Logits are
scaled by the row's temperature; entries of the softmax are float32 or wider, its sums and all that follows float64.

Logits are made chunk by chunk, so that `[B, T, V]` never exists. A backward pass would keep every chunk alive: with
`rematerialise=True` logits beyond `LOGITS_BUDGET` entries are made again in it instead, for one more readout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcprobe.arguments import checked
from funcprobe.data.rollouts import to_device
from funcprobe.errors import InputError
from funcprobe.policy.module import Policy
from funcprobe.policy.refusals import refuse_autocast
from funcprobe.types import Params, Rollouts, Statistic, TokenScores

#: The most logits that a reverse pass keeps, in entries: 128 MiB in float32, a few such arrays at the peak.
LOGITS_BUDGET = 2**25

#: The most logits that exist at once where nothing is kept (values, forward mode), in entries, and the least number of
#: tokens in such a chunk: 8 MiB stay near the cache, and 128 rows keep the product with the head efficient.
CHUNK_ENTRIES, CHUNK_TOKENS = 2**21, 128

#: Nats by which an entry is taken to lie below the largest where a model bans it, by −inf or by the least number of a
#: dtype: its probability is 0 in every dtype, and the third power of this is still a float32.
IMPOSSIBLE = -1e9


@checked
def score(
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    stats: Mapping[str, Statistic] | None = None,
    *,
    rematerialise: bool = False,
    constant_entropy: bool = False,
) -> TokenScores:
    """Return the scores `[B, T]` of every completion token, in nats, float64; 0 where the completion mask is 0.

    For the token y drawn at a position with logits z and temperature τ: `logp = log softmax(z/τ)[y]` and
    `entropy = −Σ_v p_v log p_v` with `p = softmax(z/τ)`. `stats` maps names to functions
    `(log_probs [n, V], token [n]) -> [n]`, whose values come back in `extra`; an entry of probability 0 stands in
    `log_probs` near `IMPOSSIBLE` and not as −inf, so that products with its probability, and their derivatives, are 0.
    A token drawn of probability 0 has logp −inf. Differentiable in `params` under `torch.func` transforms and their
    compositions; with `rematerialise`, under one reverse pass and vmap of values. `constant_entropy` leaves the entropy
    out of the graph, which saves time where its cotangent is known to be zero.

    Raises:
        InputError: If `params` does not hold exactly the policy's leaves, or an id is outside the vocabulary; or if
            autocast is on around the call.
    """
    refuse_autocast(policy.device)
    rollouts = to_device(rollouts, policy.device)
    _check(policy, params, rollouts)
    stats = stats or {}
    ids = rollouts.ids.masked_fill(
        ~rollouts.attention_mask, 0
    )  # whatever stands in padded columns, it is not looked at
    hidden = policy.features(params, ids, rollouts.attention_mask)
    row, position = rollouts.completion_mask.nonzero(as_tuple=True)
    column = rollouts.prompt_lengths[row] + position
    leaves = tuple(policy.readout_leaves(params).values())

    def fields(hidden: Tensor, token: Tensor, temperature: Tensor, *leaves: Tensor) -> Tensor:
        known = dict(zip(policy.readout_names, leaves, strict=True))
        return _fields(policy.readout(known, hidden), token, temperature, stats, constant_entropy)

    inputs = (hidden[row, column - 1], rollouts.ids[row, column], rollouts.temperature[row], *leaves)
    values = _by_chunks(fields, policy.vocab_size, rematerialise, inputs)
    return _scatter(values, rollouts.completion_mask, tuple(stats))


def _fields(
    logits: Tensor,
    token: Tensor,
    temperature: Tensor,
    stats: Mapping[str, Statistic],
    constant_entropy: bool = False,
) -> Tensor:
    """Return `[n, 2 + len(stats)]` float64: logp, entropy and the named statistics.

    With `z = logits/τ − max`, `Z = Σ e^z` and `S = Σ z e^z`: `logp = z_y − log Z` and `entropy = log Z − S/Z`. Only the
    entries and sums of up to 64 of them are float32; all that follows is float64. A float32 log-softmax would round
    `log Z` once for the whole distribution, an error that no sum averages out. An entry that a model bans with −inf is
    one of weight 0 and of finite z: `0 · (−inf)` is NaN in the sum, and in its derivatives though 0 were put there.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    del logits  # one array of V entries a token less at the peak
    z = z / temperature.to(z.dtype).unsqueeze(-1)
    z = _bounded(z.sub_(_held(z).amax(-1, keepdim=True)))  # the shift cancels
    weight = z.exp()
    total = _sum(weight)
    log_total = total.log()
    drawn = z.gather(-1, token.unsqueeze(-1)).squeeze(-1).double()
    logp = torch.where(drawn <= IMPOSSIBLE, -torch.inf, drawn - log_total)
    parts = (log_total, weight, z, total)
    log_sum, w, x, norm = (_held(p) for p in parts) if constant_entropy else parts
    entropy = log_sum - _sum(w * x) / norm
    if not stats:
        return torch.stack([logp, entropy], dim=-1)
    log_probs = z - log_total.to(z.dtype).unsqueeze(-1)
    extra = [statistic(log_probs, token).double() for statistic in stats.values()]
    return torch.stack([logp, entropy, *extra], dim=-1)


def _held(x: Tensor) -> Tensor:
    """Return x without its derivatives, also where values detached by a *module* have some (`engine.kernels`)."""
    held: Tensor = torch.ops.aten.detach(x)
    return held


def _bounded(z: Tensor) -> Tensor:
    """Return the shifted logits with every entry below `IMPOSSIBLE` at it, a constant; most batches have none.

    Looking for one reads the array once and keeps nothing. Values that `vmap` batches cannot be looked at from Python,
    and the bound is then laid on without a look.
    """
    below = (_held(z).amin(-1) < IMPOSSIBLE).any()
    try:
        banned = bool(below)
    except RuntimeError:
        banned = True
    return z.masked_fill(z < IMPOSSIBLE, IMPOSSIBLE) if banned else z


def _sum(x: Tensor) -> Tensor:
    """Return `Σ_v x[n, v]` in float64, over runs of 64 entries that are summed in their own dtype.

    A run's rounding is of the size of its entries' own, and averages out over runs as theirs does over entries; a sum
    of all in float64 would first widen a copy of them, which took 3 % of a training step.
    """
    runs = x.unflatten(-1, (-1, math.gcd(x.shape[-1], 64))).sum(-1)
    return runs.sum(-1, dtype=torch.float64)


def _scatter(values: Tensor, mask: Tensor, names: tuple[str, ...]) -> TokenScores:
    """Lay n rows of fields out as `[B, T]`, 0 elsewhere; a gather, so that it traces under every transform."""
    place = torch.full(mask.shape, values.shape[0], device=mask.device)
    place[mask] = torch.arange(values.shape[0], device=mask.device)
    laid_out = torch.cat([values, values.new_zeros(1, values.shape[1])])[place]
    logp, entropy, *extra = laid_out.unbind(-1)
    return TokenScores(logp, entropy, dict(zip(names, extra, strict=True)))


def _by_chunks(
    fields: Callable[..., Tensor], vocab_size: int, rematerialise: bool, inputs: tuple[Tensor, ...]
) -> Tensor:
    kept = max(1, LOGITS_BUDGET // vocab_size)
    if rematerialise:  # few large chunks: each adds a gradient of the head's size
        return fields(*inputs) if len(inputs[0]) <= kept else _Rematerialised.apply(fields, kept, *inputs)
    return _concatenated(fields, min(kept, max(CHUNK_TOKENS, CHUNK_ENTRIES // vocab_size)), *inputs)


def _concatenated(
    fields: Callable[..., Tensor], chunk: int, hidden: Tensor, token: Tensor, temperature: Tensor, *leaves: Tensor
) -> Tensor:
    pieces = zip(hidden.split(chunk), token.split(chunk), temperature.split(chunk), strict=True)
    return torch.cat([fields(h, y, tau, *leaves) for h, y, tau in pieces])


class _Rematerialised(torch.autograd.Function):
    """`fields` over chunks of tokens, keeping its inputs alone: the backward pass runs each chunk again."""

    @staticmethod
    def forward(fields: Callable[..., Tensor], chunk: int, *inputs: Tensor) -> Tensor:
        return _concatenated(fields, chunk, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.fields, ctx.chunk, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        hidden, token, temperature, *leaves = ctx.saved_tensors
        by_hidden: list[Tensor] = []
        by_leaf: list[Tensor] = []
        pieces = (x.split(ctx.chunk) for x in (hidden, token, temperature, cotangents[0]))
        for h, y, tau, c in zip(*pieces, strict=True):
            inputs = [x.detach().requires_grad_() for x in (h, *leaves)]
            with torch.enable_grad():
                made = ctx.fields(inputs[0], y, tau, *inputs[1:])
            of_hidden, *of_leaves = torch.autograd.grad(made, inputs, c, materialize_grads=True, allow_unused=True)
            by_hidden.append(of_hidden)
            by_leaf = [a + b for a, b in zip(by_leaf, of_leaves, strict=True)] if by_leaf else of_leaves
        return None, None, torch.cat(by_hidden), None, None, *by_leaf


def _check(policy: Policy, params: Params, rollouts: Rollouts) -> None:
    if params.keys() != set(policy.names):
        missing = [name for name in policy.names if name not in params][:3]
        unexpected = [name for name in params if name not in policy.names][:3]
        raise InputError(
            f"The parameters are not this policy's: missing {missing or 'none'}, unexpected {unexpected or 'none'}; "
            "pass the tree that from_module or load_checkpoint returned, or one with its keys."
        )
    if policy.max_length is not None and rollouts.ids.shape[1] > policy.max_length:
        raise InputError(
            f"A sequence of {rollouts.ids.shape[1]} tokens is longer than the model's {policy.max_length} positions; "
            "drop such rows or load the model with more positions."
        )
    real = rollouts.ids[rollouts.attention_mask]
    if real.numel() and (int(real.max()) >= policy.vocab_size or int(real.min()) < 0):
        raise InputError(
            f"Token id {int(real.max() if int(real.min()) >= 0 else real.min())} is outside the vocabulary of "
            f"{policy.vocab_size} entries; the rollouts come from another tokenizer or model."
        )
