"""The one way of every command, with a command that measures nothing: order, files, trackers, interruptions."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from funcprobe.cli import command as way
from funcprobe.cli import main as entry
from funcprobe.cli.command import Beside, Command, PlainCommand, carry_out, told
from funcprobe.cli.config import Config
from funcprobe.cli.options import Argument, Option
from funcprobe.data.ownership import MARKER
from funcprobe.errors import ConfigError, FuncprobeWarning, InputError, Note
from funcprobe.results.blocks import Block, Sentence
from funcprobe.results.result import Result
from funcprobe.results.storage import FILES
from tests.cases.packages import Install, install

__all__ = ["install"]  # a fixture

GUEST = """\
seen = []


def note(result):
    seen.append(result)


def broken(result):
    raise RuntimeError("no network")
"""


@dataclasses.dataclass(frozen=True)
class Counted(Result):
    """A result that counts to a number."""

    number: int
    warnings: tuple[Note, ...] = ()
    notes: tuple[Note, ...] = ()

    def blocks(self) -> tuple[Block, ...]:
        return (Sentence(f"counted to {self.number}"),)

    def write_into(self, folder: Path) -> None:
        (folder / FILES[0]).write_text(str(self.number))


class Steps(list[str]):
    """Which parts of a command ran, in order."""


def counting(steps: Steps, **changes: Any) -> Command[Counted]:
    """Return a command that takes --to N and writes half of it beside."""

    def do(config: Config, options: Namespace, bars: way.Bars) -> Counted:
        steps.append("do")
        warnings.warn("counting is slow", FuncprobeWarning, stacklevel=1)
        warnings.warn(Note("kind", "and of a kind"), FuncprobeWarning, stacklevel=1)
        warnings.warn(Note("format", "read as such"), FuncprobeWarning, stacklevel=1)
        return Counted(options.to, (Note("kind", "and of a kind"), Note("own", "three")))

    def half(result: Counted, folder: Path) -> None:
        steps.append("write")
        (folder / "half.txt").write_text(str(result.number / 2))

    given: dict[str, Any] = {
        "name": "count",
        "description": "Count.",
        "epilog": lambda: "example:\n  funcprobe count c.yaml --to 3",
        "done": "counted",
        "do": do,
        "warned": told,
        "options": (Option("to", "N", "how far", read=int, expected="a whole number", required=True),),
        "suffix": "-count",
        "check": lambda config, options: steps.append("check"),
        "beside": (Beside(frozenset({"half.txt", "never.txt"}), half),),
    }
    return Command(**{**given, **changes})


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps()

    def resolved(config: Config) -> Config:
        found.append("load")
        return config

    monkeypatch.setattr(way, "resolved", resolved)
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("checkpoint: c\nevaluation: e\nbatch: u\n")
    return path


def test_a_command_is_parsed_loaded_done_written_and_shown(
    steps: Steps, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = carry_out(counting(steps), config, ["--to", "6", "--lr", "1e-3"])
    assert steps == ["check", "load", "do", "write"]
    folder = config.parent / "results-count"
    assert {p.name: p.read_text() for p in folder.iterdir() if p.name not in ("config.yaml", MARKER)} == {
        "result.json": "6",
        "half.txt": "3.0",
        "summary.txt": "counted to 6\n",
    }
    assert (folder / "config.yaml").read_text().startswith("# As counted by funcprobe ")
    assert "lr: 0.001" in (folder / "config.yaml").read_text()
    assert capsys.readouterr().out == f"counted to 6\nResults: {folder}\n"
    assert [(note.kind, str(note)) for note in result.warnings] == [
        ("input", "counting is slow"),
        ("kind", "and of a kind"),
        ("own", "three"),
    ]
    assert [(note.kind, str(note)) for note in result.notes] == [("format", "read as such")]


def test_what_may_be_replaced_is_what_the_record_says_that_it_writes(steps: Steps, config: Path) -> None:
    command = counting(steps)
    assert command.written == {*FILES, MARKER, "config.yaml", "summary.txt", "half.txt", "never.txt"}
    assert counting(steps, figures=frozenset({"sum"})).written == command.written | {"sum.png"}
    carry_out(command, config, ["--to", "6"])
    with pytest.raises(ConfigError, match="exists already"):
        carry_out(command, config, ["--to", "7"])
    carry_out(command, config, ["--to", "7", "--force"])
    folder = config.parent / "results-count"
    assert (folder / "result.json").read_text() == "7"
    (folder / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds 'mine.txt', which funcprobe did not write"):
        carry_out(command, config, ["--to", "8", "--force"])


def test_a_file_that_cannot_be_written_leaves_nothing(steps: Steps, config: Path) -> None:
    def full(*_: object) -> None:
        raise InputError("The disk is full.")

    with pytest.raises(InputError, match="The disk is full"):
        carry_out(counting(steps, beside=(Beside(frozenset(), full),)), config, ["--to", "1"])
    assert [p.name for p in config.parent.iterdir()] == ["config.yaml"]


def test_what_was_unfinished_goes_when_all_is_written(steps: Steps, config: Path) -> None:
    journal = config.parent / "journal"
    journal.write_text("half")
    command = counting(steps, unfinished=lambda _: journal)

    def full(*_: object) -> None:
        raise InputError("The disk is full.")

    with pytest.raises(InputError):
        carry_out(dataclasses.replace(command, beside=(Beside(frozenset(), full),)), config, ["--to", "1"])
    assert journal.exists()
    carry_out(command, config, ["--to", "1"])
    assert not journal.exists()


def test_an_output_that_is_named_gets_no_suffix(steps: Steps, config: Path) -> None:
    for words in (["--output", str(config.parent / "one")], [f"--output={config.parent / 'two'}"]):
        carry_out(counting(steps), config, ["--to", "1", *words])
    assert {p.name for p in config.parent.iterdir()} == {"config.yaml", "one", "two"}


# trackers


def test_a_tracker_is_given_the_result_when_it_is_written(
    steps: Steps, config: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("guest", {"funcprobe.trackers": {"notes": "guest:note", "bad": "guest:broken"}}, GUEST)
    result = carry_out(counting(steps), config, ["--to", "6", "--trackers", "notes"])
    import guest  # type: ignore[import-not-found]

    assert guest.seen == [result]
    steps.clear()
    with pytest.raises(ConfigError) as caught:
        carry_out(counting(steps), config, ["--to", "6", "--trackers", "notes, bad", "--force"])
    message = "trackers: The tracker 'bad' of guest (guest:broken) failed: RuntimeError: no network. The results are in"
    assert str(caught.value) == f"{message} {config.parent / 'results-count'}."
    assert len(guest.seen) == 2
    assert steps[-1] == "write"
    assert (config.parent / "results-count" / "result.json").exists()


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_done(steps: Steps, config: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trackers: found 'mine', expected names that .* bring \(none is installed\)"
    ):
        carry_out(counting(steps), config, ["--to", "6", "--trackers", "mine"])
    assert steps == []


# main


@pytest.fixture
def registered(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that registers one more command, as a line in `main` does."""

    def register(record: Command[Counted] | PlainCommand) -> None:
        monkeypatch.setitem(entry.COMMANDS, record.name, entry.Registered("tests.cli.added", "something more"))
        monkeypatch.setitem(sys.modules, "tests.cli.added", Namespace(COMMAND=record))

    return register


