"""Attention and its tangent on a GPU, a pass over the keys each, where products are summed as matrix units sum them.

The tangent by blocks of torch's products (`engine.attention_by_blocks`) writes every block of `P` and `Ṡ` to memory and
reads it again, which takes thirty times as long as a fused forward pass. Here a block of queries walks over the keys
once, and nothing but O, ℓ and Ȯ reaches memory: two products for the value, six for the tangent, of which one makes O
anew in float32, as `rowsum(P∘Ṡ)` would multiply the rounding of a stored one. Triton comes with torch where torch runs
on CUDA; without it there is no such kernel, and the blocks are right everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from funcprobe.engine.attention_blocks import Moves, Point, in_blocks, padded, plain, shown
from funcprobe.engine.attention_lines import write_tangent, write_value


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
    _launch(write_value, at, VALUES, 1, given)
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
    _launch(write_tangent, at, TANGENTS, many, (*point, *read, lse.contiguous(), moved, *strides), **flags)
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
    step, hides = (shape.rows, shape.columns), False if mask.dtype == torch.bool else -math.inf
    mask = padded(mask.expand(*mask.shape[:2], queries, keys), step, hides).contiguous()
    least = in_blocks(plain(mask), step).all(-1).all(-2)
    most = in_blocks(shown(mask), step).any(-1).any(-2)
    number = torch.arange(1, most.shape[-1] + 1, device=mask.device, dtype=torch.int32)
    last, first = (most * number).amax(-1), most.shape[-1] - (most * number.flip(0)).amax(-1)
    ends = torch.stack([torch.where(last > 0, first, 0), last], -1).to(torch.int32)
    whole = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return whole, most.to(torch.uint8) + least, ends
