"""Scaled-dot-product attention with a forward derivative of its own: a fused pass, then tangents by blocks.

With `S = c QKᵀ + M`, `ℓ = logsumexp S` by rows and `P = exp(S − ℓ)`, attention is `O = P V` and its tangent

    Ȯ = (P∘Ṡ) V − rowsum(P∘Ṡ) ∘ O + P V̇,    Ṡ = c (Q̇Kᵀ + QK̇ᵀ) + Ṁ.

A fused kernel gives O and ℓ without making S. Given ℓ, a block of P needs no other block of its rows, so tangents never
hold more than one block, and blocks in which nothing is seen are left out. The rule holds once: torch 2.13 does not
differentiate a custom function's `jvp` again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe.engine.attention_blocks import Block, Chunk, blocks_of, chunks_of

#: Queries and keys in a block, and entries of the attention matrices that are made at once: on a processor what stays
#: in its cache, on an accelerator what keeps it busy.
BLOCKS = {"cpu": (128, 512, 2**17), "cuda": (1024, 1024, 2**25)}

#: The most that a mask may add to all that a query sees: as large as scores are, which ℓ carries anyway.
LARGEST_BIAS = 64.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return scaled-dot-product attention, differentiable forward once; None where the rule does not hold.

    It does not hold with dropout, nor for shapes that broadcast, nor where a mask adds large numbers to all that a
    query sees: scores, and ℓ with them, are rounded to what such a sum keeps.
    """
    (query, key, value, attn_mask), plain = as_autocast(query, key, value, attn_mask)
    with plain:
        if dropout_p > 0 or not _fits(query, key, value, attn_mask, is_causal, enable_gqa):
            return None
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
            highest = attn_mask.detach().amax(-1)
            if bool(((highest.abs() > LARGEST_BIAS) & (highest > -math.inf)).any()):
                return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        shape = query.shape[:-1] + value.shape[-1:]
        if attn_mask is not None:
            if query.dim() > 4:
                attn_mask = attn_mask.expand(*query.shape[:-2], query.shape[-2], key.shape[-2])
            attn_mask = _four(attn_mask)
        out, _ = _Attention.apply(_four(query), _four(key), _four(value), attn_mask, is_causal, scale)
        return out.reshape(shape)


def as_autocast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], AbstractContextManager[Any]]:
    """Return the arguments of attention as autocast casts them, and the context in which nothing is cast again.

    Attention made of products would have them cast one by one; a derivative then meets both dtypes.
    """
    kind = query.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return (query, key, value, mask), nullcontext()
    low = torch.get_autocast_dtype(kind)
    query, key, value = (x.to(low) if x.dtype == torch.float32 else x for x in (query, key, value))
    mask = mask.to(low) if mask is not None and mask.is_floating_point() else mask
    return (query, key, value, mask), torch.autocast(kind, enabled=False)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, gqa: bool) -> bool:
    if query.dim() < 2 or not query.dim() == key.dim() == value.dim() or (mask is not None and is_causal):
        return False
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        return False
    if not all(x.numel() for x in (query, key, value)):
        return False
    lead, heads = query.shape[:-2], key.shape[:-2]
    if heads != value.shape[:-2] or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return False
    if lead == heads:
        return True
    return gqa and query.dim() > 2 and lead[:-1] == heads[:-1] and lead[-1] % heads[-1] == 0


def _four(x: Tensor) -> Tensor:
    """Return `[..., H, T, D]` as `[B, H, T, D]`."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


class _Attention(torch.autograd.Function):
    """Attention and its log-sum-exp, `[B, H, T, D]`, with the forward derivative of the former."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return _fused(query, key, value, mask, causal, scale) or _by_rows(query, key, value, mask, causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_forward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        return _Tangent.apply(*ctx.saved_tensors, *tangents[:4], ctx.causal, ctx.scale), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        out, lse = zip(*(_Attention.apply(*each) for each in _unstacked(info, in_dims, inputs)), strict=True)
        return (torch.stack(out), torch.stack(lse)), (0, 0)


