"""Error bars over prompts: against the textbook, and against deleting rows by hand."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import funcprobe as fp
from benchmarks import coverage
from benchmarks.harness import prompted
from funcprobe.errors import InputError, NumericsError
from funcprobe.estimators import uncertainty
from funcprobe.estimators.uncertainty import Bar, Replicates, bar, choose_method, replicates
from funcprobe.types import Rollouts

WEIGHTINGS = pytest.mark.parametrize("weighting", ["sequence", "per_decision"])


METHODS = ["jackknife", "infinitesimal", "bootstrap"]


SIZES = [3, 1, 5, 2, 2, 4]  # rollouts of each prompt: unequal, one alone


LABELS = [7, -2, 40, 3, 0, 11]  # group ids are names, not positions


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(sizes: list[int], labels: list[int] | None = None, weight: list[float] | None = None) -> Rollouts:
    """Return rollouts of one token each, in groups of the given sizes."""
    labels = list(range(len(sizes))) if labels is None else labels
    groups = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
    rows = len(groups)
    return fp.rollouts_from_lists([[1]] * rows, [[2]] * rows, temperature=1.0, group_ids=groups, weight=weight)


def mean(x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda a: ((a * x).sum() / a.sum()).reshape(1)


@functools.cache
def problem() -> tuple[prompted.Problem, prompted.Step]:
    """Return the policy with every completion of up to three symbols, and a step at which weights matter: ESS .9."""
    small = prompted.make_problem(3)
    return small, prompted.make_step(small, coverage.FAIR)


class Sample:
    """Rollouts drawn from an enumerable policy, in unequal groups; ΔF and δF₁ of an entropy on any rows of them."""

    def __init__(self, weighting: str, sizes: list[int], labels: list[int], copies: int = 1) -> None:
        self.observable = fp.entropy(weighting=weighting)
        groups = torch.tensor(labels).repeat_interleave(torch.tensor(sizes))
        drawn, rows = prompted.sample(problem()[0], 1, len(groups), seeded(5))
        weight = torch.rand(len(groups), generator=seeded(6), dtype=torch.float64) + 0.5
        named = drawn._replace(weight=weight, group_ids=groups)
        again = 1000 * torch.arange(copies).repeat_interleave(len(groups))
        every = torch.arange(len(groups)).repeat(copies)
        self.rollouts, self.rows = only(named, every), rows[every]
        self.rollouts = self.rollouts._replace(group_ids=self.rollouts.group_ids + again)

    def __call__(self, a: Tensor) -> Tensor:
        """Return [2]: ΔF and δF₁ at base weights `a`."""
        return prompted.quantities(*problem(), (self.observable,), self.rollouts, self.rows)(a)

    def on_rows(self, kept: Tensor) -> Tensor:
        """Return the same from a batch that holds the rows `kept` (indices) and no others."""
        part = copy.copy(self)
        part.rollouts, part.rows = only(self.rollouts, kept), self.rows[kept]
        return part(part.rollouts.weight)


def only(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """Return the given rows; unlike `take`, without trimming the width."""
    return Rollouts(*(None if field is None else field[rows] for field in rollouts))


def by_deletion(sample: Sample) -> Tensor:
    """Return [P, 2], one prompt's rows physically gone at a time, in the order of group ids."""
    groups = sample.rollouts.group_ids
    return torch.stack([sample.on_rows((groups != g).nonzero().squeeze(1)) for g in sorted(set(groups.tolist()))])


def test_the_jackknife_of_a_mean_is_the_textbook() -> None:
    x = double([1.0, 4.0, 2.0, 9.0, -3.0])
    found = bar(replicates(mean(x), batch([1] * 5)))
    error = float(x.std()) / math.sqrt(5)
    low, high = stats.t.interval(0.95, 4, loc=float(x.mean()), scale=error)
    assert found == pytest.approx(Bar(2.6, error, low, high, 0.95), rel=1e-13)
    wide = bar(replicates(mean(x), batch([1] * 5)), level=0.99)
    assert wide[2:] == pytest.approx((*stats.t.interval(0.99, 4, loc=2.6, scale=error), 0.99), rel=1e-13)


def test_prompts_count_and_not_rows() -> None:
    per_prompt = double([1.0, 4.0, 2.0, 9.0, -3.0])
    found = replicates(mean(per_prompt.repeat_interleave(3)), batch([3] * 5))
    assert found.prompts == 5
    assert bar(found).error == pytest.approx(float(per_prompt.std()) / math.sqrt(5), rel=1e-13)


