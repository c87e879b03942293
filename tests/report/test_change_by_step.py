"""The figure of a ledger: stacks that end where the measured line does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from funcprobe.report.canvas import write
from funcprobe.report.change_by_step import plot_ledger
from funcprobe.results.books import Books
from tests.cases import ledgers
from tests.cases.ledgers import Loop


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Books:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path_factory.mktemp("run"))
    loop.run(book, 3)
    return book.close()


def test_the_line_is_the_sum_and_the_stacks_end_on_it(books: Books, tmp_path: Path) -> None:
    ax = plot_ledger(books)
    (line,) = [line for line in ax.lines if line.get_label() == "measured"]
    expected = np.cumsum([0.0, *(window.main.change for window in books)])
    assert np.asarray(line.get_ydata()) == pytest.approx(expected)
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    # the outer edges of the stacks at the last step sum to the change
    ends = [area.get_paths()[0].vertices for area in ax.collections]
    reached = [(v[v[:, 0] == 3, 1].min(), v[v[:, 0] == 3, 1].max()) for v in ends]
    edges = min(low for low, _ in reached) + max(high for _, high in reached)
    seen = {text.get_text() for text in ax.get_legend().get_texts()}
    left_out = sum(value for name, value in books.split.items() if name not in seen)
    assert edges + left_out == pytest.approx(expected[-1], rel=1e-9)
    assert {"gradient on U", "momentum", "measured", "± 2 standard errors"} <= seen
    assert "nats per token" in ax.get_ylabel()
    write(ax, tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").stat().st_size > 10_000


def test_what_was_logged_is_drawn_beside(books: Books) -> None:
    told = tuple(
        dataclasses.replace(w, trainer={"entropy": 2.0 + 0.1 * k, "$x$": 1.0} if k else {}) for k, w in enumerate(books)
    )
    ax = plot_ledger(Books(told), logged="entropy")
    (dots,) = [line for line in ax.lines if line.get_label() == "logged entropy, since the first"]
    assert list(dots.get_xdata()) == [2, 3]
    assert np.asarray(dots.get_ydata()) == pytest.approx([0.0, 0.1])
    assert len(plot_ledger(Books(told), logged="missing").lines) == len(ax.lines) - 1
