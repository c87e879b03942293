"""`funcprobe sweep`, from configuration to table, pictures and frame; killed half-way, and again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pandas
import pytest

from funcprobe.cli import command
from funcprobe.cli.main import main
from funcprobe.cli.sweep import COMMAND, parse_lrs
from funcprobe.data.atomic import fresh_directory
from funcprobe.results.probe import ProbeResult
from funcprobe.results.sweep import SweepResult
from tests.cases.world import World

Refused = Callable[..., str]
LRS = ["--lrs", "1e-6:1e-3:4"]


@pytest.fixture(scope="module")
def swept(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("swept")
    assert main(["sweep", str(world.config(place, also=["reward"])), *LRS]) == 0
    return place


def test_a_sweep_writes_everything_that_it_says(swept: Path) -> None:
    folder = swept / "results-sweep"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        ".funcprobe.json",
        "result.json",
        "result.safetensors",
        "sweep.csv",
        "config.yaml",
        "summary.txt",
        "sweep.png",
        "remainder.png",
        "sweep-reward.png",
    }
    assert names <= COMMAND.written
    found = SweepResult.load(folder)
    assert found.lrs == (1e-6, 1e-5, 1e-4, 1e-3)
    assert found.observables == ("entropy", "reward")
    assert found.crossover_lr() is not None  # of second order without being asked
    frame = pandas.read_csv(folder / "sweep.csv")
    assert set(frame["observable"]) == {"entropy", "reward"}
    mine = frame[(frame["observable"] == "entropy") & (frame["quantity"] == "change")]
    assert mine["value"].tolist() == pytest.approx([r.change for r in found.readings()], rel=1e-12)
    assert not list(swept.glob("*.jsonl"))  # nothing is unfinished


def test_a_point_of_the_sweep_is_a_run(world: World, swept: Path, tmp_path: Path) -> None:
    words = ["run", str(world.config(tmp_path)), "--lr", "1e-4", "--method", "path", "--order", "2"]
    assert main(words) == 0
    one = ProbeResult.load(tmp_path / "results")
    point = SweepResult.load(swept / "results-sweep").readings()[2]
    assert point.first_order == pytest.approx(one.first_order, rel=1e-5)  # a scaled tangent against one of its own
    assert point.change == pytest.approx(one.change, rel=1e-3)  # by the path, or by float32 subtraction
    assert point.second_order == pytest.approx(one.second_order, rel=1e-2)  # as the curve bends, or by nested mode


def test_the_table_is_printed_and_the_last_line_says_where_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sweep",
        str(world.config(tmp_path)),
        "--lrs=1e-5,1e-4",
        "--order",
        "1",
        "--output",
        str(tmp_path / "mine"),
    ]
    assert main([*words, "--chunk", "2"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"Results: {tmp_path / 'mine'}\n")
    assert (tmp_path / "mine" / "summary.txt").read_text() in out
    assert SweepResult.load(tmp_path / "mine").crossover_lr() is None


class Watching(command.Bars):
    """Bars that keep what they were told, and pull the plug at a pass."""

    passes: ClassVar[list[str]] = []
    limit, at = 0, "E at θ′"

    def __call__(self, what: str, done: int, total: int) -> None:
        self.passes.append(what)
        if self.limit and self.passes.count(self.at) >= self.limit:
            raise KeyboardInterrupt


class Killed(Watching):
    limit = 3  # the first learning rate has two: storing loses so much of it that θ + Δθ is measured beside θ′


class KilledOnACurve(Watching):
    limit, at = 3, "E along the line"


def test_killed_on_its_curve_it_goes_on_with_the_next_derivative(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sweep", str(world.config(tmp_path)), *LRS]
    Watching.passes.clear()
    monkeypatch.setattr(command, "Bars", KilledOnACurve)
    assert main(words) == 130
    journal = tmp_path / "results-sweep.unfinished.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 2  # its title, and the two derivatives that were finished
    Watching.passes.clear()
    monkeypatch.setattr(command, "Bars", Watching)
    assert main(words) == 0
    again = Watching.passes.count("E along the line")
    found = SweepResult.load(tmp_path / "results-sweep")
    Watching.passes.clear()
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    assert Watching.passes.count("E along the line") == again + 2
    whole = SweepResult.load(tmp_path / "whole")
    # kept as ds/dη, which is scaled and scaled back: a rounding of each derivative
    assert [r.change for r in found.readings()] == pytest.approx([r.change for r in whole.readings()], rel=1e-12)


#: One learning rate at a time, as it is without a curve.
ONE_BY_ONE = ("--method", "difference")


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Return a function that runs a sweep until its third learning rate, and leaves the next one to be watched."""

    def run(words: list[str]) -> None:
        Watching.passes.clear()
        monkeypatch.setattr(command, "Bars", Killed)
        assert main(words) == 130
        Watching.passes.clear()
        monkeypatch.setattr(command, "Bars", Watching)

    return run