@WEIGHTINGS
def test_the_jackknife_deletes_rows(weighting: str) -> None:
    sample = Sample(weighting, SIZES, LABELS)
    found = replicates(sample, sample.rollouts)
    expected = by_deletion(sample)
    # rounding of a few dozen float64 terms of order 1
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.estimate, sample.on_rows(torch.arange(sum(SIZES))), rtol=1e-12, atol=1e-14)
    assert found.prompts == len(SIZES)
    assert found.method == "jackknife"
    h = expected[:, 1] / expected[:, 0]
    by_hand = math.sqrt(sum(float(x - h.mean()) ** 2 for x in h) * (len(h) - 1) / len(h))
    assert bar(found, lambda q: q[1] / q[0]).error == pytest.approx(by_hand, rel=1e-10)
    assert float((expected - found.estimate).abs().min()) > 1e-6  # so that deleting nothing would be seen


@WEIGHTINGS
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_without_weight_is_not_there(weighting: str, method: str) -> None:
    sample = Sample(weighting, SIZES, LABELS)
    there = sample.rollouts.group_ids != LABELS[2]
    whole = replicates(
        sample, sample.rollouts._replace(weight=sample.rollouts.weight * there), method, generator=seeded(0)
    )
    rows = there.nonzero().squeeze(1)
    part = copy.copy(sample)
    part.rollouts, part.rows = only(sample.rollouts, rows), sample.rows[rows]
    fewer = replicates(part, part.rollouts, method, generator=seeded(0))
    assert whole.prompts == fewer.prompts == len(SIZES) - 1
    torch.testing.assert_close(whole.values, fewer.values, rtol=1e-11, atol=1e-14)


def test_the_infinitesimal_jackknife_of_a_weighted_mean_is_exact() -> None:
    x = torch.randn(sum(SIZES), generator=seeded(1), dtype=torch.float64)
    weight = (torch.rand(sum(SIZES), generator=seeded(2), dtype=torch.float64) + 0.1).tolist()
    rollouts = batch(SIZES, LABELS, weight)
    exactly, first_order = (replicates(mean(x), rollouts, method) for method in ("jackknife", "infinitesimal"))
    torch.testing.assert_close(first_order.values, exactly.values, rtol=1e-12, atol=1e-14)
    assert first_order.method == "infinitesimal"


@WEIGHTINGS
def test_the_infinitesimal_jackknife_is_off_by_the_square_of_a_prompts_share(weighting: str) -> None:
    # more copies of one sample leave the estimate where it is and give every prompt a smaller share, so what the first
    # order leaves out falls as 1/P² in a replicate, and as 1/P in a standard error relative to itself; the slopes may
    # be off by .1, the limit of the house for Taylor remainders
    off, ratios = [], []
    for copies in (8, 32):
        sample = Sample(weighting, SIZES, LABELS, copies)
        exactly, first_order = (replicates(sample, sample.rollouts, m) for m in ("jackknife", "infinitesimal"))
        off.append((exactly.values - first_order.values).abs().amax(0))
        quantities = coverage.QUANTITIES.values()
        ratios.append(double([bar(first_order, h).error / bar(exactly, h).error - 1 for h in quantities]))
    slopes = [torch.log(first / second) / math.log(4) for first, second in (off, ratios)]
    assert bool(((slopes[0] - 2).abs() <= 0.1).all()), slopes
    assert bool(((slopes[1] - 1).abs() <= 0.1).all()), (slopes, ratios)


