"""Every column of numbers of an attribution has the unit that its table is in."""

from __future__ import annotations

import pytest

from funcprobe.results.column_units import units_of
from funcprobe.results.parts import TABLES
from tests.cases.written_attribution import attribution, with_bars

#: Columns that are names, or numbers without a unit: indices, ranks, norms of parameters, the user's own scales.
WITHOUT = {"text", "sequence", "prompt", "position", "token", "advantage", "reward", "mean_reward", "name", "module"}
WITHOUT |= {"layer", "kind", "adapter", "norm", "part", "pair"}


@pytest.mark.parametrize("table", TABLES)
def test_no_column_is_forgotten(table: str) -> None:
    columns = with_bars(attribution(influence=True), 1e-7, "layers").columns(table)
    assert set(columns) - units_of(columns, "x").keys() <= WITHOUT
    assert not units_of(columns, "x").keys() & WITHOUT


def test_parts_are_in_the_unit_of_the_observable() -> None:
    found = units_of(["contribution", "error", "through_entropy", "batch 3", "mean_entropy", "cov_pg"], "rewards")
    assert found == {
        **dict.fromkeys(("contribution", "error", "through_entropy", "batch 3"), "rewards"),
        "mean_entropy": "nats per token",
    }
