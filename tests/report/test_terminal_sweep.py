from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from funcprobe.errors import MissingExtraError
from funcprobe.report.terminal import print_result, text_of
from funcprobe.results.sweep_numbers import table_of
from funcprobe.results.sweep_words import headline_of
from tests.cases.terminals import pty
from tests.cases.written_probe import warned
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, LRS, REWARD, sweep


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith("1e-")]


def test_the_sentence_comes_first_and_every_learning_rate_has_a_row() -> None:
    found = sweep()
    text = text_of(found, 400)
    assert text.splitlines()[0] == headline_of(found)
    assert [row[0] for row in rows(text)] == ["1e-9", "1e-8", "1e-7", "1e-6", "1e-5", "1e-4", "1e-3"]
    change = found.points[5].readings["entropy"]
    error = change.bars["change"].error
    expected = f"1e-4 {change.change:+.4e} ± {error:.1e} -2.2600e-03 {-2.26e-3 / change.change:.4f} difference 500.0"
    assert " ".join(rows(text)[5]) == expected
    assert " ".join(rows(text)[0][-3:]) == "path (2) 500.0"


def test_every_observable_has_a_sentence_and_a_table() -> None:
    found = sweep({"entropy": ENTROPY, "reward": REWARD, "kl": DIVERGENCE})
    text = text_of(found, 400)
    for name in found.observables:
        assert text.count(headline_of(found, name)) == 1
    assert len(rows(text)) == 3 * len(LRS)
    assert text.count("δF₂/ΔF") == 1  # of the divergence
    assert "entropy, nats per token\n" in text
    assert "\nreward\n" in text


def test_sizes_notes_and_warnings_are_shown() -> None:
    text = text_of(sweep(warnings=warned("the first thing to know", "the second"), notes=warned("what was decided")))
    assert "Warning: the first thing to know.\nWarning: the second.\n" in text
    assert "Note: what was decided.\n" in text
    assert "E: 512 sequences, 3136 tokens, 40 prompts\nU: 128 sequences, 757 tokens, 16 prompts\n" in text
    assert "First order in forward mode, float32 on cpu, 12,345 trainable parameters, 3.5 s" in text
    assert "± is one standard error over 40 prompts." in text


@pytest.mark.parametrize("width", [66, 80, 120])
@pytest.mark.parametrize(
    "found",
    [
        sweep({"entropy": ENTROPY, "kl": DIVERGENCE}, warnings=warned("word " * 60), notes=warned("word " * 60)),
        sweep(lrs=(3.16e-9, 1e-5, 1.23e-2), caveats=dict.fromkeys((3.16e-9, 1e-5, 1.23e-2), ("few",))),
        sweep(mode="reverse"),
    ],
)
def test_no_line_is_wider_than_asked_for_and_no_number_is_cut(found: Any, width: int) -> None:
    text = text_of(found, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert "…" not in text


def test_at_80_columns_a_row_is_a_line() -> None:
    lrs = (3.16e-9, 1e-5, 1.23e-2)
    for found in (sweep(), sweep(lrs=lrs, caveats=dict.fromkeys(lrs, ("few",)))):
        lines = [line.split() for line in text_of(found).splitlines()]
        for row in table_of(found)[1]:
            assert " ".join(row).split() in lines


def test_piped_output_is_the_plain_text_even_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    found = io.StringIO()
    print_result(sweep(warnings=warned("careful")), found)
    assert found.getvalue() == text_of(sweep(warnings=warned("careful")), 80)
    assert "\x1b" not in found.getvalue()


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pty() as (terminal, read):
        print_result(sweep(warnings=warned("careful")), terminal)
        assert "\x1b[" in read()


def test_without_rich_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtraError, match=r"'rich'.*pip install 'funcprobe\[app\]'"):
        text_of(sweep())
