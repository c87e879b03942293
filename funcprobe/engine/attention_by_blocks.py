"""Attention and its tangent by blocks of torch's own products: right for every dtype, mask and device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcprobe.engine.attention_blocks import Block, Chunk, Moves, Point, blocks_of, chunks_of

#: Queries and keys in a block, and entries of the attention matrices that are made at once: on a processor what stays
#: in its cache, on an accelerator what keeps it busy.
BLOCKS = {"cpu": (128, 512, 2**17), "cuda": (1024, 1024, 2**25)}


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as numbers that are added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _wide(x: Tensor) -> Tensor:
    """Return x in a dtype that a sum of products keeps: float32 in place of the half ones, float64 as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def value_by_rows(at: Point) -> tuple[Tensor, Tensor]:
    """Return O and ℓ, a block of queries against all keys at a time."""
    query, key, value, mask, causal, scale = at
    dtype, (batch, heads, keys), queries = query.dtype, key.shape[:3], query.shape[2]
    query, key, value = (_wide(x) for x in (query, key, value))
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(*query.shape[:-1], 1)
    grouped, outs, norms = (x.unflatten(1, (heads, -1)) for x in (query, out, lse))
    groups = grouped.shape[2]
    hidden = additive(mask, query.dtype)
    step, _, budget = BLOCKS.get(query.device.type, BLOCKS["cuda"])
    for chunk in chunks_of(batch, heads, groups * min(step, queries) * keys, budget):
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            block = Block(rows, slice(0, min(rows.stop, keys) if causal else keys), False)
            s = torch.bmm(chunk.rows(grouped, rows), chunk.columns(key, block.keys).mT).mul_(scale)
            by_group = s.unflatten(1, (groups, -1))
            if causal:
                seen = torch.ones(by_group.shape[-2:], dtype=torch.bool, device=s.device).tril_(block.diagonal)
                by_group.masked_fill_(~seen, -math.inf)
            elif hidden is not None:
                by_group.add_(chunk.of_mask(hidden, block, heads, groups))
            ell = torch.logsumexp(s, -1, keepdim=True)
            ell = ell.masked_fill_(ell == -math.inf, math.inf)  # of a query that sees nothing: P = 0
            chunk.place(ell, norms, rows)
            chunk.place(torch.bmm(s.sub_(ell).exp_(), chunk.columns(value, block.keys)), outs, rows)
    return out.to(dtype), lse.squeeze(-1)


def tangents_by_blocks(point: Point, out: Tensor, lse: Tensor, moves: Moves) -> Tensor:
    """Return Ȯ `[K, B, H, T, D]`."""
    query, key, value, mask, causal, scale = point
    kind, dtype, (batch, heads, keys), queries = query.device.type, query.dtype, key.shape[:3], query.shape[2]
    if kind != "cuda" or dtype != torch.bfloat16:  # whose products an accelerator sums in float32 by itself
        query, key, value, out = (_wide(x) for x in (query, key, value, out))
        moves = Moves(*(None if x is None else _wide(x) for x in moves))
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


def _sides(query: Tensor, key: Tensor, moves: Moves) -> tuple[Tensor, Tensor] | None:
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
