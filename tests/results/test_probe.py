"""A result is frozen; it can be read, saved whole, loaded, and shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe.data.atomic import fresh_directory
from funcprobe.errors import InputError
from funcprobe.results.probe import SCHEMA_VERSION
from tests.cases.measured import case


@pytest.fixture(scope="module")
def result() -> fp.ProbeResult:
    return case("two lines").probe(keep_delta=True)


def test_save_and_load_is_the_identity(result: fp.ProbeResult, tmp_path: Path) -> None:
    result.save(tmp_path / "out")
    loaded = fp.ProbeResult.load(tmp_path / "out")
    assert loaded.delta is not None
    assert result.delta is not None
    assert all(torch.equal(loaded.delta[n], u) and u.dtype == torch.float32 for n, u in result.delta.items())
    assert dataclasses.replace(loaded, update=None) == dataclasses.replace(result, update=None)


def test_json_is_json(result: fp.ProbeResult) -> None:
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["schema_version"] == SCHEMA_VERSION
    assert next(iter(plain["readings"].values()))["change"] == result.change
    assert "update" not in plain
    broken = dataclasses.replace(result, step={"loss": float("nan")})
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["step"]["loss"] is None


def test_it_is_frozen(result: fp.ProbeResult) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.change = 0.0  # type: ignore[misc]


def test_the_summary_says_the_numbers(result: fp.ProbeResult) -> None:
    text = result.summary()
    assert f"{result.change:+.6e}" in text
    assert f"{result.first_order:+.6e}" in text
    assert "nats per token" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "<table>" in result._repr_html_()
    assert f"{result.remainder:+.6e}" in result._repr_html_()
    warned = dataclasses.replace(result, warnings=("a <b> & c",))
    assert "a &lt;b&gt; &amp; c" in warned._repr_html_()
    assert warned.summary().endswith("Warning: a <b> & c")


def test_nothing_is_overwritten_without_a_word(result: fp.ProbeResult, tmp_path: Path) -> None:
    result.save(tmp_path / "out")
    with pytest.raises(InputError, match="exists already and is not overwritten"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        result.save(tmp_path / "file", overwrite=True)


def test_a_run_that_dies_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), fresh_directory(target) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    with fresh_directory(target) as folder:
        (folder / "one").write_text("old")
    with pytest.raises(ZeroDivisionError), fresh_directory(target, overwrite=True) as folder:
        (folder / "one").write_text(str(1 / 0))
    assert (target / "one").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_loaded_says_why(result: fp.ProbeResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no result\.json"):
        fp.ProbeResult.load(tmp_path)
    file = tmp_path / "result.json"
    file.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        fp.ProbeResult.load(tmp_path)
    file.write_text(json.dumps({**result.to_dict(), "schema_version": 99}))
    with pytest.raises(InputError, match=f"has schema version 99; this funcprobe reads {SCHEMA_VERSION}"):
        fp.ProbeResult.load(tmp_path)
    plain = result.to_dict()
    del plain["readings"]
    file.write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"other fields than a result: \['readings'\]"):
        fp.ProbeResult.load(tmp_path)


def test_a_result_with_a_hole_is_damaged(result: fp.ProbeResult, tmp_path: Path) -> None:
    plain = result.to_dict()
    del next(iter(plain["readings"].values()))["unit"]
    (tmp_path / "result.json").write_text(json.dumps(plain))
    with pytest.raises(InputError, match="is not a whole result"):
        fp.ProbeResult.load(tmp_path)
