"""Trials, against a step whose ΔF is a sum over the tokens that are kept: there every effect is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from funcprobe.attribution.trials import Trial
from tests.cases.probes import U

WORTH = torch.where(
    U.completion_mask, torch.randn(U.completion_mask.shape, generator=torch.Generator().manual_seed(0)), 0.0
).double()


class Additive:
    """A step of which every token of U does its worth, whoever else is there."""

    parts = SimpleNamespace(prepared=U)

    def __init__(self) -> None:
        self.calls = 0

    def change(self, drop: Tensor | None = None) -> float:
        self.calls += 1
        return float(WORTH.sum() if drop is None else WORTH[~drop].sum())


def trial(dropped: str = "tokens") -> tuple[Trial, Any]:
    resteps: Any = Additive()
    return Trial.of(resteps, dropped), resteps


def test_dropping_either_end_takes_its_worth_away_and_equal_rankings_share_steps() -> None:
    tried, resteps = trial()
    drops = tried.drops({"true": WORTH, "twice": 2 * WORTH}, [0.1, 0.5])
    worth = WORTH[U.completion_mask].sort().values
    for drop in drops:
        ranked = worth if drop.end == "lowest" else worth.flip(0)
        assert drop.number == max(1, round(drop.share * len(worth)))
        assert drop.effect == pytest.approx(-float(ranked[: drop.number].sum()), abs=1e-12)
    assert [(d.method, d.end, d.share) for d in drops[:3]] == [
        ("true", "lowest", 0.1),
        ("true", "lowest", 0.5),
        ("true", "highest", 0.1),
    ]
    assert resteps.calls == 1 + 4


def test_prompts_go_as_a_whole() -> None:
    tried, _ = trial("prompts")
    (lowest, _) = tried.drops({"true": WORTH}, [0.01])
    of_prompts = [float(WORTH[U.group_ids == group].sum()) for group in U.group_ids.unique().tolist()]
    assert lowest.number == 1
    assert lowest.effect == pytest.approx(-min(of_prompts), abs=1e-12)


def test_a_true_score_agrees_fully_its_opposite_not_at_all_and_a_flat_one_is_not_told() -> None:
    scores = {"true": WORTH, "opposite": -WORTH, "flat": torch.zeros_like(WORTH)}
    found = trial()[0].agreements(scores, 8, torch.Generator().manual_seed(1))
    assert found["true"] == pytest.approx((1.0, 1.0), abs=1e-9)
    assert found["opposite"] == pytest.approx((-1.0, -1.0), abs=1e-9)
    assert all(math.isnan(x) for x in found["flat"])
    none = trial()[0].agreements(scores, 0, torch.Generator())
    assert all(math.isnan(x) for agreement in none.values() for x in agreement)


def test_random_drops_have_a_mean_and_the_deviation_of_one_draw() -> None:
    found = trial()[0].chance(0.25, 200, torch.Generator().manual_seed(2))
    worth = WORTH[U.completion_mask]
    n = len(worth)
    sd = float(worth.std()) * math.sqrt(found.number * (1 - found.number / n))
    assert abs(found.mean + found.number * float(worth.mean())) < 4 * sd / math.sqrt(200)  # four standard errors
    assert found.sd == pytest.approx(sd, rel=0.2)  # four standard errors of a deviation: 4/√(2·200)
    assert math.isnan(trial()[0].chance(0.25, 1, torch.Generator()).sd)
