"""Attention's own forward derivative is that of the math kernel, for every shape, mask and choice of what moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from funcprobe import engine
from funcprobe.engine import attention, attention_by_blocks, kernels
from tests.cases.engines import setting

MASKS = ("none", "causal", "boolean", "window", "additive", "infinite", "one row", "one column", "lowest")


class Problem(NamedTuple):
    """Queries, keys and values, their tangents, and the options of attention."""

    point: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    options: dict[str, Any]


def math_kernel(*args: Tensor, **options: Any) -> Tensor:
    """Return attention by torch's kernel that has a forward derivative."""
    with engine.math_attention():
        return nn.functional.scaled_dot_product_attention(*args, **options)


def own(*args: Tensor, **options: Any) -> Tensor:
    """Return attention by the rule, which has to hold."""
    found = attention.attend(*args, **options)
    assert found is not None
    return found


def mask_of(name: str, g: torch.Generator, batch: int, heads: int, queries: int, keys: int) -> dict[str, Any]:
    """Return the options that mask attention so; of some masks a query sees nothing."""
    seen = torch.rand(batch, 1, queries, keys, generator=g) > 0.4
    blind = seen.clone()
    blind[-1, :, 0] = False
    seeing = seen.clone()
    seeing[..., 0] = True
    bias = torch.randn(batch, heads, queries, keys, generator=g, dtype=torch.float64)
    far = (torch.arange(queries)[:, None] - torch.arange(keys)).abs() > 1
    masks = {
        "boolean": blind,
        "window": ~far,
        "additive": bias,
        "infinite": bias[:1].masked_fill(~blind[:1], -torch.inf),
        "one row": bias[:, :, :1],
        "one column": bias[:1, :, :, :1],
        "lowest": torch.zeros_like(bias[:, :1]).masked_fill(~seeing, torch.finfo(torch.float64).min),
    }
    return {"attn_mask": masks[name]} if name in masks else {"is_causal": name == "causal"}


def problem(seed: int, queries: int, keys: int, groups: int, width: int, lead: tuple[int, ...], mask: str) -> Problem:
    """Return two heads of keys under `2 groups` heads of queries, of 3 features a key and `width` a value."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, 2 * groups, queries, 3), (*lead, 2, keys, 3), (*lead, 2, keys, width))
    point, tangents = (tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes) for _ in range(2))
    options = mask_of(mask, g, lead[-1] if lead else 1, 2 * groups, queries, keys)
    if not lead and "attn_mask" in options and options["attn_mask"].dim() == 4:
        options["attn_mask"] = options["attn_mask"][0]
    return Problem(point, tangents, options | {"enable_gqa": groups > 1, "scale": 0.7 if seed % 2 else None})


def pushed(attend: Callable[..., Tensor], at: Problem, moves: tuple[int, ...], *tangents: Tensor) -> Any:
    """Return attention and its tangent, queries, keys or values held that do not move."""

    def moving(*given: Tensor) -> Tensor:
        point = list(at.point)
        for i, x in zip(moves, given, strict=True):
            point[i] = x
        return attend(*point, **at.options)

    tangents = tangents or tuple(at.tangents[i] for i in moves)
    return torch.func.jvp(moving, tuple(at.point[i] for i in moves), tangents)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small problems into several blocks and chunks of heads."""
    monkeypatch.setitem(attention_by_blocks.BLOCKS, "cpu", (3, 4, 40))