class _Tangent(torch.autograd.Function):
    """The tangent of attention as a function of its own, so that many tangents share the blocks of P under vmap."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # those of `_tangents`, the moves one by one
        moves = _Moves(*(None if x is None else x[None] for x in inputs[6:10]))
        return _tangents(_Point(*inputs[:6]), moves, *inputs[10:])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[:6]):  # another point for every tangent: nothing to share
            return torch.stack([_Tangent.apply(*each) for each in _unstacked(info, in_dims, inputs)]), 0
        stacked = (
            None if x is None else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(inputs[6:10], in_dims[6:10], strict=True)
        )
        return _tangents(_Point(*inputs[:6]), _Moves(*stacked), *inputs[10:]), 0


def _unstacked(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for k in range(info.batch_size):
        yield tuple(x if dim is None else x.select(dim, k) for x, dim in zip(inputs, in_dims, strict=True))


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Return O and ℓ from a fused kernel, None where there is none for these arguments."""
    if query.shape[-1] != value.shape[-1] or (causal and query.shape[-2] != key.shape[-2]):
        return None
    rows = query.shape[-2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if query.device.type == "cpu":
        hidden = _additive(mask, query.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # of a query that sees nothing it says O = 0 and ℓ = 0: finite, so that its row of P is the zero that it must be
        out, lse = kernel(query, key, value, 0.0, causal, attn_mask=hidden, scale=scale)
        return out, lse
    if query.device.type == "cuda" and mask is None and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
        if query.dtype in (torch.bfloat16, torch.float16):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out, lse = flash(query, key, value, 0.0, causal, scale=scale)[:2]
            return out, lse[..., :rows]
        if query.dtype == torch.float32:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            out, lse = efficient(query, key, value, None, True, 0.0, causal, scale=scale)[:2]
            return out, lse[..., :rows]  # which it pads to a multiple of 32
    return None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _wide(x: Tensor) -> Tensor:
    """Return x in a dtype that a sum of products keeps: float32 in place of the half ones, float64 as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return O and ℓ, a block of queries against all keys at a time."""
    dtype, (batch, heads, keys), queries = query.dtype, key.shape[:3], query.shape[2]
    query, key, value = (_wide(x) for x in (query, key, value))
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(*query.shape[:-1], 1)
    grouped, outs, norms = (x.unflatten(1, (heads, -1)) for x in (query, out, lse))
    groups = grouped.shape[2]
    hidden = _additive(mask, query.dtype)
    step, _, budget = BLOCKS.get(query.device.type, BLOCKS["cuda"])
    for chunk in chunks_of(batch, heads, groups * min(step, queries) * keys, budget):
        for start in range(0, queries, step):
            at = slice(start, min(start + step, queries))
            block = Block(at, slice(0, min(at.stop, keys) if causal else keys), False)
            s = torch.bmm(chunk.rows(grouped, at), chunk.columns(key, block.keys).mT).mul_(scale)
            by_group = s.unflatten(1, (groups, -1))
            if causal:
                seen = torch.ones(by_group.shape[-2:], dtype=torch.bool, device=s.device).tril_(block.diagonal)
                by_group.masked_fill_(~seen, -math.inf)
            elif hidden is not None:
                by_group.add_(chunk.of_mask(hidden, block, heads, groups))
            ell = torch.logsumexp(s, -1, keepdim=True)
            ell = ell.masked_fill_(ell == -math.inf, math.inf)  # of a query that sees nothing: P = 0
            chunk.place(ell, norms, at)
            chunk.place(torch.bmm(s.sub_(ell).exp_(), chunk.columns(value, block.keys)), outs, at)
    return out.to(dtype), lse.squeeze(-1)


class _Point(NamedTuple):
    """Attention where its tangent is taken."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    out: Tensor
    lse: Tensor


class _Moves(NamedTuple):
    """The tangents of K directions, `[K, ...]` each, None where nothing moves."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None

    @property
    def many(self) -> int:
        """The number of directions, K."""
        return next(x.shape[0] for x in self if x is not None)


def _tangents(point: _Point, moves: _Moves, causal: bool, scale: float) -> Tensor:
    """Return Ȯ `[K, B, H, T, D]`."""
    query, key, value, mask, out, lse = point
    kind, dtype, (batch, heads, keys), queries = query.device.type, query.dtype, key.shape[:3], query.shape[2]
    if kind != "cuda" or dtype != torch.bfloat16:  # whose products an accelerator sums in float32 by itself
        query, key, value, out = (_wide(x) for x in (query, key, value, out))
        moves = _Moves(*(None if x is None else _wide(x) for x in moves))
    moved, halved = torch.zeros(moves.many, *out.shape, dtype=dtype, device=query.device), dtype.itemsize < 4
    sides = _sides(query, key, moves)
    queries_of, outs, norms, moved_of = (x.unflatten(-3, (heads, -1)) for x in (query, out, lse[..., None], moved))
    lefts = None if sides is None else sides[0].unflatten(-3, (heads, -1))
    groups = queries_of.shape[2]
    *step, budget = BLOCKS.get(kind, BLOCKS["cuda"])
    by_row = blocks_of(mask, causal, queries, keys, (step[0], step[1]))
    for chunk in chunks_of(batch, heads, groups * min(step[0], queries) * min(step[1], keys), budget):
        for row in filter(None, by_row):
            at = row[0].queries
            q, o, ell = (chunk.rows(x, at) for x in (queries_of, outs, norms))
            sums = [torch.zeros_like(o, dtype=ell.dtype) for _ in range(moves.many)]
            means = [torch.zeros_like(ell) for _ in range(moves.many)]
            # rowsum(P∘Ṡ) grows with the scores, and would multiply the rounding of an O that half precision keeps
            o = torch.zeros_like(o, dtype=ell.dtype) if halved else o
            for block in row:
                p = _probabilities(q, key, ell, mask, causal, scale, chunk, block, heads)
                v = chunk.columns(value, block.keys)
                if halved:
                    _add_product(o, p, v)
                for k in range(moves.many):
                    if lefts is not None and sides is not None:
                        ds = _product(chunk.rows(lefts[k], at), chunk.columns(sides[1][k], block.keys).mT).mul_(p)
                        means[k].add_(ds.sum(-1, keepdim=True), alpha=scale)
                        _add_product(sums[k], ds, v, scale)
                    if moves.mask is not None:
                        ds = chunk.of_mask(moves.mask[k], block, heads, groups) * p.unflatten(1, (groups, -1))
                        means[k].add_(ds.flatten(1, 2).sum(-1, keepdim=True))
                        _add_product(sums[k], ds.flatten(1, 2), v)
                    if moves.value is not None:
                        _add_product(sums[k], p, chunk.columns(moves.value[k], block.keys))
            for k, (total, mean) in enumerate(zip(sums, means, strict=True)):
                chunk.place(total.addcmul_(mean, o.to(mean.dtype), value=-1), moved_of[k], at)
    return moved


def _sides(query: Tensor, key: Tensor, moves: _Moves) -> tuple[Tensor, Tensor] | None:
    """Return x and y `[K, B, H, T, D]` with `x yᵀ = Q̇Kᵀ + QK̇ᵀ`: one product, over twice the features."""
    if moves.key is None:
        return None if moves.query is None else (moves.query, key.expand(moves.many, *key.shape))
    if moves.query is None:
        return query.expand(moves.many, *query.shape), moves.key
    left = torch.cat([moves.query, query.expand_as(moves.query)], -1)
    return left, torch.cat([key.expand_as(moves.key), moves.key], -1)


def _probabilities(
    q: Tensor,
    key: Tensor,
    ell: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    chunk: Chunk,
    block: Block,
    heads: int,
) -> Tensor:
    """Return a block of P, `[n, G t, s]`."""
    k, groups = chunk.columns(key, block.keys), q.shape[1] // (block.queries.stop - block.queries.start)
    if q.dtype == torch.bfloat16:
        p = _product(q, k.mT)
        p = torch.add(-ell, p, alpha=scale, out=p)  # one pass over memory
    else:
        p = torch.baddbmm(ell, q, k.mT, beta=-1, alpha=scale)
    by_group = p.unflatten(1, (groups, -1))  # a view: what is written to it is written to P
    part = None if mask is None or block.whole else chunk.of_mask(mask, block, heads, groups)
    if part is not None and part.dtype != torch.bool:
        by_group.add_(part)
    p.exp_()
    if part is not None and part.dtype == torch.bool:
        by_group.masked_fill_(~part, 0.0)
    elif causal and not block.whole:
        by_group.tril_(block.diagonal)
    return p


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return xy, summed and kept in float32 at least."""
    return torch.bmm(x, y, out_dtype=torch.float32) if x.dtype == torch.bfloat16 else torch.bmm(x, y)


def _add_product(total: Tensor, x: Tensor, y: Tensor, alpha: float = 1.0) -> None:
    """Add αxy to a total."""
    if y.dtype == torch.bfloat16:
        total.add_(_product(x.to(y.dtype), y), alpha=alpha)
    else:
        total.baddbmm_(x, y, alpha=alpha)
