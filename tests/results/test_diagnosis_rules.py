"""The rules of a diagnosis: verdicts flip at their thresholds, and as many more prompts as they name would tell."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar
from funcprobe.results import diagnosis_rules as rules
from funcprobe.results.diagnosis_rules import LIMITS, THRESHOLDS

SIZES = st.floats(1e-12, 1e6)
HERE = Path(__file__).parents[2]


def interval(value: float, half: float) -> Bar:
    return Bar(value, half / 2, value - half, value + half)


TOLD, VAGUE = interval(-2.0, 1.0), interval(-2.0, 3.0)


@pytest.mark.parametrize(
    ("value", "bar", "lost", "verdict"),
    [
        (-2.0, TOLD, False, "falls"),
        (2.0, interval(2.0, 1.0), False, "rises"),
        (-2.0, VAGUE, False, "cannot tell"),
        (-2.0, TOLD, True, "cannot tell"),
        (0.0, None, False, "does not move"),
        (-2.0, None, False, "not known"),
        (-2.0, Bar(-2.0, math.inf, -math.inf, math.inf), False, "cannot tell"),
    ],
)
def test_direction(value: float, bar: Bar | None, lost: bool, verdict: str) -> None:
    assert rules.direction(value, bar, lost=lost) == verdict


@given(SIZES, SIZES, st.sampled_from([-1, 1]))
def test_a_direction_is_told_exactly_where_the_interval_leaves_0_out(size: float, half: float, sign: int) -> None:
    bar = interval(sign * size, half)
    assert (rules.direction(bar.value, bar) != "cannot tell") == (bar.low > 0 or bar.high < 0)


@given(st.floats(1e-6, 1e3), st.floats(1.0, 1e3), st.integers(2, 10_000), st.sampled_from([-1, 1]))
def test_so_many_more_prompts_would_tell_and_one_fewer_would_not(
    size: float, factor: float, prompts: int, sign: int
) -> None:
    """With P + N prompts the half-width is √(P/(P + N)) of this one: at most |ΔF|, and more with one prompt less."""
    bar = interval(sign * size, factor * size)
    assume(not rules.is_told(bar))
    more = rules.more_prompts(bar, prompts)
    assert more is not None
    half = max(bar.high - bar.value, bar.value - bar.low)
    slack = 1 + 1e-9  # of float64 roundings of squares and roots
    assert half * math.sqrt(prompts / (prompts + more)) <= size * slack
    if more > 1:
        assert half * math.sqrt(prompts / (prompts + more - 1)) * slack >= size


def test_no_number_of_prompts_is_named_where_none_can_be() -> None:
    assert rules.more_prompts(interval(0.0, 1.0), 10) is None
    assert rules.more_prompts(Bar(1.0, math.inf, -math.inf, math.inf), 10) is None
    assert rules.more_prompts(TOLD, 10) == 0
    assert rules.more_prompts(interval(1.0, 1.0), 10) == 1  # the interval ends at 0
    with pytest.raises(InputError, match="prompts is 0; expected at least 1"):
        rules.more_prompts(VAGUE, 0)


@pytest.mark.parametrize(
    ("ledger", "bars", "verdict"),
    [
        ({"momentum": -6.0, "gradient on U": 4.0}, {}, "momentum"),
        ({"momentum": -5.9, "gradient on U": 4.1}, {}, "shared"),
        ({"momentum": -1.0, "gradient on U": 9.0}, {"gradient on U": TOLD}, "gradient on U"),
        ({"momentum": -1.0, "gradient on U": 9.0}, {"gradient on U": VAGUE}, "cannot tell"),
        ({"momentum": 0.0, "gradient on U": 0.0}, {}, "nothing moved"),
    ],
)
def test_the_culprit_is_the_row_that_leads(ledger: Any, bars: Any, verdict: str) -> None:
    assert rules.culprit(ledger, bars) == verdict


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_the_largest_hold_a_share_that_grows_with_their_number(parts: list[float], share: float) -> None:
    held = rules.held_by_largest(parts, share)
    assert 0 <= held <= 1 + 1e-12
    assert held <= rules.held_by_largest(parts, 1.0) + 1e-12
    assert held == pytest.approx(rules.held_by_largest([-x for x in reversed(parts)], share))
    if any(parts):
        assert held * len(parts) >= 1 - 1e-9  # one of them is at least the mean


#: Name of a threshold -> the rule as a function of the number alone, below it, and above it.
FLIPS: dict[str, tuple[Any, str, str]] = {
    "leads": (lambda x: rules.culprit({"momentum": x, "gradient on U": 1 - x}, {}), "shared", "momentum"),
    "prompts_tenth": (lambda x: rules.concentration(x, 0, 0), "spread", "concentrated"),
    "tokens_hundredth": (lambda x: rules.concentration(0, x, 0), "spread", "concentrated"),
    "one_layer": (lambda x: rules.concentration(0, 0, x), "spread", "concentrated"),
    "bends": (lambda x: rules.step_size(x, TOLD, 1.0), "small", "bends"),
    "too_large": (lambda x: rules.step_size(x, TOLD, 1.0), "bends", "too large"),
    "least_ess": (lambda x: rules.step_size(0.0, None, x), "too large", "small"),
    "acts": (lambda x: rules.held_back(x, 1.0, 0.0), "does nothing", "acts"),
    "ratio": (lambda x: rules.origin([], False, x, 1.0), "fresh", "stale"),
    "ratio_ess": (lambda x: rules.origin([], False, 0.0, x), "stale", "fresh"),
    "sampler_gap": (lambda x: rules.origin([None, x], False, None, None), "fresh", "another policy"),
    "rounding": (rules.storage, "kept", "partly lost"),
    "lost": (rules.storage, "partly lost", "lost"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_verdict_flips_at_its_threshold_and_nowhere_near(name: str) -> None:
    rule, below, above = FLIPS[name]
    limit = LIMITS[name]
    assert (rule(limit * (1 - 1e-9)), rule(limit * (1 + 1e-9))) == (below, above)
    assert (rule(limit * 0.9), rule(limit * 1.05)) == (below, above)


def test_every_threshold_is_one_line_of_the_table() -> None:
    assert len(LIMITS) == len(THRESHOLDS) == len(FLIPS)


@pytest.mark.parametrize(
    ("given_", "verdict"),
    [
        ((math.nan, None, 1.0), "cannot tell"),
        ((0.9, VAGUE, 1.0), "cannot tell"),
        ((0.9, None, 1.0), "too large"),
        ((0.01, VAGUE, 1.0), "small"),
        ((math.nan, None, 0.1), "too large"),
    ],
)
def test_a_step_whose_remainder_is_not_told_is_not_called_large(given_: Any, verdict: str) -> None:
    assert rules.step_size(*given_) == verdict


@pytest.mark.parametrize(
    ("given_", "verdict"),
    [((0.0, 1.0, 0.0), "does nothing"), ((0.0, 0.5, 0.0), "acts"), ((0.0, 1.0, 0.2), "acts")],
)
def test_norm_clip_and_masks_act_too(given_: Any, verdict: str) -> None:
    assert rules.held_back(*given_) == verdict


@pytest.mark.parametrize(
    ("given_", "verdict"),
    [
        (([None, None], False, None, None), "not known"),
        (([None, 1e-6], False, None, None), "fresh"),
        (([1e-6], True, 0.0, 1.0), "another policy"),
        (([0.3], False, 0.5, 0.1), "another policy"),
    ],
)
def test_a_batch_without_log_probabilities_tells_nothing_of_its_policy(given_: Any, verdict: str) -> None:
    assert rules.origin(*given_) == verdict


UP, DOWN, NOWHERE = interval(1.0, 0.5), interval(-1.0, 0.5), interval(0.1, 0.5)


@pytest.mark.parametrize(
    ("gains", "prices", "best"),
    [
        ({"a": UP}, {}, "a"),
        ({"a": DOWN, "b": NOWHERE}, {}, None),
        ({"a": UP, "b": interval(3.0, 0.5)}, {"a": NOWHERE, "b": NOWHERE}, "b"),
        ({"a": UP, "b": interval(3.0, 0.5)}, {"a": NOWHERE, "b": DOWN}, "a"),
        ({"a": UP, "b": interval(3.0, 0.5)}, {"a": DOWN, "b": interval(-2.0, 0.5)}, "b"),  # 1 and 2/3 a unit
        ({}, {}, None),
    ],
)
def test_the_remedy_is_what_counteracts_at_the_least_price(gains: Any, prices: Any, best: str | None) -> None:
    assert rules.remedy(-5.0, gains, prices) == best
    mirrored = {name: interval(-bar.value, 0.5) for name, bar in gains.items()}
    assert rules.remedy(5.0, mirrored, prices) == best  # a rise is counteracted downwards, and reward is reward


def test_open_questions_and_alarms_are_told_apart() -> None:
    verdicts = {
        "too large": "alarm",
        "lost": "alarm",
        "cannot tell": "unknown",
        "not known": "unknown",
        "falls": "plain",
    }
    assert {verdict: rules.tone_of(verdict) for verdict in verdicts} == verdicts


def test_the_table_of_the_site_is_this_one() -> None:
    page = (HERE / "docs" / "diagnose.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(t.name, f"{t.value:g}", t.meaning.replace("|", r"\|")) for t in THRESHOLDS]
