"""Divergences lose no digits, have no first order, and fall as the square of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.estimators.divergence import forward_terms, kl, reverse_terms
from tests.cases.observables import batch, scored, seeds, sizes

EPS = torch.finfo(torch.float64).eps


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