PROBLEMS = st.builds(
    problem,
    seed=st.integers(0, 99),
    queries=st.integers(1, 9),
    keys=st.integers(2, 9),
    groups=st.sampled_from([1, 3]),
    width=st.sampled_from([3, 2]),
    lead=st.sampled_from([(2,), (), (2, 3)]),
    mask=st.sampled_from(MASKS),
)
MOVES = st.sampled_from([(0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
# sums of at most a dozen terms of size 1 in float64: a thousand roundings are 1e-13
close: Callable[..., None] = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@given(PROBLEMS, MOVES)
def test_values_and_tangents_are_those_of_the_math_kernel(at: Problem, moves: tuple[int, ...]) -> None:
    for found, expected in zip(pushed(own, at, moves), pushed(math_kernel, at, moves), strict=True):
        close(found, expected)


@given(PROBLEMS, MOVES)
def test_many_tangents_at_once_are_each_of_them(at: Problem, moves: tuple[int, ...]) -> None:
    many = [torch.stack([at.tangents[i], 2 * at.tangents[i].flip(-1), at.tangents[i].sin()]) for i in moves]
    found = torch.vmap(lambda *v: pushed(own, at, moves, *v)[1])(*many)
    for k in range(3):
        close(found[k], pushed(math_kernel, at, moves, *(v[k] for v in many))[1])


@given(PROBLEMS)
def test_points_may_be_mapped_over_too(at: Problem) -> None:
    queries = torch.stack([at.point[0], at.point[0].cos()])

    def tangent(attend: Callable[..., Tensor], q: Tensor) -> Tensor:
        return torch.func.jvp(lambda k: attend(q, k, at.point[2], **at.options), (at.point[1],), (at.tangents[1],))[1]

    found = torch.vmap(functools.partial(tangent, own))(queries)
    for k in range(2):
        close(found[k], tangent(math_kernel, queries[k]))


@pytest.mark.parametrize("mask", ["additive", "one row", "one column"])
@pytest.mark.parametrize("others", [True, False])
def test_a_learned_bias_moves_too(mask: str, others: bool) -> None:
    at = problem(1, 7, 6, 3, 2, (2,), mask)
    bias = at.options["attn_mask"]

    def tangent(attend: Callable[..., Tensor]) -> Tensor:
        def biased(m: Tensor, q: Tensor) -> Tensor:
            return attend(q, *at.point[1:], **(at.options | {"attn_mask": m}))

        if others:
            return torch.func.jvp(biased, (bias, at.point[0]), (bias.sin(), at.tangents[0]))[1]
        return torch.func.jvp(lambda m: biased(m, at.point[0]), (bias,), (bias.sin(),))[1]

    close(tangent(own), tangent(math_kernel))


def test_where_the_rule_does_not_hold_it_says_so() -> None:
    q, k, v = problem(0, 5, 5, 1, 3, (2,), "none").point
    hidden = torch.zeros(5, 5, dtype=torch.float64)
    hidden[2] = torch.finfo(torch.float64).min
    assert attention.attend(q, k, v, attn_mask=hidden) is None
    assert attention.attend(q, k, v, dropout_p=0.1) is None
    assert attention.attend(q, k[:1], v[:1]) is None
    assert attention.attend(q[0, 0], k[0, 0], v[0, 0]) is not None


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 4.0), (torch.bfloat16, 2.0)])
@pytest.mark.parametrize("mask", ["causal", "boolean"])
@pytest.mark.parametrize("sharp", [1.0, 8.0])
def test_it_rounds_as_the_math_kernel_does(dtype: torch.dtype, by: float, mask: str, sharp: float) -> None:
    wide = problem(3, 64, 64, 2, 3, (4,), mask)
    wide = wide._replace(**{wide._fields[0]: (sharp * wide[0][0], *wide[0][1:])})
    low = Problem(*((tuple(x.to(dtype) for x in given)) for given in wide[:2]), wide.options)
    truth = pushed(
        math_kernel, Problem(*(tuple(x.double() for x in given) for given in low[:2]), wide.options), (0, 1, 2)
    )

    def error(attend: Callable[..., Tensor]) -> Tensor:
        return (pushed(attend, low, (0, 1, 2))[1].double() - truth[1]).square().mean().sqrt()

    # In float32, ℓ and the sum that O is subtracted from round terms as large as the math kernel has once each: two
    # more roundings beside its two or three. In bfloat16 all sums are float32, that of O too: the mean of Ṡ that it is
    # multiplied by grows with the scores, and would multiply the rounding of an O in half precision.
    assert error(own) <= by * error(math_kernel)


@pytest.mark.parametrize("order", [1, 2])
def test_order_one_takes_the_rule_and_order_two_the_math_kernel(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params, v, rollouts = setting("qwen2, tied")
    engine.directional(policy, params, v, rollouts)  # the first one is held against a difference, at order 1
    taken = []
    attend = attention.attend

    def watched(*args: Any, **options: Any) -> Tensor | None:
        taken.append(args[0].shape)
        return attend(*args, **options)

    monkeypatch.setattr(attention, "attend", watched)
    along = engine.directional(policy, params, v, rollouts, order=1 if order == 1 else 2)
    assert bool(taken) == (order == 1)
    monkeypatch.setattr(attention, "attend", lambda *_, **__: None)
    plain = engine.directional(policy, params, v, rollouts, order=1 if order == 1 else 2)
    # float64, or its float32 norms: sums of the same terms in another order
    torch.testing.assert_close(along.tangents.logp, plain.tangents.logp, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_kernels_see_its_dtype() -> None:
    at = problem(0, 6, 6, 1, 3, (2,), "causal")
    single = Problem(*(tuple(x.float() for x in given) for given in at[:2]), at.options)
    half = Problem(*(tuple(x.bfloat16() for x in given) for given in at[:2]), at.options)
    with torch.autocast("cpu", torch.bfloat16):
        found = pushed(own, single, (0, 1, 2))
    for x, y in zip(found, pushed(own, half, (0, 1, 2)), strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert kernels._by_query_blocks(*single.point, is_causal=True).dtype == torch.float32