def test_one_line_registers_a_command(
    steps: Steps, config: Path, registered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    registered(counting(steps))
    with pytest.raises(SystemExit):
        entry.main(["--help"])
    assert re.search(r"^  count +something more$", capsys.readouterr().out, re.MULTILINE)
    for words in (["count", "--help"], ["count", "c.yaml", "--to", "1", "-h"]):
        with pytest.raises(SystemExit):
            entry.main(words)
        out = capsys.readouterr().out
        assert out.startswith("usage: funcprobe count CONFIG.yaml --to N [--key value ...]")
        assert "  funcprobe count c.yaml --to 3\n\n  --to N   required: how far" in out
    assert entry.main(["count", str(config), "--to", "6"]) == 0


def test_interrupted_a_command_says_in_its_own_words_what_is_kept(
    steps: Steps, config: Path, registered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> Counted:
        raise KeyboardInterrupt

    registered(counting(steps, do=stopped, when_interrupted="; half is kept"))
    assert entry.main(["count", str(config), "--to", "6"]) == 130
    assert capsys.readouterr().err == "funcprobe: interrupted; no results were written; half is kept.\n"


def test_a_command_without_a_configuration_has_all_its_words(
    steps: Steps, registered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Namespace] = []
    record = PlainCommand(
        "copy",
        "Copy.",
        given.append,
        (Argument("source", "FILE", "what is copied"),),
        (
            Option("times", "N", "how often", default=1, read=int),
            Option("force", "", "replace it", default=False, flag=True),
        ),
    )
    registered(record)
    assert entry.main(["copy", "a", "--times", "3", "--force"]) == 0
    assert entry.main(["copy", "b"]) == 0
    assert [vars(values) for values in given] == [
        {"source": "a", "times": 3, "force": True},
        {"source": "b", "times": 1, "force": False},
    ]
    assert entry.main(["copy"]) == 2
    assert entry.main(["copy", "a", "--times", "x"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "funcprobe: the following arguments are required: FILE; see funcprobe copy --help.",
        "funcprobe: --times: found 'x', expected another value.",
    ]


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_registered_command_is_a_record_of_that_name(name: str) -> None:
    command = importlib.import_module(entry.COMMANDS[name].module).COMMAND
    assert command.name == name
    assert len(entry.COMMANDS[name].help) < 60
