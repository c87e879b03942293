from __future__ import annotations

import math

import pytest

from funcprobe.errors import InputError
from funcprobe.results.sweep_law import close_at, law_of, remainder_fit, subtraction_error
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, LRS, REWARD, sweep, with_reading

UNTIL = 22.6 / 3590 / 20  # where the entropy's first order ends: 3.1e-4


def test_the_law_ends_where_second_order_says_so() -> None:
    found = sweep()
    law = law_of(found)
    assert law.lead == 1
    assert law.up_to == pytest.approx(UNTIL, rel=1e-12)
    assert law.fit == found.slope(up_to=UNTIL)
    assert law.fit is not None
    assert law.fit.points == 6


def test_without_second_order_it_ends_where_first_order_was_last_found_close() -> None:
    law = law_of(sweep(order=1))
    assert (law.lead, law.up_to) == (1, 1e-4)  # at 1e-3 first order misses 19 %
    assert law.fit is not None
    assert law.fit.points == 6


def test_a_divergence_is_led_by_its_second_order() -> None:
    law = law_of(sweep({"kl": DIVERGENCE}))
    assert (law.lead, law.up_to) == (2, 1e-4)  # at 1e-3 second order misses 13 %
    assert law.fit is not None
    assert law.fit.slope.value == pytest.approx(2.0, abs=0.01)


def test_outside_the_linear_regime_all_learning_rates_are_taken() -> None:
    found = sweep(lrs=(1e-3, 2e-3, 4e-3))
    law = law_of(found)
    assert law.up_to == math.inf
    assert law.fit == found.slope()


def test_one_learning_rate_or_no_change_leaves_no_line() -> None:
    for found in (sweep(lrs=(1e-5,)), sweep({"entropy": (0.0, 0.0, 0.0)})):
        assert law_of(found).fit is None
        assert remainder_fit(found) is None


def test_the_slope_of_two_points_is_the_one_between_them() -> None:
    law = law_of(sweep(lrs=(1e-5, 1e-4)))
    low, high = (abs(sum(c * lr**k for k, c in enumerate(ENTROPY, 1))) for lr in (1e-5, 1e-4))
    assert law.fit is not None
    assert law.fit.slope.value == pytest.approx(math.log10(high / low), rel=1e-12)


def test_the_remainder_s_line_leaves_out_what_float_error_ate() -> None:
    found = sweep()
    fit = remainder_fit(found)
    assert fit is not None
    kept = sweep(lrs=LRS[1:])  # 1e-15 is .28 of the remainder at 1e-9, and .0028 at 1e-8
    assert fit == kept.remainder_slope(up_to=UNTIL)
    unknown = with_reading(found, 1e-9, float_error=None)
    assert remainder_fit(unknown) == unknown.remainder_slope(up_to=UNTIL)


def test_in_reverse_mode_the_remainder_has_a_slope_and_no_error() -> None:
    found = sweep(mode="reverse")
    fit = remainder_fit(found)
    assert fit is not None
    assert fit.slope.value == pytest.approx(2.0, abs=0.01)
    assert fit.slope.error == math.inf


def test_where_every_remainder_is_lost_there_is_no_line() -> None:
    found = sweep(lrs=(1e-6, 1e-5))
    for lr in found.lrs:
        found = with_reading(found, lr, float_error=1.0)
    assert remainder_fit(found) is None


def test_close_is_within_a_twentieth_of_the_change() -> None:
    found = sweep(lrs=(1e-6, 1e-5))
    change = found.readings()[1].change
    for off, close in ((0.049, True), (0.051, False), (-0.049, True), (-0.051, False)):
        assert (1e-5 in close_at(with_reading(found, 1e-5, first_order=change * (1 + off)))) == close


def test_a_subtraction_is_held_against_the_path_where_there_is_one() -> None:
    path, difference = sweep().readings()[0], sweep().readings()[-1]
    assert subtraction_error(path) == pytest.approx(5e-8, rel=1e-9)
    assert subtraction_error(path._replace(subtraction=None)) is None
    assert subtraction_error(path._replace(method="values")) == subtraction_error(path)
    assert subtraction_error(difference) == difference.float_error == 5e-8


def test_an_unknown_observable_is_refused() -> None:
    found = sweep({"entropy": ENTROPY, "reward": REWARD})
    for function in (law_of, remainder_fit, close_at):
        with pytest.raises(InputError, match="no observable 'kl'"):
            function(found, "kl")


def test_a_reading_that_float_error_ate_is_close_to_nothing() -> None:
    found = sweep(order=1)
    lr = close_at(found)[-1]
    reading = found.readings()[found.lrs.index(lr)]
    lost = with_reading(found, lr, float_error=0.2 * abs(reading.change))
    assert lost.readings()[found.lrs.index(lr)].is_lost
    assert close_at(lost) == [other for other in close_at(found) if other != lr]
