"""`funcprobe curve`: a table, pictures and a result that is read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from funcprobe.cli.curve import COMMAND
from funcprobe.cli.main import main
from funcprobe.results.any_lr import CurveResult
from tests.cases.world import World


def test_a_curve_is_measured_shown_and_kept(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curve", str(world.config(tmp_path)), "--lr-max", "1e-3", "--tolerance", "1e-3"]) == 0
    folder = tmp_path / "results-curve"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"result.json", "sweep.csv", "config.yaml", "summary.txt", "sweep.png"}
    assert names <= COMMAND.written
    found = CurveResult.load(folder)
    assert len(found.lrs) == 16
    assert found.lrs[-1] == found.reach == 1e-3
    assert found.nodes >= 1
    assert f"path ({found.nodes})" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--lr-max is missing"),
        (["--lr-max", "0"], "--lr-max: found '0', expected a learning rate above 0"),
        (["--lr-max", "inf"], "--lr-max: found 'inf', expected a learning rate above 0"),
        (["--lr-max", "1e-3", "--tolerance", "-1"], "tolerance"),
    ],
)
def test_bad_words_are_one_calm_line(
    words: list[str], message: str, world: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert message in refused("curve", world.config(tmp_path), *words)