@WEIGHTINGS
def test_a_bootstrap_repeats_rows(weighting: str) -> None:
    sample = Sample(weighting, SIZES, LABELS)
    weights = replicates(lambda a: a, sample.rollouts, "bootstrap", draws=20, generator=seeded(3)).values
    counts = (weights / sample.rollouts.weight).round().long()
    torch.testing.assert_close(weights, counts * sample.rollouts.weight)
    for label in LABELS:  # a prompt's rows come together, and P prompts are drawn
        of_prompt = counts[:, sample.rollouts.group_ids == label]
        assert bool((of_prompt == of_prompt[:, :1]).all())
    first_rows = torch.tensor([0, *SIZES]).cumsum(0)[:-1]
    assert counts[:, first_rows].sum(1).tolist() == [len(SIZES)] * 20
    found = replicates(sample, sample.rollouts, "bootstrap", draws=20, generator=seeded(3)).values
    for value, count in zip(found, counts, strict=True):
        expected = sample.on_rows(torch.arange(sum(SIZES)).repeat_interleave(count))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_the_bootstrap_of_a_mean() -> None:
    prompts, draws = 40, 4000
    x = torch.tensor(stats.norm.ppf((torch.arange(prompts).numpy() + 0.5) / prompts))
    made = replicates(mean(x), batch([1] * prompts), "bootstrap", draws=draws, generator=seeded(4))
    assert made.values.shape == (draws, 1)
    found, textbook = bar(made), bar(replicates(mean(x), batch([1] * prompts)))
    # the variance over resamples is (P−1)/P of the textbook's; the standard error of a standard deviation of R nearly
    # normal numbers is 1/√(2R) of it, and four of those are allowed
    shrunk = textbook.error * math.sqrt((prompts - 1) / prompts)
    assert abs(found.error / shrunk - 1) <= 4 / math.sqrt(2 * draws)
    # the moved percentiles reach as far as t does. The quantile of R normal numbers at tail a has the standard error
    # √(a(1−a)/R) / φ(z) in their standard deviations; four are allowed
    z = stats.t.ppf(0.975, prompts - 1) * math.sqrt(prompts / (prompts - 1))
    a = stats.norm.cdf(-z)
    slack = 4 * math.sqrt(a * (1 - a) / draws) / stats.norm.pdf(z) * shrunk
    assert abs(found.low - textbook.low) <= slack
    assert abs(found.high - textbook.high) <= slack
    assert slack < 0.15 * (textbook.high - textbook.value)


def test_the_bootstraps_percentiles_are_moved_out_to_the_width_of_t() -> None:
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64).unsqueeze(1)  # the quantile at a is a
    found = bar(Replicates(double([0.4]), uniform, 6, "bootstrap"), level=0.9)
    a = stats.norm.cdf(-math.sqrt(6 / 5) * stats.t.ppf(0.95, 5))
    assert found[2:] == pytest.approx((a, 1 - a, 0.9), rel=1e-10)
    assert found.value == 0.4
    assert found.error == pytest.approx(float(uniform.std()))


