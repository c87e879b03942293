"""Passes that are one another's transpose: pulling cotangents back, and pushing one or many tangents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.types import Microbatch, Rollouts, TokenScores
from tests.cases import models, tables

#: Float64 models agree to rounding; Qwen2 and Llama normalise in float32 whatever their dtype (tests/test_stack.py).
EXACT, NARROW = 1e-12, 1e-5
#: Float32 is held to its own sum elsewhere; what is compared here are two orders of one sum.
POLICIES = [name for name in tables.POLICIES if "float32" not in name]


def cotangents(scores: TokenScores, rollouts: Rollouts, seed: int = 4) -> TokenScores:
    """Random cotangents of both fields, 0 where nothing was drawn."""
    g = torch.Generator().manual_seed(seed)
    return engine.each(
        lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64) * rollouts.completion_mask, scores
    )


def paired(c: TokenScores, tangents: TokenScores) -> tuple[float, float]:
    """Return Σ c ⊙ ṡ and Σ |c ⊙ ṡ|."""
    terms = engine.fields(engine.each(torch.mul, c, tangents))
    return float(terms.sum()), float(terms.abs().sum())


@pytest.mark.parametrize("as_training", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_pulling_back_is_the_transpose_of_pushing(name: str, as_training: bool) -> None:
    policy, params = fp.from_module(tables.POLICIES[name]())
    rollouts, v = models.rollouts(holes=True), models.direction(params)
    along = engine.directional(policy, params, v, rollouts, as_training=as_training, microbatch=4)
    c = cotangents(along.scores, rollouts)
    pulled = engine.pull_back(c, policy, params, rollouts, as_training=as_training, microbatch=2)
    pushed, size = paired(c, along.tangents)
    assert abs(float(tree.dot(pulled, v)) - pushed) <= (EXACT if name in tables.FLOAT64 else NARROW) * size


def moved_by_row(tied: bool, as_training: bool) -> float:
    """Return how much log-probabilities move along the padding row of the embedding alone."""
    policy, params = fp.from_module(models.padded(tied=tied))
    v = tree.zeros_like(params)
    v["transformer.wte.weight"][2] = models.direction(params)["transformer.wte.weight"][2]
    return float(
        engine.directional(policy, params, v, models.rollouts(), as_training=as_training).tangents.logp.abs().sum()
    )


def test_a_padding_row_is_what_the_two_settings_differ_by() -> None:
    assert moved_by_row(tied=False, as_training=True) == 0.0
    assert moved_by_row(tied=False, as_training=False) > 0.0
    # a tied head multiplies with that row too, and there it does train
    assert 0.0 < moved_by_row(tied=True, as_training=True) != moved_by_row(tied=True, as_training=False)


def test_the_gradient_of_a_function_is_its_cotangents_pulled_back() -> None:
    policy, params = fp.from_module(models.gpt2())
    rollouts = models.rollouts()

    def f(scores: TokenScores, _: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        return (scores.logp.exp() * scores.entropy).sum() ** 2, {}

    whole = engine.gradient(f, policy, params, rollouts, as_training=False, microbatch=4)
    c = engine.cotangents(lambda s: f(s, rollouts)[0], whole.scores)
    pulled = engine.pull_back(c, policy, params, rollouts, microbatch=3)
    for name, g in whole.gradient.items():
        torch.testing.assert_close(pulled[name], g, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=6)
@given(count=st.integers(1, 4), microbatch=st.sampled_from([None, 1, 4, fp.TokenBudget(20)]), stats=st.booleans())
def test_many_directions_at_once_are_each_alone(name: str, count: int, microbatch: Microbatch, stats: bool) -> None:
    policy, params = fp.from_module(tables.POLICIES[name]())
    rollouts = models.rollouts(5)
    wanted = {"top": lambda log_probs, token: log_probs.amax(-1)} if stats else {}
    directions = [models.direction(params, seed=s) for s in range(count)]
    together = engine.directional_of_many(policy, params, directions, rollouts, microbatch=microbatch, stats=wanted)
    assert len(together) == count
    for v, found in zip(directions, together, strict=True):
        alone = engine.directional(policy, params, v, rollouts, microbatch=microbatch, stats=wanted)
        for x, y in ((found.scores, alone.scores), (found.tangents, alone.tangents)):
            for a, b in zip(engine.fields(x), engine.fields(y), strict=True):
                # one order of summation or another: roundings of float64, or of the float32 inside Qwen2
                torch.testing.assert_close(a, b, rtol=1e-9 if name in tables.FLOAT64 else NARROW, atol=1e-9)


def test_float16_goes_one_direction_at_a_time_so_that_none_is_lost() -> None:
    policy, params = fp.from_module(models.two_lines(torch.float16))
    tiny = models.direction(params, scale=1.0)
    tiny = {n: 1e-9 * v.double() for n, v in tiny.items()}  # below the smallest float16
    found = engine.directional_of_many(policy, params, [tiny, tiny], models.rollouts())
    assert all(float(along.tangents.logp.abs().sum()) > 0 for along in found)


@pytest.mark.parametrize("name", POLICIES)
def test_leaves_that_do_not_move_are_those_of_a_zero_direction(name: str) -> None:
    policy, params = fp.from_module(tables.POLICIES[name]())
    rollouts, v = models.rollouts(), models.direction(params)
    chosen = list(params)[::3]
    held = {n: x if n in chosen else torch.zeros_like(x) for n, x in v.items()}
    expected = engine.directional(policy, params, held, rollouts)
    several = engine.directional_of_many(policy, params, [v, tree.scale(2.0, v)], rollouts, leaves=chosen)
    alone = engine.directional(policy, params, v, rollouts, leaves=chosen)
    for found, factor in ((alone, 1), (several[0], 1), (several[1], 2)):
        for a, b in zip(engine.fields(found.tangents), engine.fields(expected.tangents), strict=True):
            torch.testing.assert_close(a, factor * b, rtol=1e-9 if name in tables.FLOAT64 else NARROW, atol=1e-9)
    with pytest.raises(fp.errors.InputError, match="no leaf named 'nowhere'"):
        engine.directional(policy, params, v, rollouts, leaves=["nowhere"])
