from __future__ import annotations

import io
import re
import sys

import pytest

from funcprobe.errors import MissingExtraError
from funcprobe.report.terminal import print_result, text_of
from funcprobe.results.probe import ProbeResult
from funcprobe.results.probe_words import headline_of
from funcprobe.types import Estimate
from tests.cases.terminals import pty
from tests.cases.written_probe import family, result, warned

NAME = "rao_blackwell/per_decision/token"


def changed(change: float, first_order: float) -> str:
    return headline(result(before=1.5, change=change, first_order=first_order))


def headline(found: ProbeResult) -> str:
    return headline_of(found.outcome, found.provenance, found.family)


@pytest.mark.parametrize(
    ("change", "first_order", "expected"),
    [
        (-0.015, -0.012, "lowers the entropy by 0.015 nats per token (1.00 %). First order predicts 80.0 % of it."),
        (0.03, 0.0309, "raises the entropy by 0.03 nats per token (2.00 %). First order predicts 103.0 % of it."),
        (0.03, -0.001, "First order predicts the other direction: -0.001."),
        (0.03, 0.030001, "First order predicts all of it."),
        (0.0, 0.0, "leaves the entropy at 1.5 nats per token. First order predicts +0."),
    ],
)
def test_the_first_sentence_is_the_answer(change: float, first_order: float, expected: str) -> None:
    assert expected in changed(change, first_order)
    assert changed(change, first_order).startswith("One step at lr 2e-06 ")


def test_an_observable_outside_the_family_goes_by_its_own_name() -> None:
    assert "lowers expected reward by" in headline(result(observable="expected reward"))


def test_every_estimator_stands_there_with_both_changes() -> None:
    text = text_of(result())
    for estimate in family().values():
        assert estimate.first_order is not None
        line = next(x for x in text.splitlines() if f"{estimate.change:+.4e}" in x)
        assert f"{estimate.first_order:+.4e}" in line
        assert f"{estimate.first_order / estimate.change:.4f}" in line
    assert [line for line in text.splitlines() if line.startswith("›")] == [
        next(x for x in text.splitlines() if "› Rao–Blackwell, per decision" in x)
    ]


def test_a_member_without_first_order_leaves_its_cells_empty() -> None:
    members = family()
    only = members[NAME]
    members = {n: e if n == NAME else Estimate(e.before, e.after, e.change, None) for n, e in members.items()}
    text = text_of(result(family=members, mode="reverse"))
    assert f"{only.first_order:+.4e}" in text
    other = next(line for line in text.splitlines() if "surprisal, sequence" in line)
    assert len(re.findall(r"e-\d\d", other)) == 1


def test_warnings_and_sizes_are_shown() -> None:
    text = text_of(result(warnings=warned("the first thing to know", "the second"), rounding=-1.5e-6))
    assert "Warning: the first thing to know" in text
    assert "Warning: the second" in text
    assert "E: 256 sequences, 5000 tokens, 32 prompts" in text
    assert "-1.500000e-06" in text
    assert "12,345 trainable parameters, 3.5 s" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_asked_for(width: int) -> None:
    text = text_of(result(warnings=warned("word " * 60)), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_piped_output_is_the_plain_text_even_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    found = io.StringIO()
    print_result(result(warnings=warned("careful")), found)
    assert found.getvalue() == text_of(result(warnings=warned("careful")), 80)
    assert "\x1b" not in found.getvalue()


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pty() as (terminal, read):
        print_result(result(warnings=warned("careful")), terminal)
        assert "\x1b[" in read()


def test_without_rich_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtraError, match=r"'rich'.*pip install 'funcprobe\[app\]'"):
        text_of(result())
