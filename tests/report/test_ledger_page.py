"""The page of a ledger: one file that loads nothing, with everything that it was given escaped."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from funcprobe.errors import Note
from funcprobe.report.ledger_page import ledger_page
from funcprobe.results.books import Books
from tests.cases import ledgers
from tests.cases.ledgers import Loop

EVIL = "<script>alert(1)</script>"


def test_a_page_is_whole_and_safe(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path / "run", open_every=1)
    windows = loop.run(book, 2)
    opened = windows[0].opened[0]
    token = opened.tokens[0]._replace(text=EVIL, contribution=1.0)
    odd = dataclasses.replace(
        windows[0],
        opened=(dataclasses.replace(opened, tokens=(token,)),),
        warnings=(Note("x", EVIL),),
        trainer={EVIL: 1.0},
    )
    path = ledger_page(Books((odd, windows[1])), tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 3
    own = r"&#39;sha256-[\w+/=]+&#39;"
    policy = rf"default-src &#39;none&#39;; style-src {own} &#39;unsafe-hashes&#39; {own}; img-src data:"
    assert re.search(policy, text)
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert all(f"<td>{window.first}</td>" in text for window in windows)


def test_a_page_of_no_windows_says_so(tmp_path: Path) -> None:
    assert "No window is in the books yet" in ledger_page(Books(()), tmp_path / "page.html").read_text()
