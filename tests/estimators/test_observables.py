"""What every observable is: pure, weighted by prompts, indifferent to the order of rows; and some by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

import funcprobe as fp
from funcprobe.data.rollouts import concatenate, take
from funcprobe.errors import InputError
from funcprobe.estimators.custom import check_observable, observable
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.returns import expected_reward, mean_length
from funcprobe.types import Observable, TokenScores
from tests.cases.observables import EVERY, VARIATES, batch, both, few, of_every, rows_of, scored, seeds, sizes


def test_reward_length_and_divergences_by_hand() -> None:
    # ratios of the tokens 2, 3 | 1, 1, 5 of two rows of weights 1 and 3, the first one token shorter
    d = torch.tensor([[math.log(2.0), math.log(3.0), 0.0], [0.0, 0.0, math.log(5.0)]], dtype=torch.float64)
    rollouts = fp.rollouts_from_lists([[1], [1]], [[2, 3], [2, 3, 4]], temperature=1.0, weight=[1, 3], rewards=[7, 2])
    scores, anchor = TokenScores(d, 0 * d), TokenScores(0 * d, 0 * d)
    two, three, five = (r * math.log(r) - r + 1 for r in (2, 3, 5))
    expected = {
        expected_reward(): (6 * 7 + 15 * 2) / 21,
        mean_length(): 1 + 1 + 3 / 9,  # weights 1 : 3, 2 : 3, 6 : 3
        kl("after"): two / 4 + three * 2 / 5 + five * 3 / 9,
        kl("before"): (2 + 3 - 2 - math.log(6)) / 4 + 3 * (5 - 1 - math.log(5)) / 4,
    }
    for o, value in expected.items():
        assert math.isclose(float(o(scores, anchor, rollouts)), value, rel_tol=1e-14), o.name


@of_every
@few
@given(sizes, seeds)
def test_a_prompt_of_weight_zero_is_absent(o: Observable, n: list[int], seed: int) -> None:
    rollouts = batch(n, seed)
    scores, anchor = scored(rollouts, seed)
    kept = rollouts.group_ids != 0
    emptied = rollouts._replace(weight=rollouts.weight * kept)
    rows = kept.nonzero().squeeze(1)
    smaller = take(rollouts, rows)
    width = smaller.completion_mask.shape[1]
    expected = both(o, rows_of(scores, rows, width), rows_of(anchor, rows, width), smaller)
    # sums of up to sixteen rows in another order
    torch.testing.assert_close(both(o, scores, anchor, emptied), expected, rtol=1e-12, atol=1e-13)


@of_every
@few
@given(sizes, seeds)
def test_a_prompt_of_weight_two_is_the_prompt_twice(o: Observable, n: list[int], seed: int) -> None:
    rollouts = batch(n, seed)
    scores, anchor = scored(rollouts, seed)
    again = (rollouts.group_ids == 0).nonzero().squeeze(1)
    weight = torch.where(rollouts.group_ids == 0, 2.0, 1.0).double()
    copied = take(rollouts, again)._replace(group_ids=torch.full((len(again),), -1))
    rows = torch.cat([torch.arange(sum(n)), again])
    expected = both(o, *(rows_of(s, rows, s.logp.shape[1]) for s in (scores, anchor)), concatenate([rollouts, copied]))
    found = both(o, scores, anchor, rollouts._replace(weight=weight))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@of_every
def test_many_weights_at_once_are_one_after_another(o: Observable) -> None:
    rollouts = batch([2, 3, 4], 5)
    scores, anchor = scored(rollouts, 5)
    without = [(rollouts.group_ids != group).double() for group in (0, 10, 20)]
    weights = torch.stack([*without, torch.where(rollouts.group_ids == 10, 3.0, 1.0).double()])

    def at(weight: Tensor) -> Tensor:
        return both(o, scores, anchor, rollouts._replace(weight=weight))

    expected = torch.stack([at(weight) for weight in weights])
    torch.testing.assert_close(torch.vmap(at)(weights), expected, rtol=1e-13, atol=1e-14)
    assert bool((expected.std(0) > 1e-4).all())  # so that ignoring the weight would be seen
    slope = torch.func.grad(lambda weight: at(weight)[0])(weights[3])
    assert bool(torch.isfinite(slope).all())
    assert bool(torch.isfinite(torch.func.grad(lambda weight: at(weight)[0])(weights[0])).all())


@of_every
@few
@given(sizes, seeds)
def test_the_order_of_rows_does_not_matter_and_nothing_is_changed(o: Observable, n: list[int], seed: int) -> None:
    rollouts = batch(n, seed)
    scores, anchor = scored(rollouts, seed)
    before = [x.clone() for s in (scores, anchor) for x in (s.logp, s.entropy)]
    found = both(o, scores, anchor, rollouts)
    turned = torch.randperm(sum(n), generator=torch.Generator().manual_seed(seed))
    width = scores.logp.shape[1]
    expected = both(o, rows_of(scores, turned, width), rows_of(anchor, turned, width), take(rollouts, turned))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    after = [x for s in (scores, anchor) for x in (s.logp, s.entropy)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_observable_keeps_the_contract() -> None:
    for o in EVERY:
        assert isinstance(o, Observable)
        assert o.weighting in ("sequence", "per_decision", "none")
        assert isinstance(hash(o), int)
        check_observable(o, scored(batch([2, 3], 1), 1)[1], batch([2, 3], 1))
    assert len({o.name for o in EVERY}) == len(EVERY)
    assert [(o.name, o.unit) for o in EVERY[-4:]] == [
        ("expected reward", "reward"),
        ("mean length", "tokens"),
        ("kl(after‖before)", "nats per sequence"),
        ("kl(before‖after)", "nats per sequence"),
    ]
    assert fp.entropy(control_variate=True) == VARIATES[0] != fp.entropy()  # type: ignore[call-arg]
    assert fp.entropy(control_variate=True).name == "rao_blackwell/per_decision/token/control_variate"
    assert len(fp.entropy_family()) == 8


def test_rewards_that_are_missing_are_asked_for() -> None:
    rollouts = batch([2, 2], 0)._replace(rewards=None)
    scores, anchor = scored(rollouts, 0)
    with pytest.raises(InputError, match="needs rewards, and these rollouts carry none; give one number a row"):
        expected_reward()(scores, anchor, rollouts)


def test_an_unknown_direction_is_named() -> None:
    with pytest.raises(InputError, match="unknown of 'forward'; expected 'after' or 'before'"):
        kl("forward")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown weighting 'token'"):
        observable("x", "y", weighting="token")  # type: ignore[arg-type]
