"""The benchmark scripts as they are called: all of them in turn."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as every

ROOT = Path(__file__).parents[2]


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
