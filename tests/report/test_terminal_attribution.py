"""The summary of an attribution: who did it, in 80 columns, and nothing in a token's text does anything."""

from __future__ import annotations

import io

import numpy as np
import pytest

from funcprobe.attribution.token_tables import movers
from funcprobe.report.terminal import print_result, text_of
from tests.cases.terminals import pty
from tests.cases.written_attribution import NASTY, attribution, nasty, with_bars, words
from tests.cases.written_probe import warned


def row(text: str, begins: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(begins)]
    return found


def test_the_answer_comes_first_and_the_parts_of_the_step_next() -> None:
    found = attribution()
    lines = text_of(found, 400).splitlines()
    assert lines[0] == found.blocks()[0].text
    whole = found.first_order
    sizes = sorted(found.ledger.items(), key=lambda item: -abs(item[1]))
    said = ", ".join(f"{name} {100 * x / whole:.1f} %" for name, x in sizes)
    assert lines[1] == f"Of δF₁: {said}."
    for name, x in found.ledger.items():
        assert f"{x:+.6e}  ({100 * x / whole:.1f} %)" in row("\n".join(lines), f"  by {name} ")


def test_the_jacobian_form_has_a_row_for_the_rest() -> None:
    text = text_of(attribution(form="jacobian"))
    assert row(text, "  by rest ")
    assert "momentum" not in text


@pytest.mark.parametrize(("table", "label"), [("layers", "layer"), ("prompts", "prompt"), ("tokens", "text")])
def test_the_largest_movers_stand_there_with_their_shares(table: str, label: str) -> None:
    found = attribution(vocabulary=words())
    lines = text_of(found, 400).splitlines()
    columns = found.columns(table)
    both = movers(columns, 3)
    assert sum(len(rows["contribution"]) for rows in both) >= 3
    for rows in both:
        for x, what in zip(rows["contribution"], rows[label], strict=True):
            line = next(line for line in lines if f"{x:+.3e}  " in line and str(what).strip("\n") in line)
            assert f"{100 * x / found.first_order:.1f} %" in line


def test_errors_stand_beside_contributions_where_a_table_has_bars() -> None:
    text = text_of(with_bars(attribution(), 1.5e-7, "layers"))
    table = text[text.index("layers that moved it most") :].split("\n\n")[0].splitlines()[1:]
    assert len(table) > 2
    assert all("  1.5e-07  " in line for line in table)
    assert text.count("±") == 1
    assert "±" not in text_of(attribution())


def test_correlations_are_those_of_the_tables() -> None:
    found = attribution(tuple(range(3, 23)))
    text = text_of(found, 120)
    cells = row(text, "advantage ").split()[1:]
    for k, of in enumerate(("tokens", "sequences")):
        columns = found.columns(of)
        r = np.corrcoef(columns["contribution"], columns["advantage"])[0, 1]
        assert cells[2 * k] == f"{r:+.2f}"
        frame = found.correlations(of).set_index("with")
        assert cells[2 * k + 1] == f"{frame.loc['advantage', 'spearman']:+.2f}"
    assert len(row(text, "position, or length ").split()) == 7


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_asked_for(width: int) -> None:
    found = attribution(vocabulary=nasty(), words=len(NASTY), warnings=warned("word " * 60), notes=warned("note " * 40))
    text = text_of(found, width)
    from rich.cells import cell_len

    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "Warning: word word" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_text_of_tokens_does_nothing_to_a_terminal() -> None:
    found = attribution((9,) * 12, vocabulary=nasty(), words=len(NASTY))
    text = text_of(found, 400)
    assert not set(text) & {"\x1b", "\x00", "\u202e", "\u202c", "\u200f", "\r"}
    assert "‹U+001B›" in text or "‹U+202E›" in text or "‹U+200F›" in text


def test_a_pipe_gets_80_columns_and_a_terminal_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    buffer = io.StringIO()
    print_result(attribution(), buffer)
    assert buffer.getvalue() == text_of(attribution(), 80)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pty() as (terminal, read):
        print_result(attribution(), terminal)
        terminal.flush()
        assert "\x1b[1m" in read()


def test_a_step_of_nothing_is_said_so() -> None:
    found = attribution(change=0.0, first_order=0.0, before=1.5)
    assert "Its parts sum to nothing." in text_of(found)
