"""Sinks of a ledger: what they are told, and that one which fails is told of no more while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from funcprobe.live.sinks import PREFIX, Sink, scalars_of
from tests.cases import ledgers
from tests.cases.ledgers import Loop, telling


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.told, self.pages, self.closed = fails, {}, {}, False  # type: ignore[var-annotated]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails == "scalars":
            raise ConnectionError("no route to the host")
        self.told[step] = dict(values)

    def page(self, step: int, name: str, text: str) -> None:
        self.pages[step] = (name, text)

    def close(self) -> None:
        if self.fails == "close":
            raise RuntimeError("already closed")
        self.closed = True


def test_every_window_is_told_by_stable_names(tmp_path: Path) -> None:
    loop, sink = Loop(), Kept()
    assert isinstance(sink, Sink)
    book = ledgers.ledger(loop, tmp_path, open_every=2, sinks=[sink])
    windows = loop.run(book, 3)
    book.note({"loss": 1.0})
    book.close()
    assert sink.closed
    assert list(sink.told) == [0, 1, 2]
    assert len({frozenset(values) for values in sink.told.values()}) == 1
    for window in windows:
        told = sink.told[window.last]
        assert told == scalars_of(window)
        assert told[f"{PREFIX}entropy/change"] == window.main.change
        assert told[f"{PREFIX}split/gradient_on_U"] == window.split["gradient on U"]
        assert told[f"{PREFIX}remainder"] == window.remainder
        assert not any("trainer" in name for name in told)
    assert list(sink.pages) == [0, 2]
    name, text = sink.pages[0]
    assert name == "funcprobe/tokens"
    assert text.startswith("<!DOCTYPE html>")
    assert "tokens of U that did most" in text


@pytest.mark.parametrize("fails", ["scalars", "close"])
def test_a_tracker_that_fails_is_told_of_no_more(tmp_path: Path, fails: str) -> None:
    loop, broken, other = Loop(), Kept(fails), Kept()
    book = ledgers.ledger(loop, tmp_path, sinks=[broken, other])
    with telling() as told:
        loop.run(book, 2)
        books = book.close()
    assert len(books.windows) == 2
    assert len(told) == 1
    assert "Kept failed (" in told[0]
    assert "is told of no more windows" in told[0]
    assert list(other.told) == [0, 1]
    assert other.closed