def test_killed_it_goes_on_where_it_was(
    world: World, tmp_path: Path, killed: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(world.config(tmp_path)), *LRS, *ONE_BY_ONE]
    killed(words)
    assert "the same command goes on from the learning rates that are done" in capsys.readouterr().err
    assert not (tmp_path / "results-sweep").exists()
    journal = tmp_path / "results-sweep.unfinished.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 2  # its title, and the two that were finished
    assert main(words) == 0
    assert Watching.passes.count("E at θ′") == 2
    assert not journal.exists()
    assert SweepResult.load(tmp_path / "results-sweep").lrs == (1e-6, 1e-5, 1e-4, 1e-3)


def test_the_journal_of_another_sweep_is_refused(
    world: World, tmp_path: Path, refused: Refused, killed: Callable[[list[str]], None]
) -> None:
    config = world.config(tmp_path)
    killed(["sweep", str(config), *LRS, *ONE_BY_ONE])
    kept = (tmp_path / "results-sweep.unfinished.jsonl").read_bytes()
    assert "belongs to another sweep" in refused("sweep", config, *LRS, *ONE_BY_ONE, "--objective.epsilon", "0.3")
    assert (tmp_path / "results-sweep.unfinished.jsonl").read_bytes() == kept
    assert main(["sweep", str(config), *LRS, *ONE_BY_ONE]) == 0


def test_forced_the_journal_of_another_sweep_is_put_aside_and_said(
    world: World, tmp_path: Path, killed: Callable[[list[str]], None]
) -> None:
    words = ["sweep", str(world.config(tmp_path)), *LRS, *ONE_BY_ONE]
    killed(words)
    kept = (tmp_path / "results-sweep.unfinished.jsonl").read_bytes()
    assert main([*words, "--objective.epsilon", "0.3", "--force"]) == 0
    assert (tmp_path / "results-sweep.unfinished-2.jsonl").read_bytes() == kept
    assert not (tmp_path / "results-sweep.unfinished.jsonl").exists()
    told = [str(note) for note in SweepResult.load(tmp_path / "results-sweep").warnings]
    assert any("it was kept as results-sweep.unfinished-2.jsonl" in text for text in told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--lrs is missing"),
        (["--lrs"], "--lrs has no value"),
        (["--lrs", "abc"], "--lrs: found 'abc', expected FIRST:LAST:COUNT"),
        (["--lrs", "1e-6:1e-4"], "expected FIRST:LAST:COUNT"),
        (["--lrs", "1e-6:1e-4:1"], "expected FIRST:LAST:COUNT"),
        (["--lrs", "1e-4:1e-6:3"], "stands after"),
        (["--lrs", "1e-6,1e-6"], "stands twice"),
        (["--lrs", "0:1e-6:3"], "cannot be swept"),
        (["--lrs", "-1e-6,1e-6"], "cannot be swept"),
        (["--lrs", "nan"], "--lrs: found 'nan', expected FIRST:LAST:COUNT"),
        (["--lrs", ","], "no learning rates"),
        ([*LRS, *LRS], "--lrs stands twice"),
        ([*LRS, "--chunk", "0"], "--chunk: found '0'"),
        ([*LRS, "--mode", "reverse", "--order", "2"], "order: 2 is made of forward-mode passes"),
        ([*LRS, "--also", "fame"], "also"),
        ([*LRS, "--tolerance", "0"], "tolerance"),
        ([*LRS, "--method", "difference", "--tolerance", "1e-3"], "tolerance: can do nothing"),
        ([*LRS, "--bars", "none", "--level", "0.9"], "level: can do nothing without bars"),
        ([*LRS, "--seed", "3"], "seed: can do nothing without bars bootstrap"),
    ],
)
def test_bad_words_are_one_calm_line(
    words: list[str], message: str, world: World, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("sweep", world.config(tmp_path), *words)


def test_rewards_that_are_missing_are_asked_for(world: World, tmp_path: Path, refused: Refused) -> None:
    from funcprobe.data.files import write_rollouts

    write_rollouts(tmp_path / "bare.parquet", world.evaluation._replace(rewards=None))
    config = world.config(tmp_path, evaluation="bare.parquet", also=["reward"])
    for name, more in (("sweep", LRS), ("run", [])):
        assert "needs rewards, and these rollouts carry none" in refused(name, config, *more)


def test_results_are_not_overwritten_and_help_teaches(
    world: World, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    with fresh_directory(tmp_path / "results-sweep") as folder:
        (folder / "result.json").write_text("{}")
    assert "exists already; choose another folder" in refused("sweep", world.config(tmp_path), *LRS)
    with pytest.raises(SystemExit) as end:
        main(["sweep", "config.yaml", "--help"])
    assert end.value.code == 0
    assert "--lrs FIRST:LAST:COUNT" in capsys.readouterr().out


def test_ranges_are_spread_by_factors() -> None:
    assert parse_lrs("1e-8:1e-4:9") == pytest.approx([10 ** (-8 + k / 2) for k in range(9)], rel=1e-5)
    assert parse_lrs("1e-8:1e-6:3") == [1e-8, 1e-7, 1e-6]
    assert all(math.isfinite(lr) for lr in parse_lrs("3e-9:7e-2:40"))
