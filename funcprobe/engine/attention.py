"""Scaled-dot-product attention with a forward derivative of its own: a fused pass, then tangents by blocks.

With `S = c QKᵀ + M`, `ℓ = logsumexp S` by rows and `P = exp(S − ℓ)`, attention is `O = P V` and its tangent

    Ȯ = (P∘Ṡ) V − rowsum(P∘Ṡ) ∘ O + P V̇,    Ṡ = c (Q̇Kᵀ + QK̇ᵀ) + Ṁ.

A fused kernel gives O and ℓ without making S. Given ℓ, a block of P needs no other block of its rows, so tangents never
hold more than one block, and blocks in which nothing is seen are left out. On a GPU kernels of our own make them where
they are right (`engine.attention_choice`). The rule holds once: torch 2.13 does not differentiate a custom function's
`jvp` again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from funcprobe.engine.attention_blocks import Moves, Point
from funcprobe.engine.attention_choice import tangents_of, value_of

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
        return value_of(Point(query, key, value, mask, causal, scale))

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
    def forward(*inputs: Any) -> Tensor:  # point, O and ℓ, the moves one by one, causal and scale
        moves = Moves(*(None if x is None else x[None] for x in inputs[6:10]))
        return tangents_of(Point(*inputs[:4], *inputs[10:]), inputs[4], inputs[5], moves)[0]

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
        return tangents_of(Point(*inputs[:4], *inputs[10:]), inputs[4], inputs[5], Moves(*stacked)), 0


def _unstacked(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for k in range(info.batch_size):
        yield tuple(x if dim is None else x.select(dim, k) for x, dim in zip(inputs, in_dims, strict=True))
