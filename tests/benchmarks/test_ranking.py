"""What is said about predictors rests on three small numbers: each against explicit loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.harness import ranking

vectors = st.integers(2, 9).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-4, 4), min_size=n, max_size=n) for _ in range(2)])
)


def by_pairs(x: list[float], y: list[float]) -> float:
    """Spearman as the correlation of ranks, a rank being the number of smaller entries and half of the equal ones."""

    def ranks(v: list[float]) -> list[float]:
        found = [sum(1.0 for w in v if w < u) + 0.5 * sum(1.0 for w in v if w == u) for u in v]
        return [r - sum(found) / len(found) for r in found]

    a, b = ranks(x), ranks(y)
    size = (sum(r * r for r in a) * sum(r * r for r in b)) ** 0.5
    return sum(r * s for r, s in zip(a, b, strict=True)) / size if size else 0.0


@given(vectors)
def test_spearman_is_the_correlation_of_ranks(pair: tuple[list[float], list[float]]) -> None:
    found = ranking.spearman(*(torch.tensor(v, dtype=torch.float64) for v in pair))
    assert found == pytest.approx(by_pairs(*pair), abs=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_no_ratio_of_the_sample_has_a_smaller_absolute_error(seed: int, n: int) -> None:
    x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def error(c: float) -> float:
        return sum(abs(b - c * a) for a, b in zip(x.tolist(), y.tolist(), strict=True))

    best = min(error(c) for c in (y / x).tolist())  # the minimum of a piecewise linear function is at a kink
    assert error(ranking.least_absolute(x, y)) == pytest.approx(best, rel=1e-9)


def test_the_scalar_is_fitted_on_one_half_and_judged_on_the_other() -> None:
    x = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    y = x * torch.tensor([2.0, 5.0] * 3, dtype=torch.float64)  # the even half says c = 2, the odd one 5
    # c = 2 on the odd half: errors 3, 6, 9 beside 5, 10, 15. c = 5 on the even half: 3, 6, 9 beside 2, 4, 6.
    assert ranking.calibrated_error(x, y) == pytest.approx((6 / 10 + 6 / 4) / 2)
    assert ranking.calibrated_error(x, -7 * x) == pytest.approx(0)


def made_up() -> list[ranking.Pair]:
    kinds, changes = ["plain", "plain", "odd", "odd"], [-3.0, -1.0, 2.0, 0.5]
    return [
        {
            "checkpoint": k % 2,
            "kind": kind,
            "same E": {"change": y, "error": 0.3},
            "independent E": {"change": y - 0.6, "error": 0.3},
            "predicted": {"doubled": 2 * y, "down": -1.0},
        }
        for k, (kind, y) in enumerate(zip(kinds, changes, strict=True))
    ]


def test_groups_kinds_and_truths_are_counted_apart() -> None:
    found = ranking.summarised(made_up(), ["plain"])
    same, apart = found["same E"], found["independent E"]
    assert same["pairs"] == {"all": 4, "clear": 3, "natural": 2}
    assert same["rising"] == {"all": 2, "clear": 1, "natural": 0}
    assert (same["all"]["doubled"]["sign"], same["all"]["down"]["sign"]) == (1.0, 0.5)
    assert (apart["all"]["doubled"]["sign"], apart["all"]["down"]["sign"]) == (0.75, 0.75)
    assert (same["all"]["doubled"]["spearman"], same["all"]["down"]["spearman"]) == (pytest.approx(1), 0.0)
    assert same["all"]["doubled"]["error as it is"] == pytest.approx(1)
    assert same["kinds"]["odd"]["right"] == {"doubled": 2, "down": 0}
    assert same["kinds"]["plain"]["scale"]["doubled"] == pytest.approx(0.5)
    assert (same["median |ΔH|"], same["kinds"]["plain"]["median ΔH"]) == (1.0, -3.0)


def test_rank_within_checkpoints_ignores_what_lies_between_them() -> None:
    pairs = made_up()
    for pair, x in zip(pairs, [0.0, 10.0, 1.0, 11.0], strict=True):  # rises within both, by their own levels
        pair["predicted"]["levels"] = x
    found = ranking.quality(pairs, "same E", "levels")
    assert found["spearman within a checkpoint"] == pytest.approx(1)
    assert found["spearman"] == pytest.approx(by_pairs([0.0, 10.0, 1.0, 11.0], [-3.0, -1.0, 2.0, 0.5]))


def test_a_prediction_that_does_not_vary_has_no_rank() -> None:
    varying: Tensor = torch.arange(5.0)
    for x, y in itertools.permutations([varying, torch.ones(5)]):
        assert ranking.spearman(x, y) == 0.0
