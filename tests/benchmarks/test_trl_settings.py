"""The page of TRL's settings is that of the numbers that were kept, each of them within the limit of the tests."""

from __future__ import annotations

import json

from benchmarks.harness.record import RESULTS
from benchmarks.trl_settings import OTHERS, PAGE, page
from tests.cases.trl_runs import SETTINGS


def test_the_page_is_the_numbers() -> None:
    kept = json.loads((RESULTS / "trl-settings.json").read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(kept)
    assert [row["setting"] for row in kept["rows"]] == [*SETTINGS, *OTHERS]
    for row in kept["rows"]:
        assert row["grad"] < 1e-5
        assert ("objective" in row) == (row["setting"] in SETTINGS)
        assert row.get("objective", 0.0) < 1e-5
