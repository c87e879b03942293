"""A validation tells its numbers, is kept, and comes back equal."""

from __future__ import annotations

from pathlib import Path

import pytest

import funcprobe as fp
from funcprobe.errors import InputError
from tests.cases.kept import same
from tests.cases.written_validation import validation


def test_it_comes_back_equal(tmp_path: Path) -> None:
    found = validation()
    found.save(tmp_path / "kept")
    assert same(fp.Validation.load(tmp_path / "kept"), found)
    assert same(fp.load(tmp_path / "kept"), found)


def test_rows_hold_every_drop_beside_random_ones() -> None:
    found = validation()
    rows = found.rows()
    assert len(rows) == len(found.drops) == len(found.to_frame())
    assert rows[0]["random"] == found.chance[0].mean
    assert rows[1]["effect"] == found.effect("additive", "lowest", 0.1)
    assert found.shares == (0.01, 0.1)
    with pytest.raises(InputError, match=r"There is no drop of share 0\.5"):
        found.effect("additive", "lowest", 0.5)


def test_the_text_says_base_effects_chance_and_agreement() -> None:
    text = validation().summary()
    for part in ("Δentropy of the whole step is -2.000e-03", "+9.00e-04", "10.0 %", "± 1.0e-04", "+0.990", "nan"):
        assert part in text
    assert "<table" in validation()._repr_html_()
