"""Which tokens are picked, in numbers written by hand, and what a pick by covariance or by entropy promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.errors import FuncprobeWarning
from funcprobe.objectives.by_name import objective
from funcprobe.objectives.losses import grpo
from funcprobe.objectives.modifiers import Modifier, TokenTerms
from funcprobe.objectives.token_selection import ClipCov, KlCov, TopEntropyQuantile, covariance
from funcprobe.types import TokenScores
from tests.cases.scored import Batch, batch, law
from tests.oracles.variants import terms_of, value_and_gradient

# Sums of at most 30 terms below 100 in float64: 30 · 100 · 2^-53 < 1e-12.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def test_the_draw_follows_the_place_of_a_token_and_not_the_token() -> None:
    every = ClipCov(0.25, -50.0, 50.0, seed=1)  # every token is a candidate
    case = batch(torch.ones(6, 4, dtype=torch.bool), 2, old=False)
    chosen = dropped(every, case)
    assert int(chosen.sum()) == 6
    turned = case._replace(scores=TokenScores(case.scores.logp.flip(0), case.scores.entropy.flip(0)))
    assert torch.equal(dropped(every, turned), chosen)
    assert not torch.equal(dropped(replace(every, seed=2), case), chosen)


def dropped(modifier: Modifier, case: Batch) -> Tensor:
    """Where the surrogate has no gradient any more, A not being 0."""
    loss = replace(grpo(), modifiers=(modifier,))
    return (value_and_gradient(loss, *reversed(case))[1].logp == 0) & case.rollouts.completion_mask


def test_candidates_are_drawn_alike_and_as_many_as_said() -> None:
    case = batch(torch.ones(4, 5, dtype=torch.bool), 7, old=False)
    loss, draws = grpo(), 600
    candidates = covariance(terms_of(loss, case)) > 0.0
    count, number = int(candidates.sum()), 4
    assert count > 2 * number
    hits = torch.zeros(4, 5, dtype=torch.float64)
    for seed in range(draws):
        chosen = ClipCov(0.2, 0.0, 50.0, seed)(terms_of(loss, case)).chosen
        assert chosen is not None
        assert int(chosen.sum()) == number
        hits += chosen
    assert not bool(hits[~candidates].any())
    share = number / count
    error = math.sqrt(draws * share * (1 - share))  # of one count; the largest of at most 20 stays within 4
    assert bool(((hits[candidates] - draws * share).abs() < 4 * error).all())


def test_where_no_covariance_lies_between_the_bounds_the_loss_is_the_base_s() -> None:
    case = batch([[True, True], [True, True]], 4)
    value, info = objective("clip_cov", clip_cov_lb=40.0, clip_cov_ub=50.0)(case.scores, case.rollouts)
    assert torch.equal(value, grpo()(case.scores, case.rollouts)[0])
    assert float(info["clip_cov_fraction"]) == 0.0


def test_a_clipped_token_is_no_candidate() -> None:
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    rollouts, scores = batch(torch.ones(2, 2, dtype=torch.bool), advantages=advantages)
    ratios = torch.tensor([[1.5, 1.0], [0.5, 1.0]], dtype=torch.float64)
    case = Batch(rollouts._replace(old_logps=scores.logp - ratios.log()), scores)
    terms = terms_of(grpo(), case)
    assert terms.clipped.tolist() == [[True, False], [True, False]]
    chosen = ClipCov(1.0, -50.0, 50.0)(terms).chosen
    assert chosen.tolist() == [[False, True], [False, True]]


def test_shares_are_taken_of_the_number_as_it_is_written() -> None:
    case = batch(torch.ones(4, 25, dtype=torch.bool), 1)
    for ratio, number in ((0.29, 29), (0.001, 1), (1.0, 100)):  # 0.29 · 100 is 28.999999999999996 in floats
        assert int(KlCov(ratio)(terms_of(grpo(), case)).chosen.sum()) == number


def test_the_numbers_of_the_quantile_rule() -> None:
    """Ten tokens at a quantile of .8: the position is 7.2, and two tokens train; ties with the threshold train."""
    entropy = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.7, 0.8, 0.9, 1.0, 1.1, 1.2]], dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    case = batch(mask, 1)
    terms = terms_of(grpo(), case._replace(scores=case.scores._replace(entropy=entropy)))
    found = {share: TopEntropyQuantile(share)(terms).keep for share in (0.2, 0.0, 1.0, 0.7)}
    assert (entropy[mask & found[0.2].bool()]).tolist() == [0.9, 1.0]
    assert (entropy[mask & found[0.0].bool()]).tolist() == [1.0]
    assert bool(found[1.0].all())
    # n = 11, 1 − 0.7 is 0.30000000000000004 in floats: position 3 all the same, and the fourth token trains
    eleven = batch(torch.ones(1, 11, dtype=torch.bool), group_ids=torch.zeros(1), advantages=torch.ones(1).double())
    terms = terms_of(grpo(), eleven)._replace(entropy=torch.arange(11).double()[None])
    assert TopEntropyQuantile(0.7)(terms).keep[0].tolist() == [0.0] * 3 + [1.0] * 8
    tied = terms._replace(entropy=torch.full((1, 11), 0.5, dtype=torch.float64))
    assert bool(TopEntropyQuantile(0.0)(tied).keep.all())


@given(values=st.lists(st.floats(0, 5), min_size=1, max_size=40), share=st.floats(0, 1))
@law
def test_the_rank_stands_for_the_interpolated_quantile(values: list[float], share: float) -> None:
    entropy = torch.tensor([values], dtype=torch.float64)
    one = torch.ones_like(entropy)
    terms = TokenTerms(one, one, one, one, entropy, one > 1, one > 0)
    keep = TopEntropyQuantile(share)(terms).keep.bool()
    threshold = torch.quantile(entropy, 1 - share)
    away = (entropy - threshold).abs() > 1e-9  # at the threshold torch's rounding decides
    assert torch.equal(keep[away], (entropy >= threshold)[away])
    assert int(keep.sum()) >= max(1, math.ceil(share * len(values)) - 1)


def test_kl_cov_in_a_first_step_says_that_it_changes_nothing() -> None:
    case = batch(torch.ones(4, 5, dtype=torch.bool), 3, old=False)
    loss = objective("kl_cov", kl_cov_ratio=0.5, ppo_kl_coef=100.0)
    with pytest.warns(FuncprobeWarning, match=r"no old_logps.*kl_cov changes nothing in a first step"):
        prepared = loss.prepare(case.rollouts)
    plain = value_and_gradient(grpo(), case.scores, prepared)
    found = value_and_gradient(loss, case.scores, prepared)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1].logp, plain[1].logp)
    assert float(loss(case.scores, prepared)[1]["kl_cov_fraction"]) == 0.5


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_kl_cov_has_a_kink_at_the_old_policy(sign: float) -> None:
    rollouts, scores = batch(torch.ones(4, 5, dtype=torch.bool), 3)
    loss = objective("kl_cov", kl_cov_ratio=0.5, ppo_kl_coef=1.0)
    near = loss.prepare(rollouts._replace(old_logps=scores.logp - sign * 1e-12))
    added = value_and_gradient(loss, scores, near)[1].logp - value_and_gradient(grpo(), scores, near)[1].logp
    chosen = loss.modifiers[0](terms_of(grpo(), Batch(near, scores))).chosen
    # the whole coefficient, times the weight of the token, with the sign of a difference of 1e-12
    torch.testing.assert_close(added, sign * chosen.double() / 20, **CLOSE)


def test_a_wide_clip_range_gives_the_unclipped_loss_of_the_paper() -> None:
    rollouts, scores = batch(torch.ones(4, 5, dtype=torch.bool), 3, spread=1.0)
    loss = objective("kl_cov", base="bnpo", epsilon=1e9, kl_cov_ratio=0.2)
    prepared = loss.prepare(rollouts)
    ratio = torch.exp(scores.logp - rollouts.old_logps)
    chosen = loss.modifiers[0](terms_of(grpo(), Batch(prepared, scores))).chosen
    paper = -ratio * prepared.advantages[:, None] + chosen * (scores.logp - rollouts.old_logps).abs()
    torch.testing.assert_close(loss(scores, prepared)[0], paper.mean(), **CLOSE)
    assert float(loss(scores, prepared)[1]["clip_fraction"]) == 0.0


def test_a_covariance_has_no_gradient() -> None:
    case = batch([[True, True], [True, False]], 4, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64))
    scores = TokenScores(case.scores.logp.clone().requires_grad_(), case.scores.entropy)
    terms = terms_of(grpo(), case._replace(scores=scores))
    assert terms.logp.requires_grad
    assert not covariance(terms).requires_grad
    same = terms._replace(advantage=torch.full((2, 2), 0.1, dtype=torch.float64))
    assert not bool(covariance(same)[same.counted].any())  # though three times 0.1 is not 0.3
