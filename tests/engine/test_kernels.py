"""Attention by blocks of queries, and in the kernel that has a forward derivative, is attention."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine
from funcprobe.engine import attention, kernels
from tests.cases import models
from tests.cases.engines import setting


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("build", ["gpt2", "qwen2, tied", "qwen2, lora"])
def test_attention_by_blocks_of_queries_changes_nothing(
    build: str, order: Literal[1, 2], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, params, v, rollouts = setting(build)
    monkeypatch.setattr(attention, "attend", lambda *_, **__: None)  # where its rule does not hold
    whole = engine.directional(policy, params, v, rollouts, order=order)
    shapes = []
    attend = nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append((q.shape[-2], k.shape[-2]))
        return attend(q, k, *args, **kwargs)

    monkeypatch.setattr(kernels, "ATTENTION_BUDGET", 0)
    monkeypatch.setattr(kernels, "SMALLEST_BLOCK", 3)
    monkeypatch.setattr(kernels, "_attend", watched)
    cut = engine.directional(policy, params, v, rollouts, order=order)
    length = rollouts.ids.shape[1]
    assert {q for q, _ in shapes} <= {3, length % 3}
    assert max(k for _, k in shapes) == length > min(k for _, k in shapes)  # causal: nobody sees later keys
    # float64, or its float32 norms: sums of the same terms over fewer zeros
    for field in ("scores", "tangents", "curvatures")[: order + 1]:
        torch.testing.assert_close(getattr(cut, field).logp, getattr(whole, field).logp, rtol=1e-5, atol=1e-6)


def test_attention_by_blocks_takes_any_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4, generator=g, dtype=torch.float64) for _ in range(3))
    monkeypatch.setattr(kernels, "ATTENTION_BUDGET", 0)
    monkeypatch.setattr(kernels, "SMALLEST_BLOCK", 3)
    attend = nn.functional.scaled_dot_product_attention
    masks = [
        {},
        {"is_causal": True},
        {"attn_mask": torch.rand(8, 8, generator=g) > 0.2},
        {"attn_mask": torch.randn(2, 1, 8, 8, generator=g, dtype=torch.float64)},
        {"attn_mask": torch.randn(2, 1, 1, 8, generator=g, dtype=torch.float64), "scale": 0.3},
    ]
    for options in masks:
        torch.testing.assert_close(kernels._by_query_blocks(q, k, v, **options), attend(q, k, v, **options))
    few = k[..., :5, :]
    blocks = kernels._by_query_blocks(q, few, v[..., :5, :], is_causal=True)
    torch.testing.assert_close(blocks, attend(q, few, v[..., :5, :], is_causal=True))
    grouped = {"enable_gqa": True, "is_causal": True}
    torch.testing.assert_close(
        kernels._by_query_blocks(q, k[:, :1], v[:, :1], **grouped), attend(q, k[:, :1], v[:, :1], **grouped)
    )


class Opaque(torch.autograd.Function):
    """Attention as a package's kernel brings it: with a backward pass and no forward derivative."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(Opaque.forward, *ctx.saved_tensors)[1](cotangent)


def test_attention_without_a_forward_derivative_is_switched_for_that_pass() -> None:
    from transformers import AttentionInterface

    used = []

    def packaged(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        used.append(module)
        return Opaque.apply(q, k, v).transpose(1, 2), None

    AttentionInterface.register("packaged", packaged)
    module = models.qwen2()
    module.set_attn_implementation("packaged")
    policy, params = fp.from_module(module)
    own, same = fp.from_module(models.qwen2())
    v, rollouts = models.direction(params), models.rollouts()
    engine.directional(policy, params, v, rollouts)  # the first one is held against a difference
    used.clear()
    along = engine.directional(policy, params, v, rollouts)
    assert not used
    # the very kernel that a model set to "sdpa" is given
    torch.testing.assert_close(along.tangents.logp, engine.directional(own, same, v, rollouts).tangents.logp)
    assert module.config._attn_implementation == "packaged"
    assert engine.arithmetic(policy, params).fused_attention
    # outside of that pass the model runs as it was set; float32 kernels of two kinds
    torch.testing.assert_close(engine.scores(policy, params, rollouts).logp, along.scores.logp, rtol=1e-4, atol=1e-5)
    assert used
    with pytest.raises(RuntimeError, match="jvp"), engine.math_attention():
        torch.func.jvp(lambda p: fp.score(policy, p, rollouts).logp, (params,), (v,))
