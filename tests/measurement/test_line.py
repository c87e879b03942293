"""Scores on a line: interpolants of tangents, held to polynomials that are known and to a policy's own scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.measurement.line import Line, along_line, even, radau, secants_along, spread, tangents_along, walk
from funcprobe.types import TokenScores
from tests.cases import models
from tests.cases.probes import E

ONE = torch.ones(1, 1, dtype=torch.float64)


def scores(value: float) -> TokenScores:
    return TokenScores(value * ONE, -value * ONE)


@pytest.mark.parametrize("nodes", [radau, even])
@given(
    n=st.integers(1, 6),
    length=st.floats(1e-6, 1e3),
    x=st.floats(0.0, 1.0),
    data=st.data(),
)
def test_a_polynomial_is_followed_everywhere(nodes, n: int, length: float, x: float, data: st.DataObject) -> None:
    """n + 1 tangents fix a polynomial of degree n, so that its integral is exact at every x."""
    c = data.draw(st.lists(st.floats(-1, 1), min_size=n + 1, max_size=n + 1))
    p = np.polynomial.Polynomial(c)
    along = engine.Directional(scores(0.5), scores(float(p(0.0)) / length))
    line = walk(along, nodes(n), lambda at: scores(float(p(at / length)) / length), length)
    # float64, sums of n + 1 terms of at most n + 1, with Lagrange's weights of at most some tens
    assert float(line.scores(x * length).logp) == pytest.approx(0.5 + float(p.integ(lbnd=0.0)(x)), abs=1e-12)
    assert float(line.scores(x * length).entropy) == -float(line.scores(x * length).logp - 0.5) - 0.5
    assert float(line.curvature().logp) * length**2 == pytest.approx(float(p.deriv()(0.0)), abs=1e-10)


@given(n=st.integers(1, 6), length=st.floats(1e-6, 1e3), x=st.floats(0.0, 1.0), data=st.data())
def test_secants_follow_a_polynomial_of_one_degree_more(n: int, length: float, x: float, data: st.DataObject) -> None:
    """Value and slope at 0 and n values fix a polynomial of degree n + 1, at every x."""
    c = data.draw(st.lists(st.floats(-1, 1), min_size=n + 2, max_size=n + 2))
    p = np.polynomial.Polynomial(c)
    along = engine.Directional(scores(c[0]), scores(c[1] / length))
    line = walk(along, spread(n), lambda at: scores(float(p(at / length) - c[0]) / at), length, by_values=True)
    # as above; the secant at the first node is a difference of values of at most n + 2, over at least a fiftieth
    assert float(line.scores(x * length).logp) == pytest.approx(float(p(x)), abs=1e-12)
    assert float(line.curvature().logp) * length**2 == pytest.approx(2 * c[2], abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_spread_nodes_have_the_least_worst_error_relative_to_x_with_a_value_at_the_end(n: int) -> None:
    xs = np.linspace(0.0, 1.0, 2001)

    def errors(nodes: tuple[float, ...]) -> np.ndarray:
        return np.prod([xs - x for x in nodes], axis=0)

    own = spread(n)
    assert (own[0], own[-1], len(own)) == (0.0, 1.0, n + 1)
    worst = np.abs(errors(own)).max()
    for k in range(1, n):
        for shift in (-1e-2, 1e-2):
            assert np.abs(errors(tuple(x + shift * (j == k) for j, x in enumerate(own)))).max() > worst


@pytest.mark.parametrize("by_values", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_error_is_no_larger_than_its_share_at_any_x(n: int, by_values: bool) -> None:
    """Relative to x it starts at 0; of the first monomial that is not followed the share bounds it there."""
    length, degree = 3.0, n + 1
    xs = length * np.linspace(1e-4, 1.0, 500)
    slope = (lambda x: scores(x**degree)) if by_values else (lambda x: scores((degree + 1) * x**degree))
    along = engine.Directional(scores(0.0), scores(0.0))
    line = walk(along, (spread if by_values else even)(n), slope, length, by_values)
    off = np.array([abs(float(line.scores(x).logp) - x ** (degree + 1)) / x for x in xs])
    shares = np.array([line.nearness(x) for x in xs]) * off.max()
    # what it swings to is read off 500 points here and off 1,001 there
    assert (off <= shares * (1 + 1e-4)).all()
    assert off[0] == pytest.approx(shares[0], rel=5e-3)
    assert line.nearness(length) == 1.0


def test_a_node_left_out_is_a_line_through_the_others() -> None:
    along = engine.Directional(scores(1.0), scores(2.0))
    line = walk(along, spread(3), lambda x: scores(2.0 + x**3), by_values=True)
    fewer = walk(along, (0.0, *spread(3)[2:]), lambda x: scores(2.0 + x**3), by_values=True)
    assert line.without(line.nodes[1]) == fewer
    assert line.without(0.123) == line


def test_secants_are_those_of_the_policy() -> None:
    policy, params = fp.from_module(models.gpt2())
    v = models.direction(params, 2e-3)
    passes = Passes.over(policy, E, {}, None, None, Clock())
    along = passes.directional(params, v, "E")
    line = walk(along, spread(6), secants_along(passes, params, v, along.scores, 1), 2.0, by_values=True)
    for x in (1e-6, 0.3, 1.0, 2.0):
        there = engine.scores(policy, tree.axpy(x, v, params), E, order=1)
        torch.testing.assert_close(line.scores(x).logp, there.logp, rtol=0, atol=1e-9)
        torch.testing.assert_close(line.scores(x).entropy, there.entropy, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_radau_is_exact_to_twice_the_degree_and_no_further(n: int) -> None:
    def off(degree: int) -> float:
        along = engine.Directional(scores(0.0), scores(0.0**degree))
        line = walk(along, radau(n), lambda x: scores(x**degree))
        return abs(float(line.scores(1.0).logp) - 1 / (degree + 1))

    assert max(off(d) for d in range(2 * n + 1)) < 1e-14
    assert off(2 * n + 1) > 1e-9


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_even_nodes_have_the_least_worst_error_relative_to_x(n: int) -> None:
    """Of the first monomial that n + 1 tangents do not follow; its error swings evenly, n + 1 times to its bound."""
    xs = np.linspace(1e-3, 1.0, 2000)

    def errors(nodes: tuple[float, ...]) -> np.ndarray:
        along = engine.Directional(scores(0.0), scores(0.0))
        line = walk(along, nodes, lambda x: scores(x ** (n + 1)))
        return np.array([(float(line.scores(x).logp) - x ** (n + 2) / (n + 2)) / x for x in xs])

    own = errors(even(n))
    worst = np.abs(own).max()
    assert worst < np.abs(errors(radau(n))).max()
    assert abs(own[-1]) == pytest.approx(worst, rel=1e-3)  # at the end too, where two evaluations can tell
    near = np.abs(own) > 0.999 * worst
    assert int((near[1:] & ~near[:-1]).sum()) == n + 1
    for k in range(1, n + 1):  # and no node can be moved to a smaller one
        for shift in (-1e-2, 1e-2):
            moved = tuple(x + shift * (j == k) for j, x in enumerate(even(n)))
            assert np.abs(errors(moved)).max() > worst


def test_a_line_leads_to_the_scores_of_the_policy() -> None:
    policy, params = fp.from_module(models.gpt2())
    v = models.direction(params, 2e-3)
    passes = Passes.over(policy, E, {}, None, None, Clock())
    along = passes.directional(params, v, "E")
    line = walk(along, even(6), tangents_along(passes, params, v), 2.0)
    for x in (1e-6, 0.3, 1.0, 2.0):
        there = engine.scores(policy, tree.axpy(x, v, params), E, order=1)
        # six nodes on a line on which scores bend little: far below what one node less leaves
        torch.testing.assert_close(line.scores(x).logp, there.logp, rtol=0, atol=1e-9)
        torch.testing.assert_close(line.scores(x).entropy, there.entropy, rtol=0, atol=1e-9)
    nested = passes.directional(params, v, "E", order=2)
    assert nested.curvatures is not None
    torch.testing.assert_close(line.curvature().logp, nested.curvatures.logp, rtol=1e-3, atol=1e-8)


def test_small_changes_are_as_accurate_as_their_tangents() -> None:
    along = engine.Directional(scores(-3.0), scores(0.7))
    line = walk(along, even(2), lambda x: scores(0.7 + x))
    for x in (1e-12, 1e-8):
        change = float(line.scores(x).logp) - -3.0
        assert abs(change - (0.7 * x + x * x / 2)) <= 4 * math.ulp(3.0)


def test_a_straight_line_is_first_order() -> None:
    line = Line.straight(engine.Directional(scores(1.0), scores(2.0)), 5.0)
    assert (float(line.scores(0.5).logp), float(line.curvature().logp)) == (2.0, 0.0)


def test_a_point_of_a_line_is_rounded_once() -> None:
    p = {"w": torch.tensor([1.0], dtype=torch.float32)}
    v = {"w": torch.tensor([1e-8], dtype=torch.float32)}
    assert float(along_line(p, v, 8.0)["w"]) == 1.0000001192092896  # 1 + 8e-8 rounds up, eight single steps do not
