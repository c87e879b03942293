"""Attention and its tangent on a GPU, a pass over the keys each, where products are summed as matrix units sum them.

The tangent by blocks of torch's products (`engine.attention`) writes every block of `P` and `Ṡ` to memory and reads it
again, which takes thirty times as long as a fused forward pass. Here a block of queries walks over the keys once, and
nothing but O, ℓ and Ȯ reaches memory: two products for the value, six for the tangent, of which one makes O anew in
float32, as `rowsum(P∘Ṡ)` would multiply the rounding of a stored one. Triton comes with torch where torch runs on CUDA;
without it there is no such kernel, and the blocks are right everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from funcprobe.engine.attention_blocks import Moves, Point

LOG2E = tl.constexpr(math.log2(math.e))


#: Numbers that change from batch to batch: a kernel is not compiled anew for those that 16 divides.
SIZES = ["queries", "keys", "batch", "heads", "groups", "mask_b", "mask_h", "states_b", "states_h", "ends_b", "ends_h"]


class Shape(NamedTuple):
    """How a kernel is cut: queries and keys in a block, warps that work on one, and how many loads run ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


Shapes = Mapping[int, tuple[Shape, ...]]

#: By the most features of a query or a value: the fastest on a Hopper card (benchmarks/README.md), and what takes its
#: place where a card has less shared memory.
VALUES = {
    64: (Shape(128, 64, 8, 3), Shape(64, 64, 4, 2), Shape(64, 32, 4, 1)),
    128: (Shape(128, 128, 8, 2), Shape(128, 64, 8, 2), Shape(64, 32, 4, 1)),
    256: (Shape(64, 32, 4, 2), Shape(32, 32, 4, 1), Shape(16, 16, 4, 1)),
}
TANGENTS = {
    64: (Shape(64, 64, 4, 3), Shape(64, 64, 4, 1), Shape(32, 32, 4, 1)),
    128: (Shape(128, 64, 8, 2), Shape(64, 64, 4, 1), Shape(32, 32, 4, 1)),
    256: (Shape(64, 32, 8, 1), Shape(32, 32, 4, 1), Shape(16, 16, 4, 1)),
}

#: How many shapes of a table a card was too small for, by kernel, device and variant.
_TOO_LARGE: dict[tuple[Any, ...], int] = {}


def value(at: Point) -> tuple[Tensor, Tensor]:
    """Return O `[B, H, T, D]` and ℓ `[B, H, T]`; ℓ of a query that sees nothing is +∞, so that its P is 0."""
    out = at.query.new_empty(*at.query.shape[:-1], at.value.shape[-1])
    lse = at.query.new_empty(at.query.shape[:-1], dtype=torch.float32)
    query, key, values = (_dense(x) for x in at[:3])
    given = (query, key, values, out, lse, *_strides(query, key, values))
    _launch(_value, at, VALUES, 1, given)
    return out, lse


def tangents(at: Point, lse: Tensor, moves: Moves) -> Tensor:
    """Return Ȯ `[K, B, H, T, D]` for tangents of queries, keys and values; those of a mask have no kernel."""
    many = moves.many
    moved = at.query.new_empty(many, *at.query.shape[:-1], at.value.shape[-1])
    point = [_dense(x) for x in at[:3]]
    # what does not move is not read: any tensor stands there
    read = [p[None] if x is None else _dense(x) for x, p in zip(moves[:3], point, strict=True)]
    flags = {f"moves_{name}": x is not None for name, x in zip(("query", "key", "value"), moves[:3], strict=True)}
    strides = (*_strides(*point), *(s for x in read for s in x.stride()[:4]))
    _launch(_tangent, at, TANGENTS, many, (*point, *read, lse.contiguous(), moved, *strides), **flags)
    return moved


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:3])


def _launch(kernel: Any, at: Point, table: Shapes, many: int, given: tuple[Any, ...], **flags: bool) -> None:
    """Run a kernel in the first of its shapes that the card has the memory for.

    Raises:
        OutOfResources: If it has it for none.
    """
    features = min(n for n in table if n >= max(at.query.shape[-1], at.value.shape[-1]))
    kind = 0 if at.mask is None else 1 if at.mask.dtype == torch.bool else 2
    variant = (kernel, at.query.device, features, at.query.dtype, at.causal, kind, *flags.values())
    for number in range(_TOO_LARGE.get(variant, 0), len(table[features])):
        try:
            _run(kernel, at, table[features][number], many, given, features=features, kind=kind, **flags)
        except OutOfResources:
            if number + 1 == len(table[features]):
                raise
            _TOO_LARGE[variant] = number + 1
        else:
            return


