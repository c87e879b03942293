"""The lines that a GPU runs for a block of queries, in Triton: O and ℓ, or Ȯ, from one walk over the keys.

Scores are in units of log 2, for which there is an instruction. A mask comes as whole blocks, of which the states say
whether one hides nothing, so that it is read only where it cuts a block.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))

#: Numbers that change from batch to batch: a kernel is not compiled anew for those that 16 divides.
SIZES = ["queries", "keys", "batch", "heads", "groups", "mask_b", "mask_h", "states_b", "states_h", "ends_b", "ends_h"]


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
def write_value(
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
def write_tangent(
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
