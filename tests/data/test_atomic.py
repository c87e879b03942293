"""Folders and files that appear whole or not at all, and of which nothing is lost that somebody else wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from funcprobe.data import atomic, exchange
from funcprobe.data.atomic import fresh_directory, fresh_file
from funcprobe.data.ownership import MARKER
from funcprobe.errors import InputError


def write(target: Path, text: str, *, overwrite: bool = False) -> None:
    with fresh_directory(target, overwrite=overwrite) as folder:
        (folder / "one").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


NOT_OURS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file beside": (lambda f: (f / "mine").write_text("x"), "'mine', which funcprobe did not write"),
    "a file changed": (lambda f: (f / "one").write_text("x"), "'one', which has changed since funcprobe wrote it"),
    "no marker": (lambda f: (f / MARKER).unlink(), r"no \.funcprobe\.json"),
    "a damaged marker": (lambda f: (f / MARKER).write_text("{"), r"no \.funcprobe\.json"),
    "another schema": (lambda f: (f / MARKER).write_text('{"funcprobe": 9, "files": {}}'), r"no \.funcprobe\.json"),
    "a folder": (lambda f: (f / "inside").mkdir(), "'inside', which funcprobe did not write"),
    "a folder under a name of ours": (
        lambda f: ((f / "one").unlink(), (f / "one").mkdir(), (f / "one" / "x").write_text("")),
        "'one', which funcprobe did not write",
    ),
    "a link under a name of ours": (
        lambda f: ((f / "one").rename(f.parent / "moved"), (f / "one").symlink_to("../moved")),
        "'one', which funcprobe did not write",
    ),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_nothing_is_replaced_that_somebody_else_wrote(what: str, tmp_path: Path) -> None:
    spoil, said = NOT_OURS[what]
    write(tmp_path / "out", "old")
    spoil(tmp_path / "out")
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said):
        write(tmp_path / "out", "new", overwrite=True)
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.fixture(params=["in one operation", "in two steps"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in two steps":
        monkeypatch.setattr(exchange, "_renameat2", lambda: None)
    return request.param


def test_ours_is_replaced_and_nothing_stays_beside_it(system: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "one").read_text() == "new"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new", overwrite=True)
    assert names(tmp_path) == ["empty", "out"]


def test_the_second_of_two_says_at_its_end_where_its_results_are(system: str, tmp_path: Path) -> None:
    placed: list[Path] = []
    with (  # noqa: PT012
        pytest.raises(InputError, match=r"out exists already and is not overwritten; the new results lie in .*out-2"),
        fresh_directory(tmp_path / "out", placed=placed.append) as folder,
    ):
        write(tmp_path / "out", "first")
        (folder / "one").write_text("second")
    assert (tmp_path / "out" / "one").read_text() == "first"
    assert (tmp_path / "out-2" / "one").read_text() == "second"
    assert placed == [tmp_path / "out-2"]
    with (  # noqa: PT012
        pytest.raises(InputError, match="holds 'mine', which funcprobe did not write"),
        fresh_directory(tmp_path / "out", overwrite=True) as folder,
    ):
        (tmp_path / "out" / "mine").write_text("put there meanwhile")
        (folder / "one").write_text("third")
    assert (tmp_path / "out-3" / "one").read_text() == "third"
    assert names(tmp_path) == ["out", "out-2", "out-3"]


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_killed_between_two_renames_the_next_one_finds_the_new_results(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exchange in one operation: a process that dies after the first rename, and one after the second."""
    write(tmp_path / "out", "old")
    program = f"""
import os, pathlib, shutil
from funcprobe.data import atomic, exchange
exchange._renameat2 = lambda: None
if {step!r} == "rmtree":
    shutil.rmtree = lambda *_, **__: os._exit(9)
else:
    whole = pathlib.Path.rename
    def once(self, target):
        whole(self, target)
        os._exit(9)
    pathlib.Path.rename = once
with atomic.fresh_directory({str(tmp_path / "out")!r}, overwrite=True) as folder:
    (folder / "one").write_text("new")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], check=False, env=environment).returncode == 9
    assert (tmp_path / "out").exists() == (step == "rmtree")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "out", "third")
    assert (tmp_path / "out" / "one").read_text() == "new"
    write(tmp_path / "out", "third", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_partial_folders_of_dead_processes_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    program = f"""
import os
from funcprobe.data.atomic import fresh_directory, fresh_file
with fresh_directory({str(tmp_path / "out")!r}), fresh_file({str(tmp_path / "file")!r}):
    os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], check=False, env=environment).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    (tmp_path / ".out.12345678.partial").mkdir()  # somebody's: it carries no marker
    with fresh_directory(tmp_path / "out") as alive, fresh_file(tmp_path / "file") as living:
        for overwrite in (False, True):
            write(tmp_path / "out", "text", overwrite=overwrite)
            with fresh_file(tmp_path / "file", overwrite=overwrite) as path:
                path.write_text("text")
        assert alive.exists()
        assert living.exists()
        assert names(tmp_path) == sorted([".out.12345678.partial", alive.name, living.name, "file", "out"])
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "file").unlink()
    assert names(tmp_path) == [".out.12345678.partial", "file", "moved", "out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_the_renames_waits_until_the_folder_is_known_to_stand(
    number: signal.Signals, system: str, tmp_path: Path
) -> None:
    class Stop(Exception):
        """Raised by the signal."""

    def stop(*_: object) -> None:
        raise Stop

    def placed(path: Path) -> None:
        os.kill(os.getpid(), number)
        known.append(path)

    known: list[Path] = []
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stop), fresh_directory(tmp_path / "out", placed=placed) as folder:
            (folder / "one").write_text("new")
    finally:
        signal.signal(number, before)
    assert known == [tmp_path / "out"]
    assert names(tmp_path) == ["out"]


def test_a_link_is_followed_and_what_it_leads_to_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").readlink() == Path("real")
    assert (tmp_path / "real" / "one").read_text() == "new"


def test_an_error_of_the_system_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: .*out"), fresh_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []
    assert atomic.put_aside(tmp_path_file(tmp_path)) == tmp_path / "notes-2.txt"


def tmp_path_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("kept")
    return folder / "notes.txt"
