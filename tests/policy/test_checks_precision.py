"""The precision that a module is held to is that of its coarsest product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.errors import InputError
from tests.cases import models
from tests.cases.checked import V, alone


class Casts(nn.Module):
    """A module that is float32 outside and bfloat16 inside."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head, self.how = nn.Embedding(V, 8), nn.Linear(8, V), how

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids))
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(x).float()
        if self.how == "cast":
            return nn.functional.linear(x.bfloat16(), self.head.weight.bfloat16()).float()
        return self.head(x)


@pytest.mark.parametrize(
    ("how", "dtype"), [("plain", torch.float32), ("autocast", torch.bfloat16), ("cast", torch.bfloat16)]
)
def test_the_precision_is_that_of_the_coarsest_product(how: str, dtype: torch.dtype) -> None:
    with models.seeded(1):
        policy, params = fp.from_module(Casts(how))
    assert engine.arithmetic(policy, params).eps == torch.finfo(dtype).eps


def test_constants_in_float32_are_no_precision() -> None:
    """Rotary tables are float32 in a float64 model; its norms are too, and these depend on the leaves."""
    policy, params = fp.from_module(models.gpt2())
    assert engine.arithmetic(policy, params).eps == torch.finfo(torch.float64).eps
    policy, params = fp.from_module(models.qwen2(torch.float64))
    assert engine.arithmetic(policy, params).eps == torch.finfo(torch.float32).eps


def test_autocast_of_accelerate_is_kept() -> None:
    module = models.in_accelerates_bfloat16(models.qwen2())
    policy, params = fp.from_module(module)
    rollouts = models.rollouts()
    low = torch.finfo(torch.bfloat16).eps
    # logits of order one, rounded a few times in either; which way is a matter of kernels and shapes
    assert float((fp.score(policy, params, rollouts).logp - alone(module, rollouts)).abs().max()) < 16 * low
    assert engine.arithmetic(policy, params).eps == torch.finfo(torch.bfloat16).eps
    assert policy.checks is not None
    assert any("autocast in bfloat16" in note for note in policy.checks.notes)
    objective = fp.grpo()
    gradient, _ = fp.make_step(policy, objective, fp.sgd(1.0)).gradient(params, rollouts)
    assert set(gradient) == set(params)
    five_lines = torch.func.grad(fp.anchored(fp.entropy(), policy, rollouts, params))(params)
    assert all(bool(torch.isfinite(g).all()) for g in five_lines.values())
    assert float(tree.norm(five_lines)) > 0


def test_autocast_around_a_call_is_refused() -> None:
    policy, params = fp.from_module(models.two_lines(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda: fp.score(policy, params, models.rollouts()),
            lambda: fp.from_module(models.two_lines(torch.float32)),
        ):
            with pytest.raises(InputError, match=r"torch.autocast \(bfloat16\) is on around this call"):
                call()
