"""The books of a run: sums of windows, their closing, the words, and the round trip to disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

import funcprobe as fp
from funcprobe.errors import Note
from funcprobe.results.blocks import Figure, Remark
from funcprobe.results.books import Books
from funcprobe.results.books_words import OTHER_STEP
from funcprobe.results.provenance import BatchCounts
from funcprobe.results.window import Lost, Mark, Window
from tests.cases import ledgers
from tests.cases.ledgers import Loop

SIZE = BatchCounts(8, 40, 4)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Books:
    """Return the books of a short run, every step of which was opened."""
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path_factory.mktemp("run"), {"h": fp.entropy(), "kl": fp.kl()}, open_every=1)
    loop.run(book, 4)
    return book.close()


def mark(step: int, value: float, error: float) -> Mark:
    return Mark(step, {"h": value}, {"h": error}, SIZE)


def test_sums_are_those_of_the_windows(books: Books) -> None:
    total = books.total()
    assert total.change == math.fsum(w.main.change for w in books)
    assert total.error == pytest.approx(math.sqrt(math.fsum(w.error**2 for w in books)))
    assert total.windows == 4
    assert books.total("kl", first=1, last=2).windows == 2
    assert math.fsum(books.split.values()) == pytest.approx(total.change, rel=1e-12)
    assert [*books.split][-1] == "remainder"
    assert abs(books.most(1)[0].main.change) == max(abs(w.main.change) for w in books)
    assert books.main == "h"


def test_a_closing_is_between_the_first_mark_and_the_last(books: Books) -> None:
    total = books.total("h", 1, 3)
    start, end = mark(1, 1.0, 3e-4), mark(4, 1.0 + total.change + 1e-3, 4e-4)
    closing = dataclasses.replace(books, marks=(start, mark(2, 9.0, 1.0), end)).closing["h"]
    assert closing.total == total
    assert closing.seen_error == pytest.approx(5e-4)
    assert closing.error == pytest.approx(-1e-3)
    assert closing.error_bar == pytest.approx(math.hypot(total.error, 5e-4))
    assert closing.missing == 0
    without = dataclasses.replace(books, windows=books.windows[:2] + books.windows[3:], marks=(start, end))
    assert without.closing["h"].missing == 1
    assert not without.closing["h"].closes
    assert "1 steps in between are in no window" in " ".join(without.summary().split())
    assert dataclasses.replace(books, marks=(start,)).closing == {}


def test_the_text_says_who_did_it_and_what_is_missing(books: Books) -> None:
    text = books.summary()
    largest = max(books.split, key=lambda name: abs(books.split[name]))
    assert text.startswith("Over 4 optimizer steps in 4 windows h ")
    assert f"The largest part is {'remainder' if largest == 'remainder' else largest}" in " ".join(text.split())
    assert "tokens of U that did most" in text
    assert "The books of h" in text
    assert Figure("ledger") in books.blocks()
    lost = tuple(Lost(k, k, f"reason {k}") for k in range(5))
    text = dataclasses.replace(books, lost=lost).summary()
    assert "Steps 2 to 2 are in no window: reason 2" in text
    assert "2 more stretches of steps are in no window" in text


def test_steps_of_another_are_told_and_warnings_once(books: Books) -> None:
    odd = dataclasses.replace(books.windows[1], mismatch=10 * OTHER_STEP, warnings=(Note("ess", "It is low."),))
    again = dataclasses.replace(books.windows[2], warnings=(Note("ess", "It is lower."), Note("ess", "Lowest.")))
    told = dataclasses.replace(books, windows=(books.windows[0], odd, again, books.windows[3]))
    remarks = [block.text for block in told.blocks() if isinstance(block, Remark)]
    assert any("In 1 windows (such as that of step 1) the trainer's step is another" in text for text in remarks)
    assert "It is low (in 2 of 4 windows)" in remarks


def test_books_without_a_window_say_when_one_comes() -> None:
    assert "one closes when the second generation" in Books(()).summary()
    assert Books(()).main is None
    assert Books(()).columns() == {}


def test_a_window_without_parts_says_so(books: Books) -> None:
    windows = tuple(dataclasses.replace(w, split={"steps": w.main.first_order}) for w in books)
    assert "the steps, whose parts are not known" in Books(windows).summary()


def test_books_are_saved_and_loaded(books: Books, tmp_path: Path) -> None:
    books.save(tmp_path / "books")
    assert fp.load(tmp_path / "books") == books
    assert Books.load(tmp_path / "books").summary() == books.summary()


def test_a_frame_is_a_row_a_window(books: Books) -> None:
    frame = books.to_frame()
    assert frame["h/change"].tolist() == [w.main.change for w in books]
    assert frame["split/momentum"].tolist() == [w.split["momentum"] for w in books]
    units = {field.name: field.metadata for field in books.to_frame(library="arrow").schema}
    assert units["h/change"] == units["split/momentum"] == {b"unit": books.windows[0].main.unit.encode()}
    assert units["lr"] is None


def test_completeness_sees_parts_that_do_not_sum(books: Books) -> None:
    window: Window = books.windows[1]
    assert window.completeness < 1e-10
    halved = {name: 0.5 * value for name, value in window.split.items()}
    assert dataclasses.replace(window, split=halved).completeness > 0.1
