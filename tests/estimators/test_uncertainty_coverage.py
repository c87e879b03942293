"""Error bars over prompts against the truth that they promise, and where the promise ends."""

from __future__ import annotations

import functools
import math

import pytest

from benchmarks import coverage
from benchmarks.harness import prompted
from funcprobe.estimators.uncertainty import promise_broken


def test_the_promise() -> None:
    assert promise_broken(30, 0.9, True) == ()
    assert promise_broken(29, 0.8999, False) == (
        "29 prompts, 30 are needed",
        "effective sample 89 %, 90 % is needed",
        "the step was made from the same prompts",
    )


@functools.cache
def covered() -> list[coverage.Row]:
    """Return a small coverage study on 64 prompts of all completions up to three symbols: 32 prompts, 8 of each."""
    setting = coverage.Setting(32, 8, coverage.SMALL)
    return coverage.study(prompted.make_problem(3), "", setting, coverage.ENTROPIES, ("jackknife",), COUNT)


COUNT = 300


@pytest.mark.parametrize("quantity", list(coverage.QUANTITIES))
def test_nominal_coverage_holds(quantity: str) -> None:
    found = [row for row in covered() if row.quantity == quantity]
    assert len(found) == 2  # two weightings
    for row in found:
        assert row.broken == ()
        # three binomial standard errors of 300 replications
        assert abs(row.coverage - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / COUNT), row
        # the bars are as long as the estimates scatter: the standard error of a standard deviation over 300
        # replications is 1/√600 of it; the estimator's O(1/N) bias is below a tenth of the scatter of the mean
        assert abs(row.error / row.spread - 1) <= 4 / math.sqrt(2 * COUNT), row