def _run(kernel: Any, at: Point, shape: Shape, many: int, given: tuple[Any, ...], **constants: int) -> None:
    (batch, heads, queries, width), keys = at.query.shape, at.key.shape[2]
    mask = states = ends = at.query  # none of which is read where nothing is masked
    if at.mask is not None:
        mask, states, ends = _blocks_of(at.mask, queries, keys, shape)
    by_mask, by_states, by_ends = _repeated(mask)[:3], _repeated(states)[:2], _repeated(ends)[:2]
    sizes = (batch, heads, heads // at.key.shape[1], queries, keys)
    grid = (triton.cdiv(queries, shape.rows) * heads * batch * many,)
    with torch.cuda.device_of(at.query):
        kernel[grid](
            *(*given, mask, states, ends, *by_mask, *by_states, *by_ends, *sizes, at.scale),
            width=width,
            value_width=at.value.shape[-1],
            rows=shape.rows,
            columns=shape.columns,
            causal=at.causal,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **constants,
        )


def _repeated(x: Tensor) -> tuple[int, ...]:
    """Return strides, 0 along a dimension of size 1: its one entry stands everywhere."""
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))


def _blocks_of(mask: Tensor, queries: int, keys: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return a mask as whole blocks, how much each shows, and between which ones a block of queries sees anything.

    The first is padded by what hides, so that no length but the block's decides how it is read. Of the second, uint8
    `[B | 1, H | 1, blocks, blocks]`, 0 is nothing, 1 some and 2 all as it is. The third, int32
    `[B | 1, H | 1, blocks, 2]`, has the first block of keys and one past the last; 0 and 0 where nothing is seen.
    """
    pad = (0, -keys % shape.columns, 0, -queries % shape.rows)
    mask = mask.expand(*mask.shape[:2], queries, keys)
    if any(pad) or not mask.is_contiguous():
        mask = torch.nn.functional.pad(mask, pad, value=False if mask.dtype == torch.bool else -math.inf)
        mask = mask.contiguous()
    by_block = mask.unflatten(3, (-1, shape.columns)).unflatten(2, (-1, shape.rows))
    if mask.dtype == torch.bool:
        least, most = by_block.all(5).all(3), by_block.any(5).any(3)
    else:
        lowest, highest = by_block.amin((3, 5)), by_block.amax((3, 5))
        least = (lowest == 0) & (highest == 0)
        most = ~(highest <= torch.finfo(mask.dtype).min / 2)  # NaN is seen, and shows in the value
    number = torch.arange(1, most.shape[-1] + 1, device=mask.device, dtype=torch.int32)
    last, first = (most * number).amax(-1), most.shape[-1] - (most * number.flip(0)).amax(-1)
    ends = torch.stack([torch.where(last > 0, first, 0), last], -1).to(torch.int32)
    whole = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return whole, most.to(torch.uint8) + least, ends


@triton.jit
def _tile(x, at, limit, stride, width: tl.constexpr, features: tl.constexpr):
    """Return rows of `[T, D]`, 0 beyond either."""
    feature = tl.arange(0, features)
    where = x + at[:, None].to(tl.int64) * stride + feature[None, :]
    inside = at[:, None] < limit
    if width < features:
        inside = inside & (feature[None, :] < width)
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def _hidden(s, at_row, at_column, keys, mask, by_row, state, causal: tl.constexpr, kind: tl.constexpr):
    """Return scores in units of log 2, at −∞ where a key is not seen."""
    if kind == 0:
        inside = at_column[None, :] < keys
        if causal:
            inside = inside & (at_column[None, :] <= at_row[:, None])
        s = tl.where(inside, s, float("-inf"))
    elif state < 2:
        part = tl.load(mask + at_row[:, None].to(tl.int64) * by_row + at_column[None, :])
        if kind == 1:
            s = tl.where(part != 0, s, float("-inf"))
        else:
            s += part.to(tl.float32) * LOG2E
    return s


@triton.jit
def _range(block, keys, ends, rows: tl.constexpr, columns: tl.constexpr, causal: tl.constexpr, kind: tl.constexpr):
    """Return where the keys of a block of queries begin, from where on some are hidden, and where they end."""
    first = 0
    last = keys
    if causal:
        last = tl.minimum(keys, (block + 1) * rows)
        whole = tl.minimum(keys, block * rows + 1) // columns * columns
    else:
        whole = keys // columns * columns
    if kind > 0:
        first = tl.load(ends + block * 2) * columns
        last = tl.minimum(last, tl.load(ends + block * 2 + 1) * columns)
        whole = first
    return first, whole, last


@triton.jit(do_not_specialize=SIZES)
def _value(
    q, k, v, out, lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    mask, states, ends, mask_b, mask_h, mask_t, states_b, states_h, ends_b, ends_h,
    batch, heads, groups, queries, keys, scale,
    width: tl.constexpr, value_width: tl.constexpr, features: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    causal: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Write O and ℓ of a block of queries."""
    blocks = tl.cdiv(queries, rows)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest of a causal mask first
    which = tl.program_id(0) // blocks
    h, b = (which % heads).to(tl.int64), (which // heads).to(tl.int64)
    at_row = block * rows + tl.arange(0, rows)
    query = _tile(q + b * q_b + h * q_h, at_row, queries, q_t, width, features)
    k += b * k_b + (h // groups) * k_h
    v += b * v_b + (h // groups) * v_h
    mask += b * mask_b + h * mask_h
    states += b * states_b + h * states_h + block * tl.cdiv(keys, columns)
    ends += b * ends_b + h * ends_h
    first, whole, last = _range(block, keys, ends, rows, columns, causal, kind)
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    o = tl.zeros([rows, features], tl.float32)
    for part in tl.static_range(0 if kind == 0 else 1, 2):  # first what no key is hidden from
        for start in range(first if part == 0 else whole, whole if part == 0 else last, columns):
            at_column = start + tl.arange(0, columns)
            s = tl.dot(query, tl.trans(_tile(k, at_column, keys, k_t, width, features))) * (scale * LOG2E)
            if part == 1:
                state = tl.load(states + start // columns) if kind > 0 else 0
                s = _hidden(s, at_row, at_column, keys, mask, mask_t, state, causal, kind)
            higher = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
            p = tl.exp2(s - shift[:, None])
            less = tl.exp2(top - shift)
            total = total * less + tl.sum(p, 1)
            values = _tile(v, at_column, keys, v_t, value_width, features)
            o = tl.dot(p.to(values.dtype), values, o * less[:, None])
            top = higher
    blind = total == 0.0
    o = o / tl.where(blind, 1.0, total)[:, None]
    ell = tl.where(blind, float("inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / LOG2E)
    here = which.to(tl.int64) * queries + at_row
    tl.store(lse + here, ell, mask=at_row < queries)
    feature = tl.arange(0, features)
    inside = (at_row[:, None] < queries) & (feature[None, :] < value_width)
    tl.store(out + here[:, None] * value_width + feature[None, :], o.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _tangent(
    q, k, v, dq, dk, dv, lse, moved, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    dq_n, dq_b, dq_h, dq_t, dk_n, dk_b, dk_h, dk_t, dv_n, dv_b, dv_h, dv_t,
    mask, states, ends, mask_b, mask_h, mask_t, states_b, states_h, ends_b, ends_h,
    batch, heads, groups, queries, keys, scale,
    width: tl.constexpr, value_width: tl.constexpr, features: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    causal: tl.constexpr, kind: tl.constexpr,
    moves_query: tl.constexpr, moves_key: tl.constexpr, moves_value: tl.constexpr,
):  # fmt: skip
    """Write Ȯ of a block of queries in one direction."""
    blocks = tl.cdiv(queries, rows)
    block = blocks - 1 - tl.program_id(0) % blocks
    which = tl.program_id(0) // blocks
    h, b = (which % heads).to(tl.int64), (which // heads % batch).to(tl.int64)
    n = (which // heads // batch).to(tl.int64)
    at_row = block * rows + tl.arange(0, rows)
    query = _tile(q + b * q_b + h * q_h, at_row, queries, q_t, width, features)
    if moves_query:
        query_moves = _tile(dq + n * dq_n + b * dq_b + h * dq_h, at_row, queries, dq_t, width, features)
    g = h // groups
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    dk += n * dk_n + b * dk_b + g * dk_h
    dv += n * dv_n + b * dv_b + g * dv_h
    mask += b * mask_b + h * mask_h
    states += b * states_b + h * states_h + block * tl.cdiv(keys, columns)
    ends += b * ends_b + h * ends_h
    first, whole, last = _range(block, keys, ends, rows, columns, causal, kind)
    ell = tl.load(lse + (b * heads + h) * queries + at_row, mask=at_row < queries, other=float("inf")) * LOG2E
    mean = tl.zeros([rows], tl.float32)
    o = tl.zeros([rows, features], tl.float32)
    total = tl.zeros([rows, features], tl.float32)
    for part in tl.static_range(0 if kind == 0 else 1, 2):  # first what no key is hidden from
        for start in range(first if part == 0 else whole, whole if part == 0 else last, columns):
            at_column = start + tl.arange(0, columns)
            keys_here = tl.trans(_tile(k, at_column, keys, k_t, width, features))
            s = tl.dot(query, keys_here) * (scale * LOG2E)
            if part == 1:
                state = tl.load(states + start // columns) if kind > 0 else 0
                s = _hidden(s, at_row, at_column, keys, mask, mask_t, state, causal, kind)
            p = tl.exp2(s - ell[:, None])
            values = _tile(v, at_column, keys, v_t, value_width, features)
            if moves_query or moves_key:
                ds = tl.zeros([rows, columns], tl.float32)
                if moves_query:
                    ds = tl.dot(query_moves, keys_here, ds)
                if moves_key:
                    ds = tl.dot(query, tl.trans(_tile(dk, at_column, keys, dk_t, width, features)), ds)
                ds *= p * scale
                mean += tl.sum(ds, 1)
                total = tl.dot(ds.to(values.dtype), values, total)
                o = tl.dot(p.to(values.dtype), values, o)
            if moves_value:
                total = tl.dot(p.to(values.dtype), _tile(dv, at_column, keys, dv_t, value_width, features), total)
    total -= mean[:, None] * o
    feature = tl.arange(0, features)
    inside = (at_row[:, None] < queries) & (feature[None, :] < value_width)
    here = which.to(tl.int64) * queries + at_row
    tl.store(moved + here[:, None] * value_width + feature[None, :], total.to(moved.dtype.element_ty), mask=inside)
