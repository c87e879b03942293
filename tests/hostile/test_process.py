"""The process itself: closed streams, full devices, readers that leave, homes that are not there, limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a shell's line ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, made by a process of its own."""
    folder = tmp_path_factory.mktemp("template") / "room"
    folder.mkdir()
    code = f"from pathlib import Path; from tests.hostile.room import build; build(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=_environment(), capture_output=True)
    return folder


@pytest.fixture
def shell(template: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Run a line of a shell in a room of its own, in which `funcprobe` is the command."""
    from tests.hostile.room import copied

    room = copied(template, tmp_path / "room", tmp_path / "executed").folder

    def run(line: str, **environment: str) -> Ended:
        script = f'funcprobe() {{ "{sys.executable}" -m funcprobe.cli.main "$@"; }}\nset -o pipefail\n{line}'
        found = {**_environment(), **environment}
        done = subprocess.run(["bash", "-c", script], cwd=room, env=found, capture_output=True, text=True, timeout=300)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


#: A line, its exit code, what it must say on standard error, and whether there are results.
LINES: dict[str, tuple[str, int, str, bool]] = {
    "no stderr, bad input": ("funcprobe run nowhere.yaml 2>&-", 2, "", False),
    "no stdin and no stdout": ("funcprobe run config.yaml <&- >&-", 0, "", True),
    "nothing open": ("funcprobe run config.yaml <&- >&- 2>&-", 0, "", True),
    "a full device": ("funcprobe run config.yaml > /dev/full", 2, "standard output cannot be written", True),
    "stderr on a full device": ("funcprobe run nowhere.yaml 2> /dev/full", 2, "", False),
    "a reader of one line": ("funcprobe run config.yaml | head -1 > /dev/null", 0, "", True),
    "a reader of nothing": ("funcprobe run config.yaml | true", 0, "", True),
    "a limit on the size of files": ("ulimit -f 8; funcprobe run config.yaml", 2, "File too large", False),
    "no user and no home": (
        "unset HOME USER LOGNAME; export FUNCPROBE_CACHE=; funcprobe run config.yaml > /dev/null",
        0,
        "",
        True,
    ),
    "a home that may not be written in": ("HOME=/proc funcprobe run config.yaml > /dev/null", 0, "", True),
    "hostile settings": (
        "COLUMNS=abc TERM=dumb NO_COLOR=1 LC_ALL=C PYTHONIOENCODING=ascii funcprobe run config.yaml > /dev/null",
        0,
        "",
        True,
    ),
    "a backend that is none": ("MPLBACKEND=nonsense funcprobe run config.yaml", 2, "MPLBACKEND", False),
}


@pytest.mark.parametrize("name", LINES)
def test_a_process_in_a_strange_place(name: str, shell: Callable[..., Ended], tmp_path: Path) -> None:
    line, code, said, results = LINES[name]
    ended = shell(line)
    assert ended.code == code, ended
    assert said in ended.err
    assert ended.err.count("\n") <= (1 if said else 0), ended.err
    room = tmp_path / "room"
    assert (room / "results" / "result.json").exists() == results
    assert not [p for p in room.iterdir() if p.name.startswith(".")]


def test_at_40_columns_numbers_stay_whole(shell: Callable[..., Ended]) -> None:
    wide = shell("COLUMNS=200 funcprobe run config.yaml").out
    narrow = shell("rm -rf results; COLUMNS=40 funcprobe run config.yaml").out
    numbers = [word for word in wide.split() if "e-" in word and word[0] in "-+0123456789"]
    assert numbers
    assert [word for word in narrow.split() if word in numbers] == numbers
