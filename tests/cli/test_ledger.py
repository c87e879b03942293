"""`funcprobe ledger`: the books of a run's folder, while it is written and after."""

from __future__ import annotations

from pathlib import Path

import pytest

import funcprobe as fp
from funcprobe.cli.main import main
from tests.cases import ledgers
from tests.cases.ledgers import Loop


def test_the_books_of_a_run_in_progress_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path / "run" / "ledger", open_every=1)
    loop.run(book, 3)
    assert main(["ledger", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Over 3 optimizer steps in 3 windows entropy ")
    assert main(["ledger", str(tmp_path / "run" / "ledger"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(said)
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"ledger.html", "ledger.png", "result.json", "summary.txt", "windows.csv"}
    assert fp.load(tmp_path / "out") == book.books
    assert (tmp_path / "out" / "summary.txt").read_text() == said
    assert len((tmp_path / "out" / "windows.csv").read_text().splitlines()) == 4
    # again only where it is asked for
    assert main(["ledger", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert main(["ledger", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--force"]) == 0


def test_a_folder_without_one_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(tmp_path)]) == 2
    assert "holds no ledger.jsonl" in capsys.readouterr().err
