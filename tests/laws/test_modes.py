"""One engine, held against the five lines: every mode, every cut of the batch, every model gives one number."""

from __future__ import annotations

import functools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.data.rollouts import rollouts_from_padded, take
from funcprobe.types import Params, Rollouts, TokenScores
from tests.cases import tables
from tests.cases.engines import entropy_of, off_policy, setting

FAMILY = fp.entropy_family()


@functools.cache
def along_of(build: str, order: Literal[1, 2]) -> engine.Directional:
    """Return scores and derivatives along the direction of a setting; every observable is a function of them."""
    policy, params, v, rollouts = setting(build)
    return engine.directional(policy, params, v, rollouts, order=order, microbatch=2)


def terms(gradient: Params, direction: Params) -> float:
    """Return Σ|terms| of ⟨∇F, v⟩: what rounding is relative to, since the sum itself may cancel."""
    return float(tree.dot(tree.map_(torch.abs, gradient), tree.map_(torch.abs, direction)))


@pytest.mark.parametrize("build", tables.KINDS)
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


@settings(max_examples=12)
@given(
    microbatch=st.one_of(st.none(), st.integers(1, 10), st.builds(fp.TokenBudget, st.integers(1, 80))),
    order=st.permutations(range(9)),
    objective=st.sampled_from(tables.PLAIN),
)
def test_neither_the_cut_nor_the_order_of_a_batch_matters(
    microbatch: int | fp.TokenBudget | None, order: list[int], objective: str
) -> None:
    policy, params, v, rollouts = setting("gpt2")
    rollouts = off_policy(rollouts)
    shuffled = take(rollouts, torch.tensor(order))
    loss = tables.OBJECTIVES[objective]
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


@pytest.mark.parametrize("build", tables.KINDS)
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


@pytest.mark.parametrize("build", tables.KINDS)
def test_vmap_over_parameters_is_a_loop(build: str) -> None:
    policy, params, v, rollouts = setting(build)
    H = fp.anchored(fp.entropy(), policy, rollouts, params)
    several = [tree.axpy(c, v, params) for c in (0.0, 0.5, 1.0)]
    stacked = {name: torch.stack([p[name] for p in several]) for name in params}
    looped = torch.stack([H(p) for p in several])
    torch.testing.assert_close(torch.vmap(H)(stacked), looped, rtol=1e-6 if "qwen2" in build else 1e-12, atol=0)


@pytest.mark.parametrize("build", tables.KINDS)
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
