"""The comparison of the two systems: exact targets, and what a script writes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the scripts by their bare names, as they import one another, and forget them afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(
    ("lora", "count", "target"), [(False, 1, 0.92), (False, 8, 0.25), (True, 1, 0.87), (True, 8, 0.29)]
)
def test_flops_are_within_their_targets(lora: bool, count: int, target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are counted and not timed, so a pass too many fails here: one is 1/8 of the stateful ones at K = 1."""
    comparing, pair, sweep = (importlib.import_module(name) for name in ("harness.comparing", "harness.pair", "sweep"))
    # ratios of passes are those of any size: one narrow layer and one microbatch, with as wide a readout as ever
    narrow = {**pair.MODELS["tiny"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1}
    monkeypatch.setitem(pair.MODELS, "narrow", narrow)
    shape = pair.Shape(model="narrow", lora=lora, evaluation=4, batch=4, length=32, microbatch=4)
    built = pair.build(shape)
    runs = sweep.runs(built, count)
    runs["functional"]()  # its copy of the model is held against a difference, once
    found = {name: comparing.flops(run) for name, run in runs.items()}
    assert found["functional"] / found["stateful"] <= target


@pytest.mark.usefixtures("beside")
def test_a_script_writes_its_numbers_with_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, script = tmp_path / "found.json", ROOT / "benchmarks" / "one_step.py"
    words = [script, "--quick", "--lora", "--threads", "1", "--json", place]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    importlib.import_module("one_step").main()  # which measures its peaks in processes of their own
    report = json.loads(place.read_text())
    assert report["environment"]["parameters"] > 0
    assert report["environment"]["packages"]["torch"]
    assert report["environment"]["threads"] == 1
    assert report["options"]["lora"] is True
    (row,) = report["rows"]
    assert row["ratios"][0] == row["flops"]["functional"] / row["flops"]["stateful"]
    assert min(*row["mib"].values(), *row["seconds"]["seconds"]) > 0
