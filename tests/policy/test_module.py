"""A module becomes a pure policy: by name, split at its head, and never touched."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine
from funcprobe.errors import InputError
from tests.cases import models, tables
from tests.cases.snapshots import snapshot
from tests.cases.trees import assert_same


@pytest.mark.parametrize("build", tables.KINDS)
def test_the_scores_are_those_of_the_module(build: str) -> None:
    module = tables.POLICIES[build]()
    policy, params = fp.from_module(module)
    rollouts = models.rollouts(holes=True)
    found = fp.score(policy, params, rollouts)
    module.eval()
    for row in range(len(rollouts.ids)):
        start, length = int(rollouts.prompt_lengths[row]), int(rollouts.attention_mask[row].sum())
        with torch.no_grad():
            out = module(rollouts.ids[row : row + 1, :length])
        log_probs = torch.log_softmax(getattr(out, "logits", out)[0].double() / 0.8, dim=-1)
        for t in range(rollouts.completion_mask.shape[1]):
            if not rollouts.completion_mask[row, t]:
                assert float(found.logp[row, t]) == float(found.entropy[row, t]) == 0.0
                continue
            at = log_probs[start + t - 1]
            token = int(rollouts.ids[row, start + t])
            # qwen2 computes its norms in float32 inside; batching changes their rounding
            tolerance = 1e-12 if build in ("two lines", "gpt2") else 1e-5
            assert abs(float(found.logp[row, t]) - float(at[token])) <= tolerance
            assert abs(float(found.entropy[row, t]) + float((at.exp() * at).sum())) <= tolerance


@pytest.mark.parametrize("build", tables.KINDS)
def test_the_module_is_left_untouched(build: str) -> None:
    module = tables.POLICIES[build]().train()
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    before = snapshot(module)
    policy, params = fp.from_module(module)
    rollouts = models.rollouts()
    v = models.direction(params)
    engine.directional(policy, params, v, rollouts)
    engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, fp.tree.add(params, v), rollouts)
    assert_same(snapshot(module), before)
    assert any(before["training"])


def test_dropout_is_off_although_the_module_trains() -> None:
    policy, params = fp.from_module(models.gpt2(dropout=0.3).train())
    first, second = (fp.score(policy, params, models.rollouts()) for _ in range(2))
    assert torch.equal(first.logp, second.logp)


def test_the_leaves_are_the_trainable_ones_by_name() -> None:
    adapted = models.lora()
    policy, params = fp.from_module(adapted)
    assert list(params) == [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in params)
    assert not any(p.requires_grad for p in params.values())
    assert policy.readout_names == tuple(n for n in params if "lm_head" in n)


def test_tied_embeddings_are_one_leaf_that_both_ends_read() -> None:
    policy, params = fp.from_module(models.qwen2(tied=True))
    assert policy.readout_names == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in params
    moved = dict(params) | {"model.embed_tokens.weight": 2 * params["model.embed_tokens.weight"]}
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.readout(moved, hidden), 2 * policy.readout(params, hidden))


def test_weights_tied_inside_one_module_are_one_leaf() -> None:
    class Tied(models.TwoLines):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.head = nn.Linear(5, 5), nn.Linear(5, models.VOCABULARY)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.project(self.embed(ids))))

    with models.seeded(2):
        module = Tied()
    policy, params = fp.from_module(module)
    assert "head.weight" not in params
    moved = {n: p + 0.1 for n, p in params.items()}
    found = fp.score(policy, moved, models.rollouts()).logp
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    assert torch.equal(found, fp.score(*fp.from_module(module), models.rollouts()).logp)


def test_soft_capping_stays_with_the_readout() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with models.seeded(3):
        module = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=7,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                final_logit_softcapping=0.05,
                initializer_range=0.5,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    policy, params = fp.from_module(module)
    assert policy.readout_names, "the model was not split"
    logits = policy.readout(params, 100 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    assert float(logits.abs().max()) <= 0.05 + 1e-8  # 0.05 in float32
    assert float(logits.abs().max()) > 0.04


def test_a_model_that_does_not_split_is_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    module = models.gpt2()

    class Scaled(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("inputs_embeds") is not None:  # a head that behaves otherwise once the backbone is known
                kwargs["inputs_embeds"] = 2 * kwargs["inputs_embeds"]
            return super().forward(*args, **kwargs)

    module.__class__ = Scaled
    with caplog.at_level(logging.WARNING):
        policy, params = fp.from_module(module)
    assert "does not split at its head" in caplog.text
    assert policy.readout_names == ()
    assert torch.equal(fp.score(policy, params, models.rollouts()).logp != 0, models.rollouts().completion_mask)


def test_attention_masks_reach_a_module_that_takes_them() -> None:
    seen: list[Tensor] = []

    class Masked(models.TwoLines):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            seen.append(attention_mask)
            return super().forward(ids)

    policy, params = fp.from_module(Masked())
    rollouts = models.rollouts()
    fp.score(policy, params, rollouts)
    assert torch.equal(seen[-1], rollouts.attention_mask)


def test_a_wrapped_module_keeps_its_own_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    inner = models.gpt2()
    policy, params = fp.from_module(Wrapper(inner))
    bare, bare_params = fp.from_module(inner)
    assert set(params) == {f"module.{n}" for n in bare_params}
    rollouts = models.rollouts()
    assert torch.equal(fp.score(policy, params, rollouts).logp, fp.score(bare, bare_params, rollouts).logp)


def test_a_module_around_a_causal_lm_is_a_module_like_any_other() -> None:
    class Around(nn.Module):
        def __init__(self, *, scale: float) -> None:
            super().__init__()
            self.lm, self.scale = models.gpt2(), scale

        def forward(self, ids: Tensor) -> Tensor:
            return self.scale * self.lm(ids).logits

    rollouts = models.rollouts()
    bare = fp.score(*fp.from_module(models.gpt2()), rollouts).logp
    split, params = fp.from_module(Around(scale=1.0))
    assert split.readout_names == ("lm.transformer.wte.weight",)
    assert torch.allclose(fp.score(split, params, rollouts).logp, bare, rtol=0, atol=1e-12)
    whole, params = fp.from_module(Around(scale=2.0))  # what stands around the model has its say
    assert whole.readout_names == ()
    assert not torch.allclose(fp.score(whole, params, rollouts).logp, bare, rtol=0, atol=1e-3)


def test_weights_that_are_not_numbers_do_not_change_how_a_model_is_run(caplog: pytest.LogCaptureFixture) -> None:
    module = models.gpt2()
    nn.init.constant_(module.transformer.wte.weight, torch.nan)
    with caplog.at_level(logging.WARNING):
        policy, _ = fp.from_module(module)
    assert policy.readout_names
    assert caplog.text == ""


def test_a_device_is_a_copy() -> None:
    module = models.two_lines()
    _, shared = fp.from_module(module, device="cpu")
    assert shared["head.bias"].data_ptr() == module.head.bias.data_ptr()  # same device: nothing is copied
    policy, moved = fp.from_module(module, device="meta")  # the one other device that every machine has
    assert policy.device == moved["head.bias"].device == torch.device("meta")
    assert module.head.bias.device == torch.device("cpu")


def test_bad_modules() -> None:
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        fp.from_module(models.two_lines().requires_grad_(False))
    flat = copy.deepcopy(models.two_lines())
    flat.forward = lambda ids: torch.zeros(1, 2)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"returned \(1, 2\) for ids of shape \(1, 2\); expected logits"):
        fp.from_module(flat)


def test_the_wrong_tree_is_refused() -> None:
    policy, params = fp.from_module(models.two_lines())
    with pytest.raises(InputError, match=r"missing \['head.bias'\], unexpected \['other'\]"):
        fp.score(
            policy, {n: p for n, p in params.items() if n != "head.bias"} | {"other": torch.ones(1)}, models.rollouts()
        )
