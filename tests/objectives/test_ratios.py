"""Ratios of any size: every loss and gradient against arithmetic that has no largest number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import objectives
from funcprobe.errors import NumericsError
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.ratios import LARGEST
from funcprobe.types import Rollouts, TokenScores
from tests.cases import models
from tests.cases.tables import OBJECTIVES, PLAIN

#: Objectives that differ in how a ratio enters; what picks tokens by rank has no exact counterpart here.
EVERY = (
    *PLAIN,
    *("rloo, delta", "rloo, kl", "grpo, delta", "grpo, low delta", "grpo, kl", "grpo, kl without the ratio"),
    *("cispo, kl", "drop_negatives", "entropy_bonus over rloo"),
)

#: Log-ratios of a token, nats.
SIZES = {"huge": 800.0, "nearly huge": 320.0, "moderate": 0.1, "one": 0.0, "tiny": -800.0}

LOGP = torch.tensor([[-1.0, -2.0], [-0.5, -1.5], [-0.7, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True], [True, True], [True, False]])


def batch(size: float, advantage: float, reference: float = 0.4) -> tuple[TokenScores, Rollouts]:
    """Return three rows, the first with log-ratios of that size a token."""
    old = LOGP - torch.tensor([[size, size + 0.01], [0.05, -0.3], [0.2, 0.0]], dtype=torch.float64)
    rollouts = Rollouts(
        ids=torch.zeros(3, 3, dtype=torch.int64),
        attention_mask=torch.ones(3, 3, dtype=torch.bool),
        prompt_lengths=torch.ones(3, dtype=torch.int64),
        completion_mask=MASK,
        temperature=torch.ones(3, dtype=torch.float64),
        group_ids=torch.zeros(3, dtype=torch.int64),
        weight=torch.ones(3, dtype=torch.float64),
        advantages=torch.tensor([advantage, -0.5, 1.2], dtype=torch.float64),
        old_logps=old,
        ref_logps=LOGP + torch.tensor([[reference, -0.2], [0.3, 0.1], [-0.4, 0.0]], dtype=torch.float64),
    )
    return TokenScores(LOGP, 0.8 * MASK.double()), rollouts


def exact(o: PolicyGradient, rollouts: Rollouts) -> tuple[Any, dict[tuple[int, int], Any]]:
    """Return loss and gradient in the log-probabilities, by loops over numbers of any size."""
    weights = o.token_weights(rollouts)
    places = [(row, t) for row, t in MASK.nonzero().tolist()]
    total, slopes = mpmath.mpf(0), dict.fromkeys(places, mpmath.mpf(0))

    def at(field: Tensor | None, *place: int) -> Any:
        assert field is not None
        return mpmath.mpf(float(field[place]))

    for row, t in places:
        mine = [p for p in places if p[0] == row]
        share = {"token": {(row, t): 1}}.get(o.ratio, {p: mpmath.mpf(1) / len(mine) for p in mine})
        share = dict.fromkeys(mine, 1) if o.ratio == "sequence_sum" else share
        log_r = mpmath.fsum(c * (at(LOGP, *p) - at(rollouts.old_logps, *p)) for p, c in share.items())
        r, a, y, w = mpmath.exp(log_r), at(rollouts.advantages, row), at(LOGP, row, t), at(weights, row, t)
        value, by_log_r, by_y = surrogate(o, r, a, y)
        scale = -w / (len(mine) if o.ratio == "sequence_sum" else 1)
        scale *= 0 if any(m.name == "drop_negatives" for m in o.modifiers) and a < 0 else 1
        total += scale * value - w * sum(mpmath.mpf(m.entropy_coef) * mpmath.mpf(0.8) for m in o.modifiers if m.adds)
        d = at(rollouts.ref_logps, row, t) - y
        k3, factor = mpmath.exp(d) - d - 1, r if o.use_bias_correction_kl else mpmath.mpf(1)
        total += w * o.beta * k3 * factor
        slopes[row, t] += scale * by_y + w * o.beta * factor * (1 - mpmath.exp(d))
        for p, c in share.items():
            slopes[p] += c * (scale * by_log_r + (w * o.beta * k3 * r if o.use_bias_correction_kl else 0))
    return total, slopes


def surrogate(o: PolicyGradient, r: Any, a: Any, y: Any) -> tuple[Any, Any, Any]:
    """Return what a token's loss maximises, its slope in log r and its slope in log π."""
    if o.surrogate == "log_prob":
        return a * y, 0, a
    high = mpmath.mpf(o.epsilon if o.epsilon_high is None else o.epsilon_high)
    if o.surrogate == "capped":
        return min(r, high) * a * y, 0, min(r, high) * a
    free = r if o.delta is None else min(r, mpmath.mpf(o.delta))
    inside = 1 - mpmath.mpf(o.epsilon) <= r <= 1 + high
    clipped = min(max(r, 1 - mpmath.mpf(o.epsilon)), 1 + high)
    if inside and free == r:
        return r * a, r * a, 0
    if free * a < clipped * a:
        return free * a, r * a if free == r else 0, 0
    return clipped * a, r * a if inside else 0, 0


