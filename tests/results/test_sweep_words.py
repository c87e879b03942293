from __future__ import annotations

import math

import pytest

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar
from funcprobe.results.blocks import as_text
from funcprobe.results.curve import Fit
from funcprobe.results.sweep import SweepResult
from funcprobe.results.sweep_numbers import remarks_of, table_of
from funcprobe.results.sweep_words import fit_text, headline_of
from tests.cases.written_probe import warned
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, LRS, REWARD, sweep, with_reading

CUBED = (0.0, 0.0, 1e3)
TURNS = (-1e-3, 10.0, 0.0)  # falls below η = 1e-4, rises above


@pytest.mark.parametrize(
    ("found", "begins", "ends"),
    [
        (
            sweep(),
            "From lr 1e-9 to 1e-4 the entropy falls in proportion to the learning rate (slope 0.99",
            "R² 0.999999); first order is within 5 % up to lr 3.1e-4.",
        ),
        (
            sweep({"reward": REWARD}, lrs=(1e-8, 1e-7)),
            "From lr 1e-8 to 1e-7 reward rises in proportion to the learning rate (slope 0.99999",
            "first order is within 5 % up to lr 2.8e-4, beyond what was swept.",
        ),
        (
            sweep(lrs=(1e-3, 3e-3)),
            "From lr 1e-3 to 3e-3 the entropy falls, but not in proportion to the learning rate (slope 0.5",
            "first order is within 5 % up to lr 3.1e-4, below what was swept.",
        ),
        (
            sweep(order=1),
            "From lr 1e-9 to 1e-4 the entropy falls in proportion",
            "first order is within 5 % of it at 6 of 7 learning rates, up to lr 1e-4.",
        ),
        (
            sweep(order=1, lrs=LRS[:3]),
            "From lr 1e-9 to 1e-7 the entropy falls in proportion",
            "first order is within 5 % of it at every learning rate.",
        ),
        (
            sweep(order=1, lrs=(1e-3, 2e-3)),
            "From lr 1e-3 to 2e-3 the entropy falls, but not",
            "first order is within 5 % of it at no learning rate.",
        ),
        (
            sweep({"kl": DIVERGENCE}),
            "From lr 1e-8 to 1e-4 kl rises with the square of the learning rate (slope ",
            "second order is within 5 % of it at 5 of 7 learning rates, up to lr 1e-4.",
        ),
        (
            sweep({"kl": DIVERGENCE}, order=1, lrs=(1e-6, 1e-5)),
            "From lr 1e-6 to 1e-5 kl rises with the square",
            "its first order is 0, and the second was not asked for.",
        ),
        (
            sweep({"cubed": CUBED}, lrs=(1e-2, 1e-1)),
            "From lr 1e-2 to 1e-1 cubed rises, but not with the square",
            "second order is within 5 % of it at no learning rate.",
        ),
        (
            sweep({"entropy": (-22.6, 0.0, 0.0)}),
            "From lr 1e-9 to 1e-3 the entropy falls in proportion",
            "its second order is 0.",
        ),
        (
            sweep({"entropy": TURNS}, lrs=(2e-5, 2e-4, 2e-3), order=1),
            "From lr 2e-5 to 2e-3 the entropy changes its direction (|ΔF|: slope ",
            "first order is within 5 % of it at no learning rate.",
        ),
        (
            sweep(lrs=(1e-5,)),
            "At lr 1e-5 the entropy falls by 0.000226 nats per token (first order predicts 100.2 % of it, a slope",
            "); first order is within 5 % up to lr 3.1e-4, beyond what was swept.",
        ),
        (
            sweep({"entropy": (0.0, 0.0, 0.0)}),
            "At every learning rate the entropy stays at 0.35 nats per token.",
            "per token.",
        ),
        (
            sweep({"entropy": (0.0, 0.0, 0.0)}, lrs=(1e-5,)),
            "At lr 1e-5 the entropy stays at 0.35 nats per token.",
            "per token.",
        ),
        (
            sweep(spread=0.3),
            "From lr 1e-9 to 1e-4 the entropy falls in proportion",
            "; the interval of ΔF holds 0 at all of them; first order is within 5 % up to lr 3.1e-4.",
        ),
        (
            sweep({"entropy": (-22.6, 1.0, 6e6)}, order=2),
            "From lr 1e-9 to 1e-3 the entropy falls in proportion",
            "by its second order, first order is within 5 % up to lr 1.1e0, but it misses 36 % at lr 1e-3.",
        ),
    ],
)
def test_the_first_sentence_is_the_answer(found: SweepResult, begins: str, ends: str) -> None:
    text = headline_of(found)
    assert text.startswith(begins)
    assert text.endswith(ends)


def test_an_observable_goes_by_the_name_it_was_given() -> None:
    assert " the entropy " in headline_of(sweep({"rao_blackwell/per_decision/token": ENTROPY}))
    mine = with_reading(sweep({"mine": ENTROPY}), 1e-9, "mine", observable="rao_blackwell/per_decision/token")
    assert " mine falls " in headline_of(mine)


