"""The observables beside entropy: divergences without cancellation, control variates, and the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import funcprobe as fp
from funcprobe.data.rollouts import concatenate, take
from funcprobe.errors import InputError
from funcprobe.estimators.control_variate import leave_one_out
from funcprobe.estimators.custom import check_observable, observable
from funcprobe.estimators.divergence import forward_terms, kl, reverse_terms
from funcprobe.estimators.importance import log_ratios, sequence_weights
from funcprobe.estimators.observables import Entropy
from funcprobe.estimators.returns import expected_reward, mean_length
from funcprobe.types import Observable, Rollouts, TokenScores
from tests import models

EPS = torch.finfo(torch.float64).eps
VARIATES = (
    *(Entropy(o.integrand, o.weighting, o.per, control_variate=True) for o in fp.entropy_family()),
    expected_reward(control_variate=True),
)
EVERY = (*fp.entropy_family(), *VARIATES, expected_reward(), mean_length(), kl("after"), kl("before"))
of_every = pytest.mark.parametrize("o", EVERY, ids=lambda o: o.name)
of_variates = pytest.mark.parametrize("o", VARIATES, ids=lambda o: o.name)


def scored(rollouts: Rollouts, seed: int, spread: float = 0.3) -> tuple[TokenScores, TokenScores]:
    """Return (scores, anchor): random ones, `spread` nats apart."""
    g = torch.Generator().manual_seed(seed)
    mask = rollouts.completion_mask
    logp, entropy, moved, more = (torch.rand(mask.shape, generator=g, dtype=torch.float64) for _ in range(4))
    anchor = TokenScores(-3 * logp * mask, 2 * entropy * mask)
    moved = spread * (2 * moved - 1) * mask
    return TokenScores(anchor.logp + moved, anchor.entropy + spread * (more - 0.4) * mask), anchor


def batch(sizes: list[int], seed: int) -> Rollouts:
    """Return prompts of the given numbers of rollouts, ragged, with holes and rewards."""
    rollouts = models.rollouts(sum(sizes), seed, holes=True)
    groups = [10 * number for number, size in enumerate(sizes) for _ in range(size)]
    shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    return rollouts._replace(group_ids=torch.tensor(groups)[shuffled])  # a prompt's rollouts need not stand together


sizes = st.lists(st.integers(2, 4), min_size=2, max_size=4)
seeds = st.integers(0, 99)
few = settings(max_examples=8)  # of each of some twenty observables


# Divergences.


def reference(d: float, term: str) -> float:
    """Return a term of a divergence to some forty digits, rounded once."""
    with localcontext() as context:
        context.prec = 400  # enough for d² down to 1e-320, and for 1 + e^-700
        exact = Decimal(d)
        r = exact.exp()
        return float(r * exact - r + 1 if term == "reverse" else r - 1 - exact)


TERMS: dict[str, Callable[[Tensor], Tensor]] = {"reverse": reverse_terms, "forward": forward_terms}
#: What each term's first and second derivative is.
SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reverse": (lambda d: d * d.exp(), lambda d: (1 + d) * d.exp()),
    "forward": (torch.expm1, torch.exp),
}
FRIENDLY = [s * 10.0**-k for k in range(13) for s in (1, -1, 4.99, -4.99, 0.5000001, 2.7)]
HARD = [0.0, 0.5, -0.5, math.nextafter(0.5, 0), -math.nextafter(0.5, 0), 30.0, -30.0, 700.0, -700.0, -1e4, -1e300]


def check_term(term: str, d: Tensor) -> None:
    expected = torch.tensor([reference(x, term) for x in d.tolist()], dtype=torch.float64)
    # Worst just above |d| = 1/2, where a difference of two numbers below .83 leaves .1: eight times two roundings of
    # either. Below, Horner's rule adds terms that fall by a factor of six at least: its last few roundings.
    small = d.abs() < 0.5
    torch.testing.assert_close(TERMS[term](d), expected, rtol=16 * EPS, atol=0)
    torch.testing.assert_close(TERMS[term](d[small]), expected[small], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("term", TERMS)
def test_the_terms_of_a_divergence_lose_no_digits(term: str) -> None:
    check_term(term, torch.tensor([*FRIENDLY, *HARD], dtype=torch.float64))


@pytest.mark.parametrize("term", TERMS)
@given(d=st.floats(1e-150, 700), sign=st.sampled_from([1, -1]))
def test_nor_anywhere_between(term: str, d: float, sign: int) -> None:
    check_term(term, torch.tensor([sign * d, sign * math.sqrt(d), sign * d / 1400], dtype=torch.float64))


@pytest.mark.parametrize("term", TERMS)
def test_the_derivatives_of_the_terms_are_right_and_finite(term: str) -> None:
    d = torch.tensor([*FRIENDLY, *HARD], dtype=torch.float64)
    f, one = TERMS[term], torch.ones_like(d)

    def pushed(at: Tensor) -> Tensor:
        return torch.func.jvp(f, (at,), (one,))[1]

    first, second = torch.func.jvp(pushed, (d,), (one,))
    for found, exact in zip((first, second), SLOPES[term], strict=True):
        # as for the values, and once more; below -1 they fade or cross 0, where they are right to a rounding of 1
        for part, relative, absolute in ((d > -0.9, 32 * EPS, 0.0), (d <= -0.9, 0.0, 4 * EPS)):
            torch.testing.assert_close(found[part], exact(d)[part], rtol=relative, atol=absolute)
    each = torch.vmap(torch.func.grad(f))(d)
    torch.testing.assert_close(each, first, rtol=4 * EPS, atol=EPS)
    assert bool(torch.isfinite(torch.vmap(torch.func.grad(torch.func.grad(f)))(d)).all())


@given(sizes, seeds, st.sampled_from(["after", "before"]), st.floats(1e-9, 2.0))
def test_a_divergence_is_positive_and_has_no_first_order(n: list[int], seed: int, of: str, spread: float) -> None:
    rollouts = batch(n, seed)
    scores, anchor = scored(rollouts, seed, spread)
    divergence = kl(of)  # type: ignore[arg-type]
    assert float(divergence(scores, anchor, rollouts)) > 0
    assert float(divergence(anchor, anchor, rollouts)) == 0
    slope = torch.func.grad(lambda s: divergence(s, anchor, rollouts))(anchor)
    assert not slope.logp.any()
    assert not slope.entropy.any()


@given(sizes, seeds, st.sampled_from(["after", "before"]))
def test_a_divergence_falls_as_the_square_of_the_step(n: list[int], seed: int, of: str) -> None:
    rollouts = batch(n, seed)
    scores, anchor = scored(rollouts, seed, 1.0)
    divergence = kl(of)  # type: ignore[arg-type]

    def over_square(step: float) -> float:
        d = step * (scores.logp - anchor.logp)
        nearby = anchor._replace(logp=torch.zeros_like(d))
        # logp + d would round d at 1e-16, which is what a caller's scores do too; the law is about what follows
        return float(divergence(nearby._replace(logp=d), nearby, rollouts)) / step**2

    # the next order is a share of about `step`, d being at most 1 over at most 6 tokens
    assert math.isclose(over_square(1e-8), over_square(1e-7), rel_tol=1e-6)


# By hand.


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


# Control variates.


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


def both(o: Observable, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
    """Return [2]: the value, and the derivative along scores − anchor."""
    tangents = TokenScores(scores.logp - anchor.logp, scores.entropy - anchor.entropy)
    return torch.stack(torch.func.jvp(lambda s: o(s, anchor, rollouts), (scores,), (tangents,)))  # type: ignore[arg-type]


def rows_of(scores: TokenScores, rows: Tensor, width: int) -> TokenScores:
    return TokenScores(scores.logp[rows, :width], scores.entropy[rows, :width])


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


# What all of them are.


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
        assert o.weighting in ("sequence", "per_decision")
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


# Bad input, and the user's own.


def test_rewards_that_are_missing_are_asked_for() -> None:
    rollouts = batch([2, 2], 0)._replace(rewards=None)
    scores, anchor = scored(rollouts, 0)
    with pytest.raises(InputError, match="needs rewards, and these rollouts carry none; give one number a row"):
        expected_reward()(scores, anchor, rollouts)


@of_variates
def test_a_prompt_with_a_single_rollout_has_no_others(o: Observable) -> None:
    rollouts = batch([3, 2], 0)._replace(group_ids=torch.tensor([0, 0, 8, 1, 1]))
    with pytest.raises(InputError, match=r"1 of 3 prompts have a single one \(group 8\); draw at least two"):
        o(*scored(rollouts, 0), rollouts)


def test_an_unknown_direction_is_named() -> None:
    with pytest.raises(InputError, match="unknown of 'forward'; expected 'after' or 'before'"):
        kl("forward")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown weighting 'token'"):
        observable("x", "y", weighting="token")  # type: ignore[arg-type]


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
    with pytest.raises(InputError, match="is no observable: it needs name, unit and stats"):
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
