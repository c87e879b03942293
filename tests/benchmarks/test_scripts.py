"""The benchmark scripts as they are called: all of them in turn, and the exact targets of the comparison."""

from __future__ import annotations

import importlib
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as every

ROOT = Path(every.ROOT)


def asked(**options: Any) -> Namespace:
    return Namespace(**{"device": "cpu", "model": None, "only": None, "quick": False, "minutes": None, **options})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_command_names_a_script_and_options_that_it_has(device: str, quick: bool) -> None:
    found = every.commands(asked(device=device, quick=quick, model="qwen2.5-0.5b"))
    for words in found:
        path = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        source = "".join((ROOT / p).read_text() for p in (path, "benchmarks/harness/comparing.py"))
        for option in (word for word in words[1:] if word.startswith("--")):
            assert f'"{option}"' in source, (words, option)
        assert ("--device" in words) == (device == "cuda"), words
    compared = [w for w in found if "one_step" in w[0] or "sweep" in w[0]]
    assert len(compared) == 4
    assert all(w[-2:] == ["--model", "qwen2.5-0.5b"] for w in compared)


def test_a_script_that_nobody_named_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "another.py").write_text("import sys\n\n\ndef main() -> None:\n    sys.exit()\n")
    (tmp_path / "part_of_it.py").write_text("def helper() -> None:\n    pass\n")
    assert every.scripts(tmp_path) == (*every.SCRIPTS, every.Script("another", quick=None))
    folder = ROOT / "benchmarks"
    assert {s.name for s in every.scripts(folder)} >= {s.name for s in every.SCRIPTS} | {"predictors"}
    assert not {"all", "harness", "stateful"} & {s.name for s in every.scripts(folder)}


def test_what_takes_too_long_is_stopped_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert every._run(["-c", "import time; time.sleep(600)"], start + 0.5) == "stopped"
    assert time.monotonic() - start < 300  # however busy the machine is
    assert every._run(["-c", "print('late')"], time.monotonic() - 1) == "not run"
    assert every._run(["-c", "raise SystemExit(3)"], None) == "failed"
    assert every._run(["-c", "print('in time')"], time.monotonic() + 600).endswith(" s")
    said = capfd.readouterr().out
    assert "in time" in said
    assert "\nlate" not in said


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
    comparing, pair, sweep = (
        importlib.import_module(name) for name in ("harness.comparing", "harness.pair", "sweep")
    )
    # ratios of passes are those of any size: one narrow layer and one microbatch, with as wide a readout as ever
    narrow = {**pair.MODELS["tiny"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1}
    monkeypatch.setitem(pair.MODELS, "narrow", narrow)
    shape = pair.Shape(model="narrow", lora=lora, evaluation=4, update=4, length=32, microbatch=4)
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
