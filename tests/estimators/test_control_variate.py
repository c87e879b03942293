"""Control variates against explicit loops, and what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.estimators.control_variate import leave_one_out
from funcprobe.estimators.observables import Entropy
from funcprobe.estimators.returns import expected_reward
from funcprobe.types import Observable, Rollouts, TokenScores
from tests.cases.observables import VARIATES, batch, few, of_variates, scored, seeds, sizes


def test_the_mean_of_the_others_by_hand() -> None:
    rollouts = fp.rollouts_from_lists([[1]] * 5, [[2]] * 5, temperature=1.0, weight=[1.0, 2.0, 3.0, 1.0, 0.0])
    rollouts = rollouts._replace(group_ids=torch.tensor([7, 4, 7, 4, 4]))
    x = torch.tensor([[1.0], [2.0], [5.0], [4.0], [9.0]], dtype=torch.float64)
    # of group 7: 5 and 1; of group 4, weights 2, 1, 0 of 2, 4, 9: 4, 2, and (2·2 + 4)/3
    torch.testing.assert_close(leave_one_out(x, rollouts)[:, 0], torch.tensor([5.0, 4.0, 1.0, 2.0, 8 / 3]).double())
    gone = rollouts._replace(weight=torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0]).double())
    torch.testing.assert_close(leave_one_out(x, gone)[:, 0], torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0]).double())


def plain(o: Observable) -> Observable:
    """Return the same estimator without its control variate."""
    return Entropy(o.integrand, o.weighting, o.per) if isinstance(o, Entropy) else expected_reward()


def by_loops(o: Observable, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> float:
    """Return Σ w (x − b) + Σ ā b, row by row and token by token."""
    d, a = (scores.logp - anchor.logp).tolist(), (rollouts.weight / rollouts.weight.sum()).tolist()
    n, width = rollouts.completion_mask.shape
    mask, groups = rollouts.completion_mask.double().tolist(), rollouts.group_ids.tolist()

    def total(x: list[list[float]], known: list[list[float]], upto: Callable[[int], int]) -> float:
        found = 0.0
        for t in range(width):
            weights = [a[i] * math.exp(sum(d[i][: upto(t)])) for i in range(n)]
            for i in range(n):
                others = [j for j in range(n) if groups[j] == groups[i] and j != i]
                b = sum(a[j] * known[j][t] for j in others) / sum(a[j] for j in others)
                found += weights[i] / sum(weights) * (x[i][t] - b) + a[i] * b
        return found

    if not isinstance(o, Entropy):
        assert rollouts.rewards is not None
        earned = [[r] + [0.0] * (width - 1) for r in rollouts.rewards.tolist()]
        return total(earned, earned, lambda t: width)
    rao_blackwell = o.integrand == "rao_blackwell"
    x, known = ((s.entropy if rao_blackwell else -s.logp).tolist() for s in (scores, anchor))
    prefix: Callable[[int], int] = (lambda t: width) if o.weighting == "sequence" else (lambda t: t)
    own = prefix if rao_blackwell or o.weighting == "sequence" else (lambda t: t + 1)
    return total(x, known, own) / (total(mask, mask, prefix) if o.per == "token" else 1.0)


@of_variates
@few
@given(sizes, seeds)
def test_a_control_variate_is_its_formula(o: Observable, n: list[int], seed: int) -> None:
    rollouts = batch(n, seed)
    g = torch.Generator().manual_seed(seed)
    rollouts = rollouts._replace(weight=torch.rand(sum(n), generator=g, dtype=torch.float64) + 0.1)
    scores, anchor = scored(rollouts, seed)
    found = float(o(scores, anchor, rollouts))
    # some hundred terms of a few nats, summed in another order
    assert math.isclose(found, by_loops(o, scores, anchor, rollouts), rel_tol=1e-12, abs_tol=1e-13)


@of_variates
@few
@given(sizes, seeds)
def test_a_control_variate_changes_nothing_at_the_anchor(o: Observable, n: list[int], seed: int) -> None:
    rollouts = batch(n, seed)
    _, anchor = scored(rollouts, seed)
    found, expected = (float(f(anchor, anchor, rollouts)) for f in (o, plain(o)))
    # some fifty terms of up to 3 nats, over weights of 1/16
    assert math.isclose(found, expected, rel_tol=1e-13, abs_tol=1e-13)


@given(sizes, seeds)
def test_what_the_prompt_decides_alone_does_not_move(n: list[int], seed: int) -> None:
    rollouts = batch(n, seed)
    rollouts = rollouts._replace(rewards=torch.cos(rollouts.group_ids.double()))
    scores, anchor = scored(rollouts, seed)
    moved = [
        float(f(scores, anchor, rollouts) - f(anchor, anchor, rollouts)) for f in (VARIATES[-1], expected_reward())
    ]
    assert abs(moved[0]) < 1e-14  # X − b is 0 up to a rounding or two of numbers below 1
    assert abs(moved[1]) > 1e-6


@pytest.mark.parametrize("o", VARIATES[4:8], ids=lambda o: o.name)
def test_the_control_variate_is_held_constant(o: Observable) -> None:
    rollouts = batch([2, 3], 2)
    scores, anchor = scored(rollouts, 2)
    apart = scores.logp - anchor.logp

    def with_an_anchor_that_moves_along(f: Observable, s: TokenScores) -> Tensor:  # so that the weights stand still
        return f(s, TokenScores(s.logp - apart, s.entropy), rollouts)

    # what is left is the derivative of Σ w x; nothing may flow through b
    found, expected = (
        torch.func.grad(lambda s, f=f: with_an_anchor_that_moves_along(f, s))(scores) for f in (o, plain(o))
    )
    for x, y in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@of_variates
def test_a_prompt_with_a_single_rollout_has_no_others(o: Observable) -> None:
    rollouts = batch([3, 2], 0)._replace(group_ids=torch.tensor([0, 0, 8, 1, 1]))
    with pytest.raises(InputError, match=r"1 of 3 prompts have a single one \(group 8\); draw at least two"):
        o(*scored(rollouts, 0), rollouts)
