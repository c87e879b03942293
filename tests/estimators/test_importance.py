"""Weights and entropies on hand-written 2 x 3 tensors, and the health of weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.estimators import importance
from funcprobe.types import TokenScores

D = torch.tensor([[math.log(2.0), math.log(3.0), 0.0], [0.0, 0.0, math.log(5.0)]], dtype=torch.float64)
A = torch.tensor([1.0, 3.0], dtype=torch.float64)


def by_hand() -> fp.Rollouts:
    """Return two rows, the first one token shorter."""
    return fp.rollouts_from_lists([[1], [1]], [[2, 3], [2, 3, 4]], temperature=1.0, weight=A.tolist())


def test_sequence_weights_by_hand() -> None:
    # a e^Σd: 1·6 and 3·5
    torch.testing.assert_close(importance.sequence_weights(D, A), torch.tensor([6.0, 15.0]).double() / 21)


def test_prefix_weights_by_hand() -> None:
    # s < t: 1·1 : 3·1, then 1·2 : 3·1, then 1·6 : 3·1; s ≤ t: 2 : 3, 6 : 3, 6 : 15. The row that ended takes part.
    strict = torch.tensor([[1 / 4, 2 / 5, 6 / 9], [3 / 4, 3 / 5, 3 / 9]], dtype=torch.float64)
    inclusive = torch.tensor([[2 / 5, 6 / 9, 6 / 21], [3 / 5, 3 / 9, 15 / 21]], dtype=torch.float64)
    torch.testing.assert_close(importance.prefix_weights(D, A), strict)
    torch.testing.assert_close(importance.prefix_weights(D, A, inclusive=True), inclusive)


def test_the_family_by_hand() -> None:
    rollouts = by_hand()
    zero = torch.zeros_like(D)
    anchor = TokenScores(zero, zero)
    h = torch.tensor([[0.1, 0.2, 0.0], [0.4, 0.5, 0.6]], dtype=torch.float64)
    scores = TokenScores(D * rollouts.completion_mask, h)
    w = [6 / 21, 15 / 21]
    sequence = w[0] * 0.3 + w[1] * 1.5
    prefix = (0.1 + 3 * 0.4) / 4 + (2 * 0.2 + 3 * 0.5) / 5 + 3 / 9 * 0.6
    tokens = 1 + 1 + 3 / 9
    surprisal = -((2 * math.log(2) + 3 * 0) / 5 + (6 * math.log(3)) / 9 + 15 * math.log(5) / 21)
    expected = {
        "rao_blackwell/sequence/sequence": sequence,
        "rao_blackwell/sequence/token": sequence / (w[0] * 2 + w[1] * 3),
        "rao_blackwell/per_decision/sequence": prefix,
        "rao_blackwell/per_decision/token": prefix / tokens,
        "surprisal/sequence/sequence": -(w[0] * math.log(6) + w[1] * math.log(5)),
        "surprisal/sequence/token": -(w[0] * math.log(6) + w[1] * math.log(5)) / (w[0] * 2 + w[1] * 3),
        "surprisal/per_decision/sequence": surprisal,
        "surprisal/per_decision/token": surprisal / tokens,
    }
    found = {o.name: float(o(scores, anchor, rollouts)) for o in fp.entropy_family()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-14), (name, found[name], value)


@given(st.integers(1, 6), st.integers(1, 5), st.floats(-700, 700), st.integers(0, 99))
def test_weights_are_a_distribution_whatever_the_scale(rows: int, width: int, shift: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(rows, width, generator=g, dtype=torch.float64) * 50
    a = torch.rand(rows, generator=g, dtype=torch.float64)
    a[0] = 0.0 if rows > 1 else 1.0
    w, prefix = importance.sequence_weights(d, a), importance.prefix_weights(d, a)
    assert math.isclose(float(w.sum()), 1.0, rel_tol=1e-14)
    torch.testing.assert_close(prefix.sum(0), torch.ones(width, dtype=torch.float64), rtol=1e-14, atol=0)
    assert rows == 1 or float(w[0]) == 0.0
    # a constant on every log-weight cancels; the exponents are rounded at 700·1e-16 each, times width
    d[:, 0] += shift
    torch.testing.assert_close(importance.sequence_weights(d, a), w, rtol=1e-10, atol=1e-12)


def test_an_absent_row_cannot_drown_the_others() -> None:
    d = torch.tensor([[2000.0], [0.0], [math.log(3.0)]], dtype=torch.float64)
    a = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(importance.sequence_weights(d, a), torch.tensor([0.0, 0.25, 0.75]).double())


@given(st.integers(1, 8), st.integers(0, 99))
def test_ess_lies_between_one_and_n(rows: int, seed: int) -> None:
    w = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-9
    assert 1 - 1e-12 <= float(importance.effective_sample_size(w)) <= rows + 1e-12
    assert math.isclose(float(importance.effective_sample_size(torch.full_like(w, 0.3))), rows, rel_tol=1e-12)


def test_ess_among_nobody_is_zero() -> None:
    w, none = torch.ones(3, 2), torch.tensor([[1, 0], [1, 0], [0, 0]])
    assert importance.effective_sample_size(w, none).tolist() == [2.0, 0.0]


def test_health_by_hand() -> None:
    health = importance.weight_health(D, by_hand())
    assert math.isclose(health.ess_sequence, 21**2 / (36 + 225))
    assert math.isclose(health.ess_base, 16 / 10)
    assert math.isclose(health.ess_prefix_min, min(16 / 10, 25 / 13, 81 / 45))
    assert math.isclose(health.ess_contributing_min, 1.0)  # the third token is the second row's alone
    assert math.isclose(health.ess_inclusive_min, min(25 / 13, 81 / 45, 441 / 261))
    one_token = fp.rollouts_from_lists([[1]] * 10, [[2]] * 10, temperature=1.0)
    outlier = importance.weight_health(torch.eye(10, dtype=torch.float64)[:, :1] * 20, one_token)
    assert math.isclose(outlier.fraction("per_decision"), 1.0)  # no prefix, nothing to weigh
    assert outlier.fraction("per_decision", inclusive=True) < 0.11  # a surprisal weighs the token itself
    assert math.isclose(health.fraction("sequence"), health.ess_sequence / 1.6)
    assert math.isclose(health.log_weight_max, math.log(6))
    assert health.khat is None  # two rows have no tail


@pytest.mark.parametrize("true_k", [0.2, 0.9])
def test_khat_finds_the_tail(true_k: float) -> None:
    # inverse-CDF quantiles of a generalised Pareto tail: no noise of sampling, so the fit is close
    n = 20_000
    u = (np.arange(n) + 0.5) / n
    log_weights = torch.tensor(np.log(((1 - u) ** -true_k - 1) / true_k + 1e-3))
    found = importance.pareto_khat(log_weights)
    assert found is not None
    # the fit uses 3 sqrt(n) = 424 tail points: standard error (1 + k)/sqrt(424) is at most .09, and its prior pulls
    # towards .5 with weight 10/434
    assert abs(found - true_k) <= 0.1
    assert importance.pareto_khat(torch.zeros(100)) is None


def test_the_samplers_log_probs_are_the_proposal_on_request_only() -> None:
    rollouts = by_hand()
    zero = torch.zeros_like(D)
    scores, anchor = TokenScores(D * rollouts.completion_mask, zero + 1), TokenScores(zero, zero + 1)
    with pytest.raises(InputError, match="needs the sampler's log-probabilities"):
        fp.entropy(proposal="sampler")(scores, anchor, rollouts)
    reported = rollouts._replace(sampling_logps=torch.full_like(D, torch.nan).where(~rollouts.completion_mask, -1.0))
    d = importance.log_ratios(scores, anchor, reported, "sampler")
    torch.testing.assert_close(d, (D + 1) * rollouts.completion_mask)
    assert torch.equal(importance.log_ratios(scores, anchor, reported), scores.logp)


def test_unknown_options_are_named() -> None:
    with pytest.raises(InputError, match="unknown weighting 'token'; expected one of per_decision, sequence"):
        fp.entropy(weighting="token")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Unknown proposal 'x'"):
        importance.log_ratios(TokenScores(D, D), TokenScores(D, D), by_hand(), "x")  # type: ignore[arg-type]


def _tied() -> list[tuple[str, torch.Tensor]]:
    """Log-weights whose tail is all ties, or nothing at all, or far out of range."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=g, dtype=torch.float64)
    cases = [
        (f"{k} of {n} at {high:g}, the rest within {low:g}", torch.cat([torch.full((k,), high), low * noise[: n - k]]))
        for n in (25, 26, 64, 100)
        for k in (1, 2, 5, n // 2, n - 2, n - 1)
        for high, low in ((0.1, 0.01), (0.0, 0.0), (3.0, 1e-9), (1e-12, 0.0), (700.0, 1.0), (1e5, 1.0), (-1e5, 1.0))
    ]
    values = torch.cat([torch.zeros(60), torch.full((4,), -torch.inf)]).double()
    return [*cases, ("weights of 0", values), ("all but one 0", torch.tensor([0.0] + [-torch.inf] * 40).double())]


def test_a_tail_that_cannot_be_fitted_is_no_error_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A policy that repeats itself: the library raises where all tail values are one value."""
    found = {name: importance.pareto_khat(values) for name, values in _tied()}
    assert all(khat is None or math.isfinite(khat) for khat in found.values())
    assert found["32 of 64 at 0.1, the rest within 0.01"] is None
    assert found["all but one 0"] is None
    assert capfd.readouterr() == ("", "")


@given(
    st.lists(st.sampled_from([-745.0, -1.0, 0.0, 1e-15, 0.5, 709.0, 1e300]), min_size=25, max_size=40),
    st.integers(0, 2**31),
)
def test_no_log_weights_end_a_measurement(values: list[float], seed: int) -> None:
    khat = importance.pareto_khat(torch.tensor(values, dtype=torch.float64))
    assert khat is None or math.isfinite(khat)


def test_the_health_of_a_policy_that_repeats_itself() -> None:
    completions = [[4, 5, 6]] * 40 + [[1 + i % 6, i % 5, 2] for i in range(24)]
    rollouts = fp.rollouts_from_lists([[1, 2]] * 64, completions, temperature=1.0)
    d = torch.where((rollouts.ids[:, 2:] == torch.tensor([4, 5, 6])).all(1, keepdim=True), 0.01, -0.02).double()
    health = importance.weight_health(d.expand(64, 3), rollouts)
    assert health.khat is None
    assert 60 < health.ess_sequence < 64
