"""Scores and tangents: which leaves may stand still, how many passes that costs, and what has no derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.data.rollouts import concatenate
from funcprobe.engine import attention, kernels
from funcprobe.errors import ForwardModeError, NumericsError
from funcprobe.types import Rollouts, TokenScores
from tests.cases import models, tables
from tests.cases.engines import entropy_of, setting


def test_a_model_that_is_not_finite_names_the_sequence() -> None:
    policy, params, _, rollouts = setting("two lines")
    broken = {n: p.clone() for n, p in params.items()}
    row = rollouts.ids.shape[0] - 1
    marked = concatenate([rollouts, rollouts._replace(ids=torch.full_like(rollouts.ids, 5))])
    broken["embed.weight"][5] = torch.nan
    first_bad = [b for b in range(len(marked.ids)) if 5 in _context(marked, b)]
    with pytest.raises(NumericsError, match=rf"not finite for sequence {first_bad[0]}, "):
        engine.scores(policy, broken, marked, microbatch=None)
    assert first_bad[-1] > row


def _context(rollouts: Rollouts, row: int) -> list[int]:
    length = int(rollouts.attention_mask[row].sum())
    return rollouts.ids[row, int(rollouts.prompt_lengths[row]) - 1 : length - 1].tolist()


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_statistic_that_is_not_finite_is_named(value: float) -> None:
    """Masked by the observable it would still be NaN times a cotangent of 0, in every estimate of an error."""
    policy, params = fp.from_module(models.two_lines())
    banned = {"gap": lambda log_probs, token: torch.where(token == 1, value, log_probs.amax(-1))}
    rollouts = models.rollouts(6)
    rows = ((rollouts.ids == 1) & rollouts.attention_mask)[:, 1:].any(1).nonzero().flatten().tolist()
    with pytest.raises(
        NumericsError, match=rf"statistic 'gap' has values that are not finite for sequence .*{rows[-1]}"
    ):
        engine.scores(policy, params, rollouts, stats=banned)
    with pytest.raises(NumericsError, match="return a number for every token, 0 where there is none"):
        engine.directional(policy, params, params, rollouts, stats=banned)


def test_a_model_without_forward_derivative_says_so() -> None:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            pass

        @staticmethod
        def backward(ctx: object, c: Tensor) -> Tensor:
            return 2 * c

    class Model(models.TwoLines):
        def forward(self, ids: Tensor) -> Tensor:
            return Stubborn.apply(super().forward(ids))

    policy, params = fp.from_module(Model())
    rollouts = models.rollouts()
    with pytest.raises(ForwardModeError, match=r"^The module Model has an operation .* use mode=\"reverse\"\.$"):
        engine.directional(policy, params, models.direction(params), rollouts)
    assert engine.gradient(functools.partial(entropy_of, fp.entropy()), policy, params, rollouts).gradient


def test_progress_is_reported_by_sequence() -> None:
    policy, params, _, rollouts = setting("two lines")
    seen: list[tuple[str, int, int]] = []
    engine.scores(policy, params, rollouts, microbatch=4, progress=lambda *args: seen.append(args), what="E")
    assert seen == [("E", 4, 9), ("E", 8, 9), ("E", 9, 9)]


def test_the_module_without_forward_derivative_is_named() -> None:
    class Glu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.glu(torch.cat([x, x], dim=-1))

    module = models.gpt2()
    module.transformer.h[1].mlp.act = Glu()
    policy, params = fp.from_module(module)
    v, rollouts = models.direction(params), models.rollouts()
    engine.directional(policy, params, v, rollouts)  # a first derivative it has
    with pytest.raises(ForwardModeError, match=r"The module 'h\.1\.mlp\.act' \(Glu\)"):
        engine.directional(policy, params, v, rollouts, order=2)


@pytest.mark.parametrize("build", tables.KINDS)
def test_scores_of_many_are_those_of_each(build: str) -> None:
    policy, params, v, rollouts = setting(build)
    several = [tree.axpy(e, v, params) for e in (0.0, 0.5, 2.0)]
    together = engine.scores_of_many(policy, several, rollouts, microbatch=4)
    for at, found in zip(several, together, strict=True):
        alone = engine.scores(policy, at, rollouts, order=1)
        # float64, or float32 norms within a float64 model: sums in another order
        torch.testing.assert_close(found.logp, alone.logp, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.entropy, alone.entropy, rtol=1e-5, atol=1e-6)
    assert float((together[0].logp - together[2].logp).abs().max()) > 1e-3


def test_frozen_layers_cost_one_tangent_product(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params = fp.from_module(models.lora())
    v, rollouts = models.direction(params), models.rollouts()
    engine.directional(policy, params, v, rollouts)  # the first one is held against a difference

    def counted(run: Callable[[], Any]) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter:
            found = run()
        return counter.get_total_flops(), found

    monkeypatch.setattr(attention, "attend", lambda *_, **__: None)  # its own rule has costs of its own
    one, _ = counted(lambda: engine.scores(policy, params, rollouts, order=1))
    two, along = counted(lambda: engine.directional(policy, params, v, rollouts))
    monkeypatch.setattr(kernels, "_linear", nn.functional.linear)
    three, plain = counted(lambda: engine.directional(policy, params, v, rollouts))
    # attention (many small matrices here) and the factors of LoRA cost three passes either way
    assert three == pytest.approx(3 * one, rel=0.08)  # what no tangent has reached yet costs one
    layers = {n: m for n, m in models.lora().named_modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    first = (
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.v_proj",
    )  # embeddings do not move
    reached = {n: 2 * m.weight.numel() for n, m in layers.items() if not any(name in n for name in first)}
    head = sum(size for n, size in reached.items() if "lm_head" in n)
    body = sum(reached.values()) - head
    tokens = rollouts.attention_mask.numel()
    assert three - two == body * tokens + head * int(rollouts.completion_mask.sum())
    assert torch.equal(along.tangents.logp, plain.tangents.logp)
    assert torch.equal(along.scores.logp, plain.scores.logp)


def test_biases_alone_may_move() -> None:
    module = models.gpt2()
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())  # untied: a linear layer of its own
    for name, leaf in module.named_parameters():
        leaf.requires_grad_("bias" in name)
    policy, params = fp.from_module(module)
    v, rollouts = models.direction(params), models.rollouts()
    along = engine.directional(policy, params, v, rollouts)
    e = 1e-6
    ends = [engine.scores(policy, tree.axpy(c, v, params), rollouts, order=1).logp for c in (e, -e)]
    # central difference in float64: truncation e² and rounding 1e-16/e
    torch.testing.assert_close(along.tangents.logp, (ends[0] - ends[1]) / (2 * e), rtol=1e-6, atol=1e-8)


def test_a_padding_row_moves_observables_and_not_the_training_step() -> None:
    module = models.two_lines()
    module.embed.padding_idx = 3  # prompts end with it, so the policy reads it all the time
    policy, params = fp.from_module(module)
    v, rollouts = models.direction(params), models.rollouts()
    f = functools.partial(entropy_of, fp.entropy())
    along = engine.directional(policy, params, v, rollouts)
    slope = float(engine.derivative(lambda s: f(s, rollouts)[0], along)[1])
    exact = engine.gradient(f, policy, params, rollouts, as_training=False, microbatch=4).gradient
    H = fp.anchored(fp.entropy(), policy, rollouts, params)
    for gradient in (exact, torch.func.grad(H)(params)):
        assert float(tree.dot(gradient, v)) == pytest.approx(slope, rel=1e-10)
        assert float(gradient["embed.weight"][3].abs().max()) > 0
    trained = engine.gradient(f, policy, params, rollouts).gradient
    assert float(trained["embed.weight"][3].abs().max()) == 0.0  # as a training loop's .backward() leaves it
    torch.testing.assert_close(trained["embed.weight"][4], exact["embed.weight"][4], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("build", ["two lines", "qwen2, tied"])
def test_both_orders_of_a_function_of_scores_come_from_one_pass(build: str) -> None:
    policy, params, v, rollouts = setting(build)
    along = engine.directional(policy, params, v, rollouts, order=2)
    assert along.curvatures is not None

    def f(scores: TokenScores) -> Tensor:
        return entropy_of(fp.entropy(), engine.each(lambda s, at: 1.5 * s - 0.5 * at, scores, along.scores), rollouts)[
            0
        ]

    def line(e: Tensor) -> Tensor:
        return f(engine.each(lambda s, ds, dds: s + e * ds + 0.5 * e * e * dds, *along))

    first, second = engine.derivatives(f, along)
    assert torch.equal(first, engine.derivative(f, along)[1])
    assert torch.equal(second, engine.second_derivative(f, along))
    at = torch.zeros((), dtype=torch.float64)
    slope, curvature = torch.func.grad(line), torch.func.grad(torch.func.grad(line))
    # float64, by reverse mode twice: the roundings of sums of some hundred terms
    torch.testing.assert_close(first, slope(at), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(second, curvature(at), rtol=1e-11, atol=1e-12)
