"""The page of the literature's claims is a function of the numbers that are kept."""

from __future__ import annotations

from benchmarks.harness import claims


def test_the_page_is_that_of_the_numbers_kept() -> None:
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page()


def test_a_number_is_told_with_its_range_over_seeds() -> None:
    rows = [{"seed": s, "x": x} for s, x in ((0, 1.0), (0, 3.0), (1, 5.0), (2, 0.0))]
    assert claims.told(rows, lambda run: sum(r["x"] for r in run), ".1f") == "4.0 (0.0 to 5.0)"
