"""Facts about torch and transformers that the design rests on. One that changes with a release fails here first."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import funcprobe as fp
from funcprobe import engine
from funcprobe.engine.kernels import TwiceDifferentiable
from funcprobe.types import Params
from tests.cases import models

IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])


def logits_of(module: nn.Module, params: Params, ids: Tensor = IDS) -> Tensor:
    """Return logits through functional_call, with whatever kernel torch chooses."""
    return torch.func.functional_call(module, params, (ids,), {"use_cache": False}).logits


def leaves(module: nn.Module) -> Params:
    return {name: p.detach() for name, p in module.eval().named_parameters()}


def test_fused_attention_has_no_forward_derivative_and_the_math_kernel_has() -> None:
    module = models.gpt2(torch.float32)
    params = leaves(module)
    push = functools.partial(
        torch.func.jvp, functools.partial(logits_of, module), (params,), (models.direction(params),)
    )
    with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product_flash_attention_for_cpu"):
        push()
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = push()
    assert float(tangent.abs().sum()) > 0


def test_eager_attention_has_a_forward_derivative() -> None:
    module = models.gpt2(attention="eager")
    params = leaves(module)
    _, tangent = torch.func.jvp(functools.partial(logits_of, module), (params,), (models.direction(params),))
    policy, same = fp.from_module(models.gpt2())
    rollouts = models.rollouts()
    eager_policy, _ = fp.from_module(module)
    v = models.direction(same)
    along = [engine.directional(p, same, v, rollouts).tangents.logp for p in (policy, eager_policy)]
    torch.testing.assert_close(along[0], along[1], rtol=1e-9, atol=1e-12)  # two kernels, one float64 derivative
    assert float(tangent.abs().sum()) > 0


def test_vmap_over_the_batch_fails_on_a_mask_and_over_parameters_works() -> None:
    """It is the mask that stops it: transformers asks whether all of it is true. Right-padded rows need none."""
    module = models.qwen2()
    params = leaves(module)

    def one(ids: Tensor, mask: Tensor | None) -> Tensor:
        kwargs = {"use_cache": False} | ({} if mask is None else {"attention_mask": mask.unsqueeze(0)})
        return torch.func.functional_call(module, params, (ids.unsqueeze(0),), kwargs).logits[0]

    several = {name: torch.stack([p, 1.1 * p]) for name, p in params.items()}
    plain = logits_of(module, params)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule, and torch warns of the loop
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            torch.vmap(one)(IDS, torch.ones_like(IDS))
        # two kernels and two orders of summation in float32
        torch.testing.assert_close(torch.vmap(lambda ids: one(ids, None))(IDS), plain, rtol=1e-4, atol=1e-5)
        stacked = torch.vmap(functools.partial(logits_of, module))(several)
    torch.testing.assert_close(stacked[0], plain, rtol=1e-4, atol=1e-5)


def test_checkpointing_is_refused_by_function_transforms() -> None:
    def run(x: Tensor) -> Tensor:
        return checkpoint(torch.sin, x, use_reentrant=False).sum()

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(run)(torch.ones(2))


def test_a_model_that_trains_with_checkpointing_is_scored_all_the_same() -> None:
    module = models.qwen2().train()
    module.activation_checkpointing_enable()
    policy, params = fp.from_module(module)
    found = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, models.rollouts())
    bare_policy, bare = fp.from_module(models.qwen2())
    plain = engine.gradient(lambda s, r: (s.logp.sum(), {}), bare_policy, bare, models.rollouts())
    torch.testing.assert_close(found.gradient, plain.gradient, rtol=0, atol=0)


def test_a_qwen2_is_no_float64_reference_and_a_gpt2_is() -> None:
    narrow, wide = models.gpt2(torch.float32), models.gpt2()
    off = logits_of(wide, leaves(wide)) - logits_of(narrow, leaves(narrow)).double()
    assert 0 < float(off.abs().max()) < 1e-4
    x = torch.ones(1, 16, dtype=torch.float64)
    nudged = x + 1e-12 * torch.arange(16)
    norm = models.qwen2(torch.float64).model.norm
    assert torch.equal(norm(nudged), norm(x))  # cast to float32 inside: 1e-12 is gone
    assert not torch.equal(torch.nn.functional.rms_norm(nudged, (16,)), torch.nn.functional.rms_norm(x, (16,)))


def test_tied_embeddings_have_one_parameter_name_and_two_state_names() -> None:
    module = models.qwen2(tied=True)
    assert "lm_head.weight" not in dict(module.named_parameters())
    assert "lm_head.weight" in module.state_dict()
    doubled = {**leaves(module), "model.embed_tokens.weight": 2 * module.model.embed_tokens.weight.detach()}
    by_hand = models.qwen2(tied=True).eval()
    with torch.no_grad():
        by_hand.model.embed_tokens.weight.mul_(2)
        torch.testing.assert_close(logits_of(module, doubled), by_hand(IDS, use_cache=False).logits, rtol=0, atol=0)


def test_nested_forward_mode_through_layer_norm_is_wrong_in_this_torch() -> None:
    """jvp of jvp loses a term of layer_norm in torch 2.13, in silence, and grad of jvp the same one.

    jvp of grad and finite differences agree, and nested jvp with them once the norm is spelled out. So it is forward
    over reverse that can check nested forward mode; reverse over forward cannot.
    """
    g = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(3))

    def f(x: Tensor) -> Tensor:
        return (torch.nn.functional.layer_norm(x, (7,)) * w).sum()

    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (v,))[1]

    nested = float(torch.func.jvp(slope, (x,), (v,))[1])
    mixed = float((torch.func.jvp(torch.func.grad(f), (x,), (v,))[1] * v).sum())
    e = 1e-4  # truncation e² and rounding 1e-16/e² are both below 1e-6
    differences = float((f(x + e * v) - 2 * f(x) + f(x - e * v)) / e**2)
    assert mixed == pytest.approx(differences, rel=1e-5)
    assert abs(nested - mixed) > 1e-2 * abs(mixed)
    assert float((torch.func.grad(slope)(x) * v).sum()) == pytest.approx(nested, rel=1e-12)
    with TwiceDifferentiable():
        assert float(torch.func.jvp(slope, (x,), (v,))[1]) == pytest.approx(mixed, rel=1e-12)


def test_silu_has_a_second_forward_derivative_in_grad_mode_only() -> None:
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))

    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(torch.nn.functional.silu, (x,), (torch.ones_like(x),))[1]

    with torch.no_grad(), pytest.raises(NotImplementedError, match="silu_backward"):
        torch.func.jvp(slope, (x,), (torch.ones_like(x),))
    assert float(torch.func.jvp(slope, (x,), (torch.ones_like(x),))[1].abs().sum()) > 0
