"""The leaderboard is a function of the numbers that are kept, and the page is that function's value."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.harness import leaderboard, record
from funcprobe.attribution.rankings import METHODS


def test_the_page_is_that_of_the_numbers_kept() -> None:
    assert leaderboard.PAGE.read_text(encoding="utf-8") == leaderboard.page()


@pytest.mark.parametrize("policy", leaderboard.POLICIES)
def test_what_is_kept_is_every_method_at_every_seed(policy: str) -> None:
    report = json.loads((record.RESULTS / f"validate-{policy}-cpu.json").read_text(encoding="utf-8"))
    seeds = report["options"]["seeds"]
    assert seeds >= 3
    assert [(r["seed"], r["step"]) for r in report["rows"]] == [(s, x) for s in range(seeds) for x in ("SGD", "AdamW")]
    assert all(list(row["effects"]) == list(METHODS) for row in report["rows"])


def test_an_interval_is_the_t_interval_over_seeds() -> None:
    mean, width = leaderboard.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2 degrees) from a table, sd 1
    assert leaderboard.interval([1.0]) == (1.0, math.inf)