def test_a_bootstrap_is_its_generators() -> None:
    x, rollouts = torch.randn(6, generator=seeded(1), dtype=torch.float64), batch([1] * 6)
    first, again, other = (
        replicates(mean(x), rollouts, "bootstrap", draws=9, generator=seeded(seed)).values for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


groups = st.lists(st.integers(1, 4), min_size=2, max_size=6)


@given(groups, st.integers(0, 99), st.sampled_from(["jackknife", "infinitesimal"]))
def test_order_of_rows_and_names_of_prompts_do_not_matter(sizes: list[int], seed: int, method: str) -> None:
    n = sum(sizes)
    x, y = torch.randn(2, n, generator=seeded(seed), dtype=torch.float64)
    weight = torch.rand(n, generator=seeded(seed + 1), dtype=torch.float64) + 0.1

    def found(order: Tensor, labels: list[int]) -> Bar:
        rollouts = batch(sizes, labels, weight.tolist())
        rollouts = rollouts._replace(weight=rollouts.weight[order], group_ids=rollouts.group_ids[order])
        z = (y.abs() + 1)[order]
        return bar(replicates(lambda a: ((a * x[order]).sum() / (a * z).sum()).reshape(1), rollouts, method))

    names = torch.randperm(50, generator=seeded(seed))[: len(sizes)].tolist()
    one = found(torch.arange(n), list(range(len(sizes))))
    two = found(torch.randperm(n, generator=seeded(seed)), names)
    # sums of at most 24 terms of order 1 over denominators of at least .1: rounding, relative to the widest number
    assert two == pytest.approx(one, rel=1e-9, abs=1e-12)


@given(groups, st.integers(0, 99), st.sampled_from(METHODS), st.booleans())
def test_nothing_is_touched(sizes: list[int], seed: int, method: str, absent: bool) -> None:
    n = sum(sizes)
    x = torch.randn(n, generator=seeded(seed), dtype=torch.float64).requires_grad_()
    rollouts = batch([1, *sizes], weight=[0.0 if absent else 1.0, *[1.0] * n])
    kept, state = copy.deepcopy(rollouts), torch.get_rng_state()
    y = torch.cat([x.detach()[:1], x])
    made = replicates(mean(y), rollouts, method, draws=5, generator=seeded(seed))
    bar(made)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    assert not made.values.requires_grad
    assert not made.estimate.requires_grad
    for before, after in zip(kept, rollouts, strict=True):
        assert before is None or torch.equal(before, after)


def test_chunks_bound_what_is_held_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, calls = Sample("per_decision", SIZES, LABELS), []

    def counted(a: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return sample(a)

    whole = {method: replicates(sample, sample.rollouts, method, draws=20, generator=seeded(0)) for method in METHODS}
    cells = sample.rollouts.completion_mask.numel()
    monkeypatch.setattr(uncertainty, "CHUNK", 2 * cells)
    for method, evaluations in (("jackknife", 3), ("infinitesimal", 1), ("bootstrap", 10)):
        calls.clear()
        found = replicates(counted, sample.rollouts, method, draws=20, generator=seeded(0))
        assert len(calls) == 1 + evaluations  # the whole sample, then two replicates at a time
        assert any(calls) == (method == "infinitesimal")  # only that one keeps a graph
        torch.testing.assert_close(found.values, whole[method].values, rtol=1e-12, atol=1e-14)
    calls.clear()
    replicates(counted, sample.rollouts, cells=10**12)  # an evaluation larger than any chunk still runs, alone
    assert len(calls) == 1 + len(SIZES)


def test_auto_takes_the_exact_one_while_it_is_cheap() -> None:
    x, rollouts = torch.randn(4, generator=seeded(1), dtype=torch.float64), batch([2, 2])
    assert replicates(mean(x), rollouts, "auto").method == "jackknife"
    assert replicates(mean(x), rollouts, "auto", cells=uncertainty.EXACT_LIMIT // 2).method == "jackknife"
    assert replicates(mean(x), rollouts, "auto", cells=uncertainty.EXACT_LIMIT // 2 + 1).method == "infinitesimal"
    assert choose_method(1000, 1000) == "jackknife"


def test_a_function_of_quantities_keeps_their_correlation() -> None:
    values = double([[1.0, 1.5], [2.0, 2.6], [4.0, 4.4], [3.0, 3.5]])
    made = Replicates(double([2.5, 3.0]), values, 4, "jackknife")
    difference = made._replace(estimate=double([-0.5]), values=(values[:, :1] - values[:, 1:]))
    assert bar(made, lambda q: q[0] - q[1]) == pytest.approx(bar(difference))
    assert bar(made) == bar(made, lambda q: q[0])
    assert bar(made, lambda q: q[0] - q[1]).error < 0.2 * bar(made).error


def test_a_replicate_that_is_not_finite_leaves_no_bar() -> None:
    made = Replicates(double([2.0]), double([[1.0], [0.0], [3.0]]), 3, "jackknife")
    assert bar(made, lambda q: torch.log(q[0])) == Bar(math.log(2.0), math.inf, -math.inf, math.inf, 0.95)


def test_what_cannot_have_a_bar_says_why() -> None:
    two, x = batch([1, 2]), double([1.0, 2.0, 3.0])
    one = two._replace(weight=double([1.0, 0.0, 0.0]))
    with pytest.raises(InputError, match=r"hold 1 prompt \(group\) that carries weight; .* needs 2 or more"):
        replicates(mean(x), one)
    with pytest.raises(InputError, match="Unknown method 'bayes'; expected 'jackknife'"):
        replicates(mean(x), two, "bayes")  # type: ignore[arg-type]
    for draws in (0, -3, 1, 2.5, True):
        with pytest.raises(InputError, match=f"draws is {draws}; expected a whole number of at least 2"):
            replicates(mean(x), two, "bootstrap", draws=draws, generator=seeded(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"given no generator; pass a seeded torch\.Generator"):
        replicates(mean(x), two, "bootstrap")
    with pytest.raises(InputError, match=r"returned shape \(\); expected a vector \[K\]"):
        replicates(lambda a: a.sum(), two)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(InputError, match="expected a coverage between 0 and 1"):
            bar(replicates(mean(x), two), level=level)


def test_numbers_that_are_not_finite_are_named() -> None:
    x, rollouts = double([1.0, 2.0, 3.0]), batch([1, 1, 1], [5, 6, 9])
    with pytest.raises(NumericsError, match="Quantity 1 is nan on the whole sample"):
        replicates(lambda a: torch.stack([a.sum(), a.sum() * math.nan]), rollouts)

    def empty_without_the_last(a: Tensor) -> Tensor:
        return ((a * x).sum() / (a * double([0.0, 0.0, 1.0])).sum()).reshape(1)

    with pytest.raises(NumericsError, match=r"Quantity 0 is inf without prompt \(group\) 9"):
        replicates(empty_without_the_last, rollouts)
    with pytest.raises(NumericsError, match="Quantity 0 is inf on bootstrap draw"):
        replicates(empty_without_the_last, rollouts, "bootstrap", generator=seeded(0))
