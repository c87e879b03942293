"""The first derivative asked of a copy is held against a finite difference: what is lost or detached is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.engine import tangent
from funcprobe.errors import ForwardModeError
from tests.cases import models, tables

V = models.VOCABULARY


class Squares(torch.autograd.Function):
    """x², with a backward and a forward rule that can be wrong by a factor."""

    right, forward_factor, backward_factor = 2.0, 2.0, 2.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def backward(cls, ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return cls.backward_factor * ctx.saved_tensors[0] * g

    @classmethod
    def jvp(cls, ctx: Any, t: Tensor) -> Tensor:  # type: ignore[override]
        return cls.forward_factor * ctx.saved_tensors[0] * t


class LostTangent(Squares):
    """A forward rule that loses the tangent, as a compiled block does."""

    forward_factor = 0.0


class WrongBackward(Squares):
    """A backward rule that is off by a tenth."""

    backward_factor = 2.2


class Acts(nn.Module):
    """A two-line module with an activation of somebody's."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.middle, self.head, self.act = nn.Embedding(V, 5), nn.Linear(5, 5), nn.Linear(5, V), act

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.act(self.middle(self.embed(ids))))


def acts(act: Callable[[Tensor], Tensor]) -> tuple[fp.Policy, fp.types.Params]:
    with models.seeded(3):
        return fp.from_module(Acts(act).double())


def test_right_rules_hold() -> None:
    policy, params = acts(Squares.apply)
    engine.directional(policy, params, models.direction(params), models.rollouts())
    engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, models.rollouts(), as_training=False)
    assert policy.checks is not None
    assert policy.checks.tangents == {"forward": True, "reverse": True}
    assert not policy.checks.findings


def test_a_lost_tangent_is_found_and_reverse_mode_taken() -> None:
    policy, params = acts(LostTangent.apply)
    v, rollouts = models.direction(params), models.rollouts()
    with pytest.raises(ForwardModeError, match="is not its derivative: on a few tokens it disagrees"):
        engine.directional(policy, params, v, rollouts)
    step = fp.make_step(policy, fp.grpo(), fp.sgd(1e-5))
    found = fp.probe(fp.Update.from_step(step, params, step.optimizer.init(params), models.rollouts(seed=2)), rollouts)
    assert found.mode == "reverse"
    assert found.first_order == pytest.approx(found.change, rel=1e-2)  # second order at this step


def test_a_wrong_gradient_is_warned_of() -> None:
    policy, params = acts(WrongBackward.apply)
    engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, models.rollouts(), as_training=False)
    assert policy.checks is not None
    assert not policy.checks.tangents["reverse"]
    assert any("the gradient of the model is not its derivative" in text for text in policy.checks.warnings)


def dora(dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with models.seeded(7):
        made = get_peft_model(
            models.qwen2(dtype, tied=False), LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
        )
        for name, leaf in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(leaf, std=0.3)
        return made.to(dtype)


def normed(x: Tensor) -> Tensor:
    """Divide by a norm that training takes for a constant."""
    return x / (1 + x.norm(dim=-1, keepdim=True)).detach()


@pytest.mark.parametrize(
    "build",
    [lambda: Acts(normed).double(), lambda: dora(torch.float32), lambda: dora(torch.float64)],
    ids=["norm", "dora", "dora, float64"],
)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_what_a_module_detaches_is_taken_along_on_the_evaluation_rollouts(
    build: Callable[[], nn.Module], mode: str
) -> None:
    with models.seeded(3):
        module = build()
    policy, params = fp.from_module(module)
    rollouts, v = models.rollouts(8, seed=4), models.direction(params, 1e-3)
    anchor = engine.scores(policy, params, rollouts, order=1)

    def f(s: fp.TokenScores) -> Tensor:
        return fp.entropy()(s, anchor, rollouts)

    if mode == "forward":
        slope = float(engine.derivative(f, engine.directional(policy, params, v, rollouts))[1])
    else:
        pulled = engine.gradient(lambda s, r: (f(s), {}), policy, params, rollouts, as_training=False).gradient
        slope = float(tree.dot(pulled, v))
    ends = [float(f(engine.scores(policy, tree.axpy(c, v, params), rollouts, order=1))) for c in (1.0, -1.0)]
    # third order at 1e-3 of entries of order 1, and float32 scores of 1e-7 in a change of 1e-4
    assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=5e-3)
    assert policy.checks is not None
    assert policy.checks.undetached
    assert any("detaches what its output depends on" in text for text in policy.checks.notes)
    # the gradient on U is training's: it leaves out what the module detaches
    trained = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, rollouts).gradient
    whole = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, rollouts, as_training=False).gradient
    assert float(tree.norm(tree.sub(trained, whole))) > 1e-3 * float(tree.norm(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_difference_to_speak_of(dtype: torch.dtype) -> None:
    policy, params = fp.from_module(models.gpt2(dtype))
    engine.directional(policy, params, models.direction(params), models.rollouts())
    assert policy.checks is not None
    assert policy.checks.tangents == {}


def test_a_direction_of_nothing_is_no_evidence() -> None:
    policy, params = acts(torch.tanh)
    engine.directional(policy, params, tree.zeros_like(params), models.rollouts())
    assert policy.checks is not None
    assert policy.checks.tangents == {}
    engine.directional(policy, params, models.direction(params), models.rollouts())
    assert policy.checks.tangents == {"forward": True}


@pytest.mark.parametrize("build", tables.KINDS)
def test_every_model_holds(build: str) -> None:
    policy, params = fp.from_module(tables.POLICIES[build]())
    held = tangent.difference(policy, params, models.direction(params), moves=0.0)
    assert held is not None
    assert held.rounding < 0.1 * float(held.fine.norm())  # the difference says something
    engine.directional(policy, params, models.direction(params), models.rollouts())
    assert policy.checks is not None
    assert policy.checks.tangents == {"forward": True}
    assert not policy.checks.undetached