def test_a_row_holds_the_numbers_of_its_learning_rate() -> None:
    found = sweep(caveats={1e-3: ("few",)})
    headings, rows = table_of(found)
    assert headings == ("lr", "ΔF", "δF₁", "δF₁/ΔF", "by", "ESS")
    low, high = found.readings()[0], found.readings()[-1]
    errors = [r.bars["change"].error for r in (low, high)]
    assert rows[0] == ("1e-9", f"{low.change:+.4e} ± {errors[0]:.1e}", "-2.2600e-08", "1.0000", "path (2)", "500.0")
    change = -22.6e-3 + 3590e-6 - 2e4 * 1e-9
    ratio = f"{-22.6e-3 / change:.4f}"
    assert rows[-1] == ("1e-3", f"{change:+.4e} ± {errors[1]:.1e}*", "-2.2600e-02", ratio, "difference", "500.0")


def test_cells_without_a_number_are_empty() -> None:
    zero = with_reading(sweep(bars=False), 1e-9, change=0.0)
    assert table_of(zero)[1][0][1:4] == ("+0.0000e+00 (lost)", "-2.2600e-08", "")
    headings, rows = table_of(sweep({"kl": DIVERGENCE}, order=1))
    assert headings[2:4] == ("δF₂", "δF₂/ΔF")
    assert {row[2:4] for row in rows} == {("", "")}


def test_a_ratio_far_from_1_is_written_short() -> None:
    for share, expected in ((2e4, "2.0e+04"), (-1e-6, "-1.0e-06"), (-3.25, "-3.2500")):
        found = with_reading(sweep(), 1e-9, change=1e-8, first_order=share * 1e-8)
        assert table_of(found)[1][0][3] == expected


@pytest.mark.parametrize(
    ("slope", "error", "expected"),
    [
        (0.99894657, 4.3e-5, "slope 0.99895 ± 0.00004, R² 0.999999"),
        (0.9989, 0.07, "slope 1.00 ± 0.07, R² 0.999999"),
        (1.08, 2.4, "slope 1.08 ± 2.40, R² 0.999999"),
        (1.0, 0.0, "slope 1.000000 ± 0.000000, R² 0.999999"),
        (1.0, 1e-12, "slope 1.000000 ± 0.000000, R² 0.999999"),
        (0.99894657, math.inf, "slope 0.9989, R² 0.999999"),
    ],
)
def test_a_slope_has_the_digits_that_its_error_leaves(slope: float, error: float, expected: str) -> None:
    assert fit_text(Fit(Bar(slope, error, slope - error, slope + error), 0.999999, 5)) == expected


def test_below_the_tables_stands_what_else_was_found() -> None:
    said = remarks_of(sweep(caveats={1e-4: ("few",), 1e-3: ("few", "low")}))
    assert said[0] == "± is one standard error over 40 prompts."
    assert said[1].startswith("Remainder ΔF − δF₁: slope 1.9999")
    assert said[1].endswith("from 5 learning rates; 2 is where second order leads.")
    # ΔF at 1e-4 is 22.6e-4 − 3590e-8 + 2e-8 in size, at 1e-9 it is 22.6e-9
    growth = (22.6e-4 - 3590e-8 + 2e4 * 1e-12) / 22.6e-9 / 1e5
    assert said[2] == (
        "Scale check, lr 1e-9 to 1e-4, growth as a multiple of the learning rate's: ‖Δθ‖ 1.0000, δF₁ 1.0000, "
        f"ΔF {growth:.4f}."
    )
    assert (
        said[3] == "Subtracting two evaluations is off by more than 10 % of ΔF at 2 of 7 learning rates, up to lr 1e-8."
    )
    assert said[4:] == ["* Error bar optimistic from lr 1e-4: few.", "* Error bar optimistic from lr 1e-3: low."]


def test_remarks_say_nothing_of_what_was_not_found() -> None:
    said = remarks_of(sweep(lrs=(1e-5,), bars=False))
    assert said == []
    said = remarks_of(sweep({"kl": DIVERGENCE}, lrs=(1e-4, 1e-3)))
    assert not any(text.startswith("Remainder") for text in said)
    assert not any("δF₁" in text for text in said)  # 0 over 0 has no growth
    assert "In reverse mode ΔF is a subtraction, whose float error is not estimated." in remarks_of(
        sweep(mode="reverse")
    )


def test_the_summary_holds_every_observable_and_warning() -> None:
    found = sweep({"entropy": ENTROPY, "reward": REWARD}, warnings=warned("careful"))
    text = as_text(found.blocks(), 1000)
    assert text.startswith(headline_of(found))
    assert headline_of(found, "reward") in text
    for name in found.observables:
        for row in table_of(found, name)[1]:
            assert [line.split() for line in text.splitlines()].count(" ".join(row).split()) == 1
    assert all(text.count(remark) == 1 for remark in remarks_of(found))
    assert text.endswith("\nWarning: careful.")


def test_the_html_holds_the_same_and_is_escaped() -> None:
    found = sweep({"entropy": ENTROPY, "a<b": REWARD}, warnings=warned("x < y & z"))
    text = found._repr_html_()
    assert text.count("<table>") == 2
    assert text.count("<tr>") == 2 * (1 + len(LRS))
    assert "a&lt;b" in text
    assert "x &lt; y &amp; z" in text
    assert "a<b" not in text
    assert "&lt;by&gt;" in with_reading(found, 1e-3, method="<by>")._repr_html_()


def test_an_unknown_observable_is_refused() -> None:
    for function in (headline_of, table_of):
        with pytest.raises(InputError, match="no observable 'kl'"):
            function(sweep(), "kl")
