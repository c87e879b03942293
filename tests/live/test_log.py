"""A ledger on disk: lines that are only added, cut ends, resumption, one writer, full disks, damage."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.live.log import Log
from funcprobe.results.ledger_lines import FILE, Resumed, columns_of, plain_of, read_lines
from funcprobe.results.provenance import BatchCounts
from funcprobe.results.window import Lost, Mark
from tests.cases import ledgers
from tests.cases.ledgers import Loop, telling

LINE = Lost(3, 4, "a reason with a “quote” and\na line break")
MARK = Mark(5, {"entropy": 1.5}, {"entropy": float("nan")}, BatchCounts(8, 40, 4))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run, each step of which was opened."""
    folder = tmp_path_factory.mktemp("ledger")
    loop = Loop()
    book = ledgers.ledger(loop, folder, {"h": fp.entropy(), "kl": fp.kl()}, open_every=1)
    loop.run(book, 3)
    book.close()
    return folder


def copied(written: Path, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    (place / FILE).write_bytes((written / FILE).read_bytes())
    return place / FILE


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path, open_every=1)
    windows = loop.run(book, 2)
    assert read_lines(tmp_path).windows == tuple(windows)  # while it is open
    assert book.close().windows == fp.Books.read(tmp_path).windows == tuple(windows)


def test_lines_are_json_that_anything_reads(written: Path) -> None:
    plain = [json.loads(line) for line in (written / FILE).read_text().splitlines()]
    assert [line["kind"] for line in plain] == ["mark", "window", "window", "window", "mark"]
    assert plain[1]["readings"]["h"]["change"] == read_lines(written).windows[0].main.change


def test_columns_are_a_row_a_window(written: Path) -> None:
    columns = columns_of(read_lines(written).windows)
    assert columns["first"] == [0, 1, 2]
    assert {"h/change", "h/error", "kl/change", "split/momentum", "ess/ess_base", "lr"} <= set(columns)
    assert len({len(values) for values in columns.values()}) == 1


@pytest.mark.parametrize("kept", [1, 40, 100])
def test_a_line_that_was_cut_off_is_dropped_and_the_next_stands_whole(written: Path, tmp_path: Path, kept: int) -> None:
    file = copied(written, tmp_path)
    whole = file.read_bytes()
    end = whole.rindex(b"\n", 0, -1) + 1
    file.write_bytes(whole[: end + kept])
    assert len(read_lines(tmp_path).marks) == 1
    log = Log(tmp_path)
    log.add(MARK)
    log.close()
    lines = read_lines(tmp_path)
    assert [mark.step for mark in lines.marks] == [0, 5]
    assert len(lines.windows) == 3
    assert file.read_bytes().count(b"\n") == 5


def test_a_run_that_begins_again_at_a_step_forgets_the_later_ones(written: Path, tmp_path: Path) -> None:
    copied(written, tmp_path)
    log = Log(tmp_path)
    log.add(Resumed(1))
    log.add(LINE)
    assert [window.first for window in log.lines.windows] == [0]
    log.close()
    lines = read_lines(tmp_path)
    assert [window.first for window in lines.windows] == [0]
    assert lines.lost == (LINE,)
    assert [mark.step for mark in lines.marks] == [0]


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    log = Log(tmp_path)
    code = f"from funcprobe.live.log import Log; Log({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is being written by another run" in found.stderr
    log.close()


def test_a_full_disk_is_told_once_and_lines_wait(tmp_path: Path) -> None:
    """A limit on the size of files is what a process can be given of a full disk."""
    log = Log(tmp_path)
    log.add(MARK)
    size = (tmp_path / FILE).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        with telling() as told:
            log.add(LINE)
            log.add(MARK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(told) == 1
    assert "cannot be written (File too large); training goes on" in told[0]
    assert (tmp_path / FILE).stat().st_size == size, "no half line"
    assert len(log.lines.marks) == 2
    log.add(LINE)  # there is room again: all that waited goes out, in order
    assert log.close() == 0
    assert [json.loads(line)["kind"] for line in (tmp_path / FILE).read_text().splitlines()] == [
        *("mark", "lost", "mark", "lost")
    ]


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        import os, signal
        from funcprobe.live.log import Log
        from funcprobe.results.window import Lost
        log = Log({str(tmp_path)!r})
        for k in range(20):
            log.add(Lost(k, k, "x" * 100))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    found = subprocess.run([sys.executable, "-c", code], check=False)
    assert found.returncode == -signal.SIGKILL
    assert [lost.first for lost in read_lines(tmp_path).lost] == [*range(20)]
    Log(tmp_path).close()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace(b'"kind": "window"', b'"kind": "windows"', 1), "kind windows"),
        (lambda text: text.replace(b'"schema_version": 1', b'"schema_version": 2', 1), "schema version 2"),
        (lambda text: text.replace(b'"first": 0', b'"first": "zero"', 1), "damaged"),
        (lambda text: text.replace(b'"readings"', b'"reading"', 1), "damaged"),
        (lambda text: b"not json\n" + text, "line 1: no line of a ledger"),
        (lambda text: b"[]\n" + text, "damaged"),
        (lambda text: b"[" * 100_000 + b"\n" + text, "damaged"),
        (lambda text: b"\xff\xfe\n" + text, "damaged"),
    ],
)
def test_a_damaged_line_is_named(written: Path, tmp_path: Path, damage: object, said: str) -> None:
    file = copied(written, tmp_path)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError, match=said):
        read_lines(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no ledger\.jsonl"):
        read_lines(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; a ledger is a folder"):
        Log(tmp_path / "file")


def test_a_line_names_its_kind() -> None:
    assert plain_of(LINE) == {"schema_version": 1, "kind": "lost", "first": 3, "last": 4, "reason": LINE.reason}
    assert plain_of(MARK)["errors"] == {"entropy": "nan"}