def found(o: PolicyGradient, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return loss, gradient and info, as the engine takes them: differentiate first, then the value."""
    prepared = o.prepare(rollouts)
    slope = torch.func.grad(lambda y: o(scores._replace(logp=y), prepared)[0])(scores.logp)
    loss, info = o(scores, prepared)
    return loss, slope, info


@pytest.mark.parametrize("name", EVERY)
def test_loss_and_gradient_are_exact_or_refused_with_the_row(name: str) -> None:
    o, refused = OBJECTIVES[name], 0
    for (size, log), a in itertools.product(SIZES.items(), (0.7, -0.7, 0.0)):
        scores, rollouts = batch(log, a)
        with mpmath.workdps(900):
            loss, slopes = exact(o, rollouts)
            # beyond e^LARGEST, less a weight of 1/6 and an advantage of .7, the loss is refused
            if any(abs(x) > mpmath.exp(LARGEST - 5) for x in (loss, *slopes.values())):
                refused += 1
                with pytest.raises(NumericsError, match=r"^Row 0: .* is e\^\d+[\d.]*, which float64 does not hold"):
                    found(o, scores, rollouts)
                continue
            value, gradient, info = found(o, scores, rollouts)
            # rounding of log r, some 1e-13 at 1600 nats, is relative in r; k3 at .1 loses two digits
            where = f"{size}, A = {a}"
            assert float(value) == pytest.approx(float(loss), rel=1e-11, abs=1e-13), where
            for place, slope in slopes.items():
                assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-11, abs=1e-13), (where, place)
            assert all(bool(torch.isfinite(x)) for x in info.values()), where
            if size == "huge" and a >= 0 and o.surrogate == "clip" and not o.beta:
                assert not bool(gradient[0].any()), where
    free = o.surrogate == "clip" and o.delta is None and not any(m.name == "drop_negatives" for m in o.modifiers)
    assert (refused > 0) == (free or (o.beta != 0 and o.use_bias_correction_kl))


@pytest.mark.parametrize(
    ("log", "reference", "finite"),
    [(-800.0, 750.0, True), (-300.0, 900.0, True), (-5.0, 900.0, False), (0.0, 900.0, False)],
)
def test_the_kl_term_is_the_product_though_a_factor_is_too_large(log: float, reference: float, finite: bool) -> None:
    scores, rollouts = batch(log, 0.7, reference)
    o = objectives.grpo(beta=0.3)
    if not finite:
        with pytest.raises(NumericsError, match="Row 0: the KL term to the reference is e"):
            found(o, scores, rollouts)
        return
    with mpmath.workdps(900):
        loss, slopes = exact(o, rollouts)
    value, gradient, info = found(o, scores, rollouts)
    assert float(value) == pytest.approx(float(loss), rel=1e-11)
    for place, slope in slopes.items():
        assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-11, abs=1e-13)
    assert bool(torch.isfinite(info["kl"]))


@pytest.mark.parametrize("name", ["rloo", "grpo", "gspo", "grpo, kl"])
def test_a_row_of_weight_0_has_no_say_however_stale(name: str) -> None:
    o = OBJECTIVES[name]
    scores, rollouts = batch(900.0, -0.7, 900.0)
    rollouts = rollouts._replace(weight=torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    value, gradient, _ = found(o, scores, rollouts)
    mild_scores, mild = batch(0.1, -0.7)
    expected, slope, _ = found(o, mild_scores, mild._replace(weight=rollouts.weight))
    assert torch.equal(value, expected)
    assert torch.equal(gradient, slope)


@pytest.mark.parametrize("build", [objectives.clip_cov, objectives.kl_cov, objectives.top_entropy_quantile])
def test_modifiers_that_rank_tokens_leave_a_held_ratio_without_gradient(build: Callable[..., Any]) -> None:
    scores, rollouts = batch(800.0, 0.7)
    value, gradient, info = found(build("rloo"), scores, rollouts)
    assert bool(torch.isfinite(gradient).all())
    assert bool(torch.isfinite(value))
    assert all(bool(torch.isfinite(x)) for x in info.values())
    if build is not objectives.kl_cov:  # whose penalty is the log-ratio itself
        assert not bool(gradient[0].any())


def test_a_step_names_the_row_of_the_whole_batch_though_it_runs_by_slices() -> None:
    policy, params = fp.from_module(models.two_lines())
    rollouts = models.rollouts(9)
    lengths = rollouts.completion_mask.sum(1, keepdim=True)
    stale = torch.where(torch.arange(9)[:, None] == 6, -900.0 / lengths - 4.0, -2.0) * rollouts.completion_mask
    rewards = torch.where(torch.arange(9) == 6, -1.0, 1.0).double()
    given = rollouts._replace(old_logps=stale, rewards=rewards)
    for microbatch in (None, 2):
        step = fp.make_step(policy, fp.rloo(), fp.sgd(0.1), microbatch=microbatch)
        with pytest.raises(NumericsError, match=r"^Row 6: the importance ratio is e\^\d{3}"):
            step.gradient(params, given)
        gradient, info = step.gradient(params, given._replace(rewards=-rewards))
        assert all(bool(torch.isfinite(g).all()) for g in gradient.values())
        assert info["loss"] == info["loss"]
