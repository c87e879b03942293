"""Observables of the user's own, and what a mistaken one is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.estimators.custom import check_observable, observable
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.importance import log_ratios, sequence_weights
from funcprobe.estimators.returns import expected_reward, mean_length
from funcprobe.types import Observable, Rollouts, TokenScores
from tests.cases import models
from tests.cases.observables import batch, scored


def second_moment(scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
    w = sequence_weights(log_ratios(scores, anchor, rollouts), rollouts.weight)
    return (w * scores.extra["peak"].sum(1)).sum()


def test_an_observable_of_ones_own_carries_its_options() -> None:
    peak = {"peak": lambda log_probs, token: log_probs.exp().amax(-1)}
    made = observable("peaks", "probability per sequence", stats=peak, weighting="per_decision")(second_moment)
    assert (made.name, made.unit, made.weighting, made.stats) == (
        "peaks",
        "probability per sequence",
        "per_decision",
        peak,
    )
    policy, params = fp.from_module(models.two_lines())
    rollouts = models.rollouts()
    measured = fp.anchored(made, policy, rollouts, params)
    scores = fp.score(policy, params, rollouts, made.stats)
    assert float(measured(params)) == pytest.approx(float(scores.extra["peak"].sum(1).mean()), rel=1e-12)
    check_observable(made, scores, rollouts)


def mistaken(function: Callable[..., object]) -> Observable:
    return observable("mine", "nats")(function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda s, a, r: s.entropy.sum(1), r"'mine' returned a tensor of shape \[5\]; expected a scalar"),
        (lambda s, a, r: float(s.entropy.detach().sum()), "returned a float; expected a scalar tensor"),
        (lambda s, a, r: None, "returned a NoneType; expected a scalar tensor"),
        (lambda s, a, r: (s.logp > -1).sum(), "dtype torch.int64; expected a floating-point one"),
        (lambda s, a, r: s.entropy.sum() / 0, "returned inf at the anchor"),
        (lambda s, a, r: (s.logp - s.logp).sum().log(), "returned -inf at the anchor"),
        (lambda s, a, r: (s.logp > -1).double().mean(), "does not depend on the scores"),
        (lambda s, a, r: a.entropy.mean(), "does not depend on the scores"),
        (lambda s, a, r: s.entropy.detach().mean(), "does not depend on the scores"),
        (lambda s, a, r: r.rewards.mean(), "does not depend on the scores"),
        (lambda s, a, r: torch.ones((), requires_grad=True) * 2, "does not depend on the scores"),
        (lambda s, a, r: kl()(s, a, r).sqrt(), "derivative is not finite at the anchor"),
    ],
)
def test_a_mistaken_observable_is_told_what_it_returned(function: Callable[..., object], said: str) -> None:
    rollouts = batch([2, 3], 0)
    with pytest.raises(InputError, match=said):
        check_observable(mistaken(function), scored(rollouts, 0)[1], rollouts)


def test_a_bare_function_is_told_to_be_decorated() -> None:
    rollouts = batch([2, 3], 0)
    with pytest.raises(InputError, match="is no observable: it needs name, unit, stats, weighting"):
        check_observable(second_moment, scored(rollouts, 0)[1], rollouts)  # type: ignore[arg-type]


def test_what_happens_not_to_move_is_still_an_observable() -> None:
    rollouts = batch([2, 3], 0)
    _, anchor = scored(rollouts, 0)
    for rewards in (0.0, 1.0):  # nothing solved, or everything
        check_observable(expected_reward(), anchor, rollouts._replace(rewards=torch.full((5,), rewards).double()))
    fixed = fp.rollouts_from_lists([[1]] * 3, [[2, 3]] * 3, temperature=1.0)  # one length for all
    check_observable(mean_length(), scored(fixed, 0)[1], fixed)


def test_checking_changes_nothing_and_works_without_grad_mode() -> None:
    rollouts = batch([2, 3], 0)
    _, anchor = scored(rollouts, 0)
    copies = [x.clone() for x in anchor[:2]]
    with torch.no_grad():
        check_observable(fp.entropy(), anchor, rollouts)
    assert all(torch.equal(x, y) for x, y in zip(anchor[:2], copies, strict=True))
    assert not any(x.requires_grad or x.grad is not None for x in anchor[:2])
