"""The kernel that makes attention and its tangent: a fused one where it is right, blocks of products elsewhere."""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from funcprobe.engine.attention_blocks import Moves, Point
from funcprobe.engine.attention_by_blocks import additive, tangents_by_blocks, value_by_rows
from funcprobe.errors import FuncprobeWarning

#: How far a kernel may be from the blocks in float32, relative in norm. It rounds P, P∘Ṡ and what it writes to eight
#: bits, 2⁻⁹ of each at most and as likely up as down; three such roundings are within 2⁻⁷, a wrong index far beyond.
ROUNDED = 2.0**-7

#: The widest heads that the kernels take.
WIDEST = 256

#: Whether queries, keys and values move.
Moving = tuple[bool, bool, bool]


def value_of(at: Point) -> tuple[Tensor, Tensor]:
    """Return O and ℓ of attention."""
    if (found := _fused(at)) is not None:
        return found
    kernels = _kernels(at, (True, True, True))
    return value_by_rows(at) if kernels is None else cast(tuple[Tensor, Tensor], kernels.value(at))


def tangents_of(at: Point, out: Tensor, lse: Tensor, moves: Moves) -> Tensor:
    """Return Ȯ `[K, B, H, T, D]`."""
    moving = (moves.query is not None, moves.key is not None, moves.value is not None)
    kernels = None if moves.mask is not None else _kernels(at, moving)
    if kernels is None:
        return tangents_by_blocks(at, out, lse, moves)
    return cast(Tensor, kernels.tangents(at, lse, moves))


def _fused(at: Point) -> tuple[Tensor, Tensor] | None:
    """Return O and ℓ from a fused kernel of torch, None where it has none for these arguments."""
    query, key, value, mask, causal, scale = at
    if query.shape[-1] != value.shape[-1] or (causal and query.shape[-2] != key.shape[-2]):
        return None
    rows = query.shape[-2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if query.device.type == "cpu":
        hidden = additive(mask, query.dtype)
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


def _kernels(at: Point, moving: Moving) -> ModuleType | None:
    """Return the kernels of a GPU for such arguments; None where there are none, or they are not right."""
    widths = (at.query.shape[-1], at.value.shape[-1])
    if at.query.device.type != "cuda" or at.query.dtype != torch.bfloat16 or max(widths) > WIDEST:
        return None
    mask = None if at.mask is None else at.mask.dtype
    return _tried(at.query.device, widths, at.causal, mask, moving)


@functools.cache
def _tried(
    device: torch.device, widths: tuple[int, int], causal: bool, mask: torch.dtype | None, moving: Moving
) -> ModuleType | None:
    """Return the kernels where they compile and agree with the blocks on a small problem: seen once in a process.

    Raises:
        torch.OutOfMemoryError: As it came; the next call tries again.
    """
    try:
        kernels = importlib.import_module("funcprobe.engine.attention_triton")
        at = small(device, widths, causal, mask)
        off = distance(kernels, at, drawn(at, moving))
        reason = f"it is {off:.1e} from the blocks, and at most {ROUNDED:.1e} is rounding" if not off <= ROUNDED else ""
    except torch.OutOfMemoryError:  # says nothing of a kernel
        raise
    except Exception as error:  # whatever a compiler or a card says: the blocks are right
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if not reason:
        return kernels
    warnings.warn(
        f"Attention runs by blocks of products, many times slower than a kernel, which is not used here ({reason}); "
        "the numbers are the same.",
        FuncprobeWarning,
        stacklevel=2,
    )
    return None


def small(device: torch.device, widths: tuple[int, int], causal: bool, mask: torch.dtype | None) -> Point:
    """Return a small problem of grouped heads in bfloat16, whose lengths no block divides.

    Of its mask some blocks show everything, some nothing, and one query sees nothing at all.
    """
    g = torch.Generator(device).manual_seed(0)
    queries, keys = 300, 300 if causal else 330
    shapes = ((2, 4, queries, widths[0]), (2, 2, keys, widths[0]), (2, 2, keys, widths[1]))
    query, key, value = (torch.randn(shape, generator=g, device=device).bfloat16() for shape in shapes)
    seen = torch.rand(2, 1, queries, keys, generator=g, device=device) > 0.4
    seen[1, :, 3] = False
    seen[0, ..., 64:192] = True  # whole blocks, behind some in which nothing is seen
    seen[0, :, :256, :64] = False
    hidden = None if mask is None else seen if mask == torch.bool else additive(seen, mask)
    return Point(query, key, value, hidden, causal, widths[0] ** -0.5)


def drawn(at: Point, moving: Moving, many: int = 2) -> Moves:
    """Return random tangents of those that move."""
    g = torch.Generator(at.query.device).manual_seed(1)
    each = [torch.randn(many, *x.shape, generator=g, device=x.device).to(x.dtype) for x in at[:3]]
    query, key, value = (x if moves else None for x, moves in zip(each, moving, strict=True))
    return Moves(query, key, value, None)


def distance(kernels: ModuleType, at: Point, moves: Moves, dtype: torch.dtype = torch.float32) -> float:
    """Return how far kernels are from the blocks, run in a wider dtype: the largest relative error in norm.

    It is that of O, of ℓ where a query sees something, and of Ȯ; NaN where one of them is, and infinite where kernels
    and blocks do not agree on which queries see nothing.
    """
    out, lse = kernels.value(at)
    found = kernels.tangents(at, lse, moves)
    mask = at.mask.to(dtype) if at.mask is not None and at.mask.is_floating_point() else at.mask
    wide = Point(at.query.to(dtype), at.key.to(dtype), at.value.to(dtype), mask, at.causal, at.scale)
    true, ell = value_by_rows(wide)
    expected = tangents_by_blocks(wide, true, ell, Moves(*(None if x is None else x.to(dtype) for x in moves)))
    if not torch.equal(lse.isinf(), ell.isinf()):
        return math.inf
    seen = ell.isfinite()
    pairs = ((out, true), (lse[seen], ell[seen]), (found, expected))
    return float(torch.stack([(x.to(dtype) - y).norm() / y.norm() for x, y in pairs]).max())
