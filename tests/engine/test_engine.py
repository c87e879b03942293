"""One engine, held against the five lines: every mode, every cut of the batch, every model gives one number."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.data.rollouts import concatenate, rollouts_from_padded, take
from funcprobe.engine import kernels
from funcprobe.errors import ForwardModeError, NumericsError
from funcprobe.policy import scoring
from funcprobe.types import Params, Rollouts, TokenScores
from tests.cases import models

FAMILY = fp.entropy_family()
OBJECTIVES = {
    "reinforce": fp.reinforce(),
    "rloo": fp.rloo(),
    "grpo": fp.grpo(),
    "bnpo": fp.bnpo(),
    "dr_grpo": fp.dr_grpo(),
    "dapo": fp.dapo(),
    "gspo": fp.gspo(),
    "cispo": fp.cispo(),
}


@functools.cache
def setting(build: str, *, holes: bool = True) -> tuple[fp.Policy, Params, Params, Rollouts]:
    """Return policy, parameters, a direction and rollouts."""
    policy, params = fp.from_module(models.EVERY_MODEL[build]())
    return policy, params, models.direction(params), models.rollouts(holes=holes)


@functools.cache
def along_of(build: str, order: Literal[1, 2]) -> engine.Directional:
    """Return scores and derivatives along the direction of a setting; every observable is a function of them."""
    policy, params, v, rollouts = setting(build)
    return engine.directional(policy, params, v, rollouts, order=order, microbatch=2)


def off_policy(rollouts: Rollouts, seed: int = 2) -> Rollouts:
    """Return rollouts whose old and reference log-probs differ from the policy's, so that ratios and KL matter."""
    g = torch.Generator().manual_seed(seed)
    shape = rollouts.completion_mask.shape
    old, ref = (-2.0 - torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return rollouts._replace(old_logps=old, ref_logps=ref)


def entropy_of(observable: fp.entropy, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the observable with its anchor at the scores themselves, as an engine function."""
    anchor = TokenScores(scores.logp.detach(), scores.entropy.detach(), {})
    return observable(scores, anchor, rollouts), {}


def terms(gradient: Params, direction: Params) -> float:
    """Return Σ|terms| of ⟨∇F, v⟩: what rounding is relative to, since the sum itself may cancel."""
    return float(tree.dot(tree.map_(torch.abs, gradient), tree.map_(torch.abs, direction)))


@pytest.mark.parametrize("build", models.EVERY_MODEL)
@pytest.mark.parametrize("observable", FAMILY, ids=lambda o: o.name)
def test_reverse_forward_and_the_five_lines_agree(build: str, observable: fp.entropy) -> None:
    policy, params, v, rollouts = setting(build)
    H = fp.anchored(observable, policy, rollouts, params)
    five_lines = torch.func.grad(H)(params)
    slope = float(tree.dot(five_lines, v))
    f = functools.partial(entropy_of, observable)
    with engine.math_attention():
        reverse = engine.gradient(f, policy, params, rollouts, microbatch=4)
    along = along_of(build, order=1)
    value, forward = engine.derivative(lambda s: f(s, rollouts)[0], along)
    _, jvp = torch.func.jvp(H, (params,), (v,))
    # GPT-2 and the two lines are float64 throughout: 1e-10 of Σ|terms| leaves five digits to accumulation. Qwen2 casts
    # to float32 inside its norms (eps 6e-8), of which some thousands of roundings average out in a sum of terms.
    tolerance = (1e-10 if build in ("gpt2", "two lines") else 1e-6) * terms(five_lines, v)
    assert abs(float(tree.dot(reverse.gradient, v)) - slope) <= tolerance
    assert abs(float(forward) - slope) <= tolerance
    assert abs(float(jvp) - slope) <= tolerance
    assert math.isclose(float(value), float(H(params)), rel_tol=1e-12)
    assert abs(slope) > 100 * tolerance


@pytest.mark.parametrize("build", ["two lines", "gpt2"])
@pytest.mark.parametrize("observable", FAMILY, ids=lambda o: o.name)
def test_the_remainder_falls_as_the_square_of_the_step(build: str, observable: fp.entropy) -> None:
    policy, params, v, rollouts = setting(build)
    H = fp.anchored(observable, policy, rollouts, params)
    slope, base = float(torch.func.jvp(H, (params,), (v,))[1]), float(H(params))
    # at ε = 2^-3 … 2^-6 the cubic term is below a few per cent and float64 rounding (1e-16/ε²) far below that
    steps = [2.0**-k for k in (3, 4, 5, 6)]
    remainders = [abs(float(H(tree.axpy(e, v, params))) - base - e * slope) for e in steps]
    x, y = torch.log(torch.tensor(steps)), torch.log(torch.tensor(remainders))
    fitted = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert abs(fitted - 2) <= 0.1, remainders


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("microbatch", [1, 4, None, fp.TokenBudget(20)], ids=str)
def test_single_pass_is_two_phase(name: str, microbatch: int | fp.TokenBudget | None) -> None:
    policy, params, _, rollouts = setting("gpt2")
    objective = OBJECTIVES[name]
    prepared = objective.prepare(off_policy(rollouts))
    assert objective.separable
    one, two = (
        engine.gradient(objective, policy, params, prepared, separable=s, microbatch=microbatch) for s in (True, False)
    )
    scale = float(tree.norm(two.gradient))
    assert scale > 0
    assert float(tree.norm(tree.sub(one.gradient, two.gradient))) <= 1e-13 * scale  # only the order of float64 sums
    assert math.isclose(float(one.value), float(two.value), rel_tol=1e-13)


def test_an_objective_that_is_not_separable_needs_two_phases() -> None:
    """The law above can fail: for a function that couples rows, slices give something else."""
    policy, params, _, rollouts = setting("gpt2")
    coupled = functools.partial(entropy_of, fp.entropy())
    one, two = (engine.gradient(coupled, policy, params, rollouts, separable=s, microbatch=2) for s in (True, False))
    assert float(tree.norm(tree.sub(one.gradient, two.gradient))) > 1e-3 * float(tree.norm(two.gradient))


@settings(max_examples=12)
@given(
    microbatch=st.one_of(st.none(), st.integers(1, 10), st.builds(fp.TokenBudget, st.integers(1, 80))),
    order=st.permutations(range(9)),
    objective=st.sampled_from(sorted(OBJECTIVES)),
)
def test_neither_the_cut_nor_the_order_of_a_batch_matters(
    microbatch: int | fp.TokenBudget | None, order: list[int], objective: str
) -> None:
    policy, params, v, rollouts = setting("gpt2")
    rollouts = off_policy(rollouts)
    shuffled = take(rollouts, torch.tensor(order))
    loss = OBJECTIVES[objective]
    whole = engine.gradient(loss, policy, params, loss.prepare(rollouts), separable=True)
    cut = engine.gradient(loss, policy, params, loss.prepare(shuffled), separable=True, microbatch=microbatch)
    assert float(tree.norm(tree.sub(whole.gradient, cut.gradient))) <= 1e-12 * float(tree.norm(whole.gradient))
    sides = [
        (x, engine.directional(policy, params, v, x, microbatch=n))
        for x, n in ((rollouts, None), (shuffled, microbatch))
    ]
    for observable in FAMILY:  # all of them are functions of the same scores
        f = functools.partial(entropy_of, observable)
        values = [torch.stack(engine.derivative(lambda s, b=x, f=f: f(s, b)[0], along)) for x, along in sides]
        torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", models.EVERY_MODEL)
def test_the_padding_side_does_not_matter(build: str) -> None:
    policy, params, _, rollouts = setting(build)
    before = engine.scores(policy, params, rollouts)
    for side in ("left", "right"):
        padded = _padded(rollouts, side, filler=0)  # 0 is an ordinary token of the vocabulary: only the mask decides
        after = engine.scores(policy, params, padded)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def _padded(rollouts: Rollouts, side: str, filler: int) -> Rollouts:
    width = rollouts.ids.shape[1] + 3
    ids, attention, completion = [], [], []
    for row in range(len(rollouts.ids)):
        length, start = int(rollouts.attention_mask[row].sum()), int(rollouts.prompt_lengths[row])
        chosen = [False] * start + rollouts.completion_mask[row].tolist()
        real = [rollouts.ids[row, :length].tolist(), [True] * length, chosen[:length]]
        pad = width - length
        for out, values, empty in zip((ids, attention, completion), real, (filler, False, False), strict=True):
            out.append([empty] * pad + values if side == "left" else values + [empty] * pad)
    return rollouts_from_padded(
        ids, attention, completion, temperature=0.8, rewards=rollouts.rewards, group_ids=rollouts.group_ids
    )


@pytest.mark.parametrize("build", models.EVERY_MODEL)
def test_vmap_over_parameters_is_a_loop(build: str) -> None:
    policy, params, v, rollouts = setting(build)
    H = fp.anchored(fp.entropy(), policy, rollouts, params)
    several = [tree.axpy(c, v, params) for c in (0.0, 0.5, 1.0)]
    stacked = {name: torch.stack([p[name] for p in several]) for name in params}
    looped = torch.stack([H(p) for p in several])
    torch.testing.assert_close(torch.vmap(H)(stacked), looped, rtol=1e-6 if "qwen2" in build else 1e-12, atol=0)


@pytest.mark.parametrize("build", models.EVERY_MODEL)
def test_chunks_and_rematerialisation_change_nothing(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params, v, rollouts = setting(build)
    f = functools.partial(entropy_of, fp.entropy())
    whole = engine.gradient(f, policy, params, rollouts)
    along = engine.directional(policy, params, v, rollouts)
    monkeypatch.setattr(scoring, "LOGITS_BUDGET", 3 * policy.vocab_size)  # three tokens at a time
    chunked = engine.gradient(f, policy, params, rollouts)
    # Qwen2's norms sum in float32 in another order
    relative = 1e-6 if "qwen2" in build else 1e-13
    gap = float(tree.norm(tree.sub(whole.gradient, chunked.gradient)))
    assert gap <= relative * float(tree.norm(whole.gradient))
    torch.testing.assert_close(engine.directional(policy, params, v, rollouts), along, rtol=1e-6, atol=1e-12)


def test_an_entropy_that_only_some_slices_need_is_pulled_back_in_those() -> None:
    policy, params, _, rollouts = setting("gpt2")
    late = torch.where(torch.arange(len(rollouts.ids)) == 0, 1.0, 0.0).double()

    def f(scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        return scores.logp.sum() + (rollouts.weight[:, None] * scores.entropy).sum(), {}

    weighted = rollouts._replace(weight=late)
    for first in (weighted, take(weighted, torch.arange(len(late) - 1, -1, -1))):
        one_by_one = engine.gradient(f, policy, params, first, separable=True, microbatch=1)
        whole = engine.gradient(f, policy, params, first, separable=True)
        assert float(tree.norm(tree.sub(one_by_one.gradient, whole.gradient))) <= 1e-13 * float(
            tree.norm(whole.gradient)
        )
        without = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, first, separable=True, microbatch=1)
        assert float(tree.norm(tree.sub(whole.gradient, without.gradient))) > 1e-3 * float(tree.norm(whole.gradient))


def test_gradients_that_share_storage_do_not_add_up_twice() -> None:
    class Twins(nn.Module):
        """Two biases that autograd hands one and the same gradient tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(7, dtype=torch.float64)) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            return (self.a + self.b).expand(*ids.shape, 7)

    with models.seeded(0):
        policy, params = fp.from_module(Twins())
    rollouts = models.rollouts()
    f = functools.partial(entropy_of, fp.entropy())
    cut = engine.gradient(f, policy, params, rollouts, microbatch=2).gradient
    whole = engine.gradient(f, policy, params, rollouts).gradient
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(cut["a"], cut["b"], rtol=0, atol=0)


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


@pytest.mark.parametrize("build", models.EVERY_MODEL)
@pytest.mark.parametrize("observable", FAMILY, ids=lambda o: o.name)
def test_second_derivatives_of_every_kind_agree(build: str, observable: fp.entropy) -> None:
    policy, params, v, rollouts = setting(build)
    along = along_of(build, order=2)
    assert along.curvatures is not None
    anchor = engine.detached(along.scores)

    def f(s: TokenScores) -> Tensor:
        return observable(s, anchor, rollouts)

    nested = float(engine.second_derivative(f, along))
    fixed = engine.cotangents(f, along.scores)
    through_scores = engine.second_derivative(f, along._replace(curvatures=engine.each(torch.zeros_like, anchor)))
    by_reverse = engine.curvature_by_reverse(fixed, policy, params, v, rollouts, microbatch=4)
    scale = sum(float((c * dd).abs().sum()) for c, dd in zip(fixed[:2], along.curvatures[:2], strict=True))
    # float64 throughout leaves 1e-10 of Σ|terms|; float32 norms (Qwen2) round each term by some 1e-6 of its parts
    tolerance = (1e-10 if build in ("gpt2", "two lines") else 1e-4) * scale
    assert abs(nested - float(through_scores + by_reverse)) <= tolerance
    if build not in ("gpt2", "two lines"):
        return  # a second difference of float32 norms is noise
    H = fp.anchored(observable, policy, rollouts, params)
    e = 2.0**-8  # truncation e²/12 of the fourth derivative; rounding 1e-16/e² is far below
    plus, middle, minus = (float(H(tree.axpy(c, v, params))) for c in (e, 0.0, -e))
    assert nested == pytest.approx((plus - 2 * middle + minus) / e**2, rel=1e-3, abs=1e-6 * scale)
    assert abs(nested) > 1e-8


def test_contributions_sum_to_the_derivative() -> None:
    policy, params, v, rollouts = setting("gpt2")
    along = engine.directional(policy, params, v, rollouts)
    f = functools.partial(fp.entropy(), anchor=engine.detached(along.scores), rollouts=rollouts)
    parts = engine.contributions(f, along)
    total = float(parts.logp.sum() + parts.entropy.sum())
    assert math.isclose(total, float(engine.derivative(f, along)[1]), rel_tol=1e-12)
    assert not bool(parts.logp[~rollouts.completion_mask].any())


@pytest.mark.parametrize("build", models.EVERY_MODEL)
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


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("build", ["gpt2", "qwen2, tied", "qwen2, lora"])
def test_attention_by_blocks_of_queries_changes_nothing(
    build: str, order: Literal[1, 2], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, params, v, rollouts = setting(build)
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


def test_frozen_layers_cost_one_tangent_product(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params = fp.from_module(models.lora())
    v, rollouts = models.direction(params), models.rollouts()
    engine.directional(policy, params, v, rollouts)  # the first one is held against a difference

    def counted(run: Callable[[], Any]) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter:
            found = run()
        return counter.get_total_flops(), found

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
