"""The largest learning rate within bounds: held to a grid that tries them all."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe.data.rollouts import take
from funcprobe.errors import FuncprobeWarning, InputError, NumericsError
from funcprobe.measurement.cautions import ess_fraction
from funcprobe.measurement.outcome import Outcome
from funcprobe.types import Observable
from tests.cases import models
from tests.cases.probes import Case, E, U

BETWEEN = (1e-5, 10.0)
BOUNDS = {"min_ess": 0.9, "max_abs_delta": 0.01, "max_nonlinearity": 0.02}


@functools.cache
def case() -> Case:
    return Case()


@functools.cache
def grid(observable: Observable | None = None) -> tuple[Outcome, ...]:
    """Return what the step does at 61 learning rates, a factor of 1.26 apart."""
    options: dict[str, Any] = {"bars": None, "order": 1, "ess_threshold": 0.0, "observables": observable}
    return case().sweep(np.geomspace(*BETWEEN, 61), **options).points


def by_grid(bounds: dict[str, float], observable: Observable | None = None) -> tuple[float, float]:
    """Return neighbours of the grid: all learning rates up to the first keep every bound, the second breaks one."""

    def keeps(point: Outcome) -> bool:
        (reading,) = point.readings.values()
        return (
            ess_fraction(point.health, observable or fp.entropy()) >= bounds.get("min_ess", 0.0)
            and abs(reading.change) <= bounds.get("max_abs_delta", math.inf)
            and reading.nonlinearity <= bounds.get("max_nonlinearity", math.inf)
        )

    points = grid(observable)
    first = next(k for k, point in enumerate(points) if not keeps(point))
    return points[first - 1].lr, points[first].lr


@pytest.mark.parametrize("names", [["min_ess"], ["max_abs_delta"], ["max_nonlinearity"], list(BOUNDS)])
@pytest.mark.parametrize("observable", [None, fp.expected_reward()], ids=["entropy", "reward"])
def test_it_is_where_a_grid_first_breaks_a_bound(names: list[str], observable: Observable | None) -> None:
    bounds = {name: BOUNDS[name] for name in names}
    low, high = by_grid(bounds, observable)
    found = case().largest(between=BETWEEN, relative=0.01, observable=observable, **bounds)
    # within the grid's cell, and below the true end by at most `relative`
    assert low / 1.01 <= found.lr <= high
    assert found.limited_by is not None
    assert found.limited_by.split()[0] in names


def test_the_answer_keeps_the_bounds_and_the_next_one_does_not() -> None:
    found = case().largest(between=BETWEEN, relative=0.01, max_abs_delta=0.01)
    at, above = (case().probe(lr, bars=None).main for lr in (found.lr, found.lr * 1.01))
    assert found.point.lr == found.lr
    assert found.point.readings[fp.entropy().name].change == at.change
    assert abs(at.change) <= 0.01 < abs(above.change)
    # what limits is the learning rate just above, printed to three digits, and not the upper end, where ΔF is large
    assert found.limited_by is not None
    name, bound, value = re.fullmatch(r"(\w+) (\S+) \(found (\S+)\)", found.limited_by).groups()  # type: ignore[union-attr]
    assert (name, bound) == ("max_abs_delta", "0.01")
    assert 0.01 <= float(value) <= abs(above.change) * 1.005


def test_several_bounds_are_the_tightest_of_them() -> None:
    alone = {name: case().largest(between=BETWEEN, **{name: bound}) for name, bound in BOUNDS.items()}
    together = case().largest(between=BETWEEN, **BOUNDS)
    name, tightest = min(alone.items(), key=lambda item: item[1].lr)
    assert together.lr == pytest.approx(tightest.lr, rel=0.02)  # bisection of other ends, as finely
    assert together.limited_by is not None
    assert together.limited_by.startswith(name)


def test_finer_than_the_curve_is_scored_near_its_answer() -> None:
    exact = case().largest(between=BETWEEN, max_abs_delta=0.01, relative=1e-6, method="difference")
    found = case().largest(between=BETWEEN, max_abs_delta=0.01, relative=1e-6)
    assert found.lr == pytest.approx(exact.lr, rel=2e-6)
    assert found.tried <= 1 + 2 + 10 < exact.tried  # halving a thousandth ten times


@pytest.mark.parametrize("relative", [0.5, 0.02, 1e-3])
def test_as_finely_as_asked_with_one_confirming_pass(relative: float) -> None:
    exact = case().largest(between=BETWEEN, max_abs_delta=0.01, relative=1e-6, method="difference").lr
    seen: list[str] = []
    found = case().watched(seen).largest(between=BETWEEN, max_abs_delta=0.01, relative=relative)
    # a curve is good to 1e-4 of ΔF, which goes with the learning rate here
    assert exact / (1 + relative) * (1 - 2e-4) <= found.lr <= exact * (1 + 2e-4)
    assert found.tried == 1
    assert seen.count("U") == 1
    # one derivative, the curve's four values and the answer: however finely it is searched
    assert seen.count("E") == 1 + 4 + 1


@pytest.mark.parametrize("relative", [0.5, 0.02, 1e-3])
def test_without_a_curve_no_more_passes_than_bisection_takes(relative: float) -> None:
    seen: list[str] = []
    found = case().watched(seen).largest(between=BETWEEN, max_abs_delta=0.01, relative=relative, method="difference")
    steps = math.ceil(math.log2(math.log(BETWEEN[1] / BETWEEN[0]) / math.log(1 + relative)))
    assert found.tried <= 2 + steps
    # one derivative; the two ends and every step, each once
    assert (seen.count("U"), seen.count("E")) == (1, 1 + found.tried)


def test_where_every_learning_rate_keeps_the_bounds_it_is_the_upper_end() -> None:
    found = case().largest(between=(1e-5, 1e-3), min_ess=0.5)
    assert (found.lr, found.limited_by, found.tried) == (1e-3, None, 1)
    assert found.point.lr == 1e-3


def test_a_lower_end_that_breaks_a_bound_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"The smallest learning rate, 1, breaks the bound already: max_abs_delta 1e-06 \(found .*\); look "
        r"further down with between=\(smaller, larger\), or relax the bound",
    ):
        case().largest(between=(1.0, 10.0), max_abs_delta=1e-6)


def test_scores_that_are_not_finite_break_every_bound() -> None:
    # at 1e308 a float64 step overflows; entropy and weights of what comes before are as wild as they are, and kept
    found = case().largest(between=(1e-5, 1e308), max_abs_delta=1e6, relative=1.0)
    assert found.limited_by == "finite numbers"
    assert found.lr < 1e308
    assert math.isfinite(found.point.readings[fp.entropy().name].change)


def test_a_change_that_is_not_a_number_keeps_no_bound() -> None:
    @fp.observable("root of what is left", "1")
    def root(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
        return (0.1 - (scores.logp - anchor.logp).abs().max()).sqrt() + 0.0 * scores.logp.sum()

    found = case().largest(between=BETWEEN, observable=root, max_abs_delta=1e6, relative=0.01)
    assert found.limited_by in ("max_abs_delta 1e+06 (found nan)", "finite numbers")
    assert math.isfinite(found.point.readings[root.name].change)
    # all bounds but that one are kept up to the upper end
    assert case().largest(between=BETWEEN, max_abs_delta=1e6).limited_by is None


def test_a_lower_end_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericsError, match=r"^At lr 1e\+308: .*not finite"):
        case().largest(between=(1e308, 1.5e308), min_ess=0.5)


def test_float32_finds_what_float64_does() -> None:
    # at the lower end a subtraction in float32 would be off by more than the bound: there it goes by path
    options: dict[str, Any] = {"between": (1e-7, 1.0), "max_nonlinearity": 0.05, "relative": 0.05}
    wide, narrow = (Case(models.two_lines(dtype)).largest(**options) for dtype in (torch.float64, torch.float32))
    assert narrow.lr == pytest.approx(wide.lr, rel=0.05)
    assert wide.limited_by is not None
    assert wide.limited_by.startswith("max_nonlinearity")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "No bound was given; give min_ess, max_abs_delta or max_nonlinearity"),
        ({"min_ess": 1.5}, "min_ess is 1.5; expected a fraction of the sample, at most 1"),
        ({"min_ess": 0.0}, "min_ess is 0.0; expected a number above 0"),
        ({"max_abs_delta": -1.0}, "max_abs_delta is -1.0; expected a number above 0"),
        ({"max_nonlinearity": math.nan}, "max_nonlinearity is nan; expected a number above 0"),
        ({"max_nonlinearity": math.inf}, "max_nonlinearity is inf; expected a number above 0"),
        ({"min_ess": 0.5, "relative": 0.0}, "relative is 0.0; expected a number above 0"),
        ({"min_ess": 0.5, "relative": 1e-17}, "relative is 1e-17; expected at least 1e-09"),
        (
            {"min_ess": 0.5, "between": (1e-1, 1e-9)},
            "between is .*; expected two learning rates, the smaller one first",
        ),
        ({"min_ess": 0.5, "between": (1e-3, 1e-3)}, "between is .*; expected two learning rates"),
        ({"min_ess": 0.5, "between": (0.0, 1e-3)}, "between is .*; expected two learning rates, .* above 0"),
        ({"min_ess": 0.5, "between": (1e-3,)}, "between is .*; expected two learning rates"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    seen: list[str] = []
    with pytest.raises(InputError, match=message):
        case().watched(seen).largest(**options)
    assert seen == []


def test_what_should_be_known_of_batches_and_step_is_said() -> None:
    with pytest.warns(FuncprobeWarning, match="6 of 6 evaluation sequences also stand in the update batch"):
        case().largest(between=BETWEEN, min_ess=0.9, evaluation=take(U, torch.arange(6)))
    still = Case(optimizer=fp.sgd(1e-3))
    flat = U._replace(rewards=torch.ones(len(U.ids), dtype=torch.float64))
    with pytest.warns(FuncprobeWarning) as caught:
        found = still.largest(between=(1e-5, 1e-3), min_ess=0.9, batch=flat)
    assert found.lr == 1e-3
    assert any("The step is zero at learning rate" in str(w.message) for w in caught)
    assert E.weight.sum() == 10
