"""What an attribution says of itself: the ledger as shares of δF₁, the ways of tokens, and the largest movers."""

from __future__ import annotations

import dataclasses
import functools
import html
import re
from typing import Any

import pytest

import funcprobe as fp
from funcprobe.errors import Note
from funcprobe.results.attribution_words import SHOWN, ledger_rows, movers_table, share, ways_rows
from funcprobe.results.blocks import Remark, Table, as_text
from funcprobe.results.words import with_error
from tests.cases.attributions import Stepped
from tests.cases.tokenizers import tokenizer


@functools.cache
def found(optimizer: str = "adamw", spoken: bool = False) -> fp.Attribution:
    options: dict[str, Any] = {"tokenizer": tokenizer("words", True)} if spoken else {}
    return Stepped("gpt2", "grpo", optimizer).attribute(bars="jackknife", **options)


def number(row: str) -> float:
    """Return the first number of a row."""
    return float(re.findall(r"[-+−]?\d[\d.]*(?:e[-+]\d+)?", row)[0].replace("−", "-"))


def test_the_ledger_reads_as_shares_of_the_whole() -> None:
    rows = dict(ledger_rows(found()))
    reading = found().probe.readings[found().observable]
    assert rows["measured   ΔF"] == with_error(reading.change, reading.bars["change"])
    assert rows["predicted  δF₁"] == with_error(reading.first_order, reading.bars["first_order"])
    parts = {name.strip().removeprefix("by "): text for name, text in rows.items() if name.strip().startswith("by ")}
    assert list(parts) == ["gradient on U", "momentum", "weight decay"]
    shares = [float(re.findall(r"\((-?[\d.]+) %\)", text)[0]) for text in parts.values()]
    for text, percent, value in zip(parts.values(), shares, found().ledger.values(), strict=True):
        assert number(text) == pytest.approx(value, rel=1e-6)
        assert percent == pytest.approx(100 * value / found().first_order, abs=0.051)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert rows["parts − whole"] == f"{found().completeness_error:.1e} of Σ|parts|"
    assert (share(1.0, 0.0), share(0.5, 2.0), share(-1.0, 2.0)) == ("of nothing", "25.0 %", "-50.0 %")


def test_the_two_ways_of_tokens_sum_to_the_whole() -> None:
    rows = dict(ways_rows(found()))
    assert list(rows) == ["through the states visited", "through entropies there"]
    assert sum(number(text) for text in rows.values()) == pytest.approx(found().first_order, rel=1e-5)
    visited = found().evaluation.through["logp"].sum()
    assert number(rows["through the states visited"]) == pytest.approx(float(visited), rel=1e-6)
    reward = Stepped("gpt2").attribute(fp.expected_reward())
    assert list(dict(ways_rows(reward))) == ["through the states visited"]


def test_the_answer_comes_first_and_then_what_it_is_of() -> None:
    lines = as_text(found().blocks(), 1000).splitlines()
    assert lines[0] == as_text(found().probe.blocks(), 1000).splitlines()[0]
    assert lines[1].startswith("Of δF₁: ")
    assert lines[2] == "E: 10 sequences, 45 tokens, 5 prompts"
    assert lines[3] == "U: 12 sequences, 45 tokens, 3 prompts"
    assert lines[4] == "nats per token, additive form; shares are of δF₁"
    assert lines[6] == "rao_blackwell/per_decision/token, nats per token"


def test_the_tables_name_who_moved_most() -> None:
    frame = found().to_frame("tokens").sort_values("contribution")
    lowest, highest = frame.iloc[0], frame.iloc[-1]
    rows = movers_table(found(), "tokens").rows
    place = "at {0.position} of sequence {0.sequence}: “{0.text}”"
    assert (rows[0].cells[0], rows[0].cells[-1]) == (f"{lowest['contribution']:+.3e}", place.format(lowest))
    assert (rows[SHOWN].cells[0], rows[SHOWN].cells[-1]) == (f"{highest['contribution']:+.3e}", place.format(highest))
    assert len(rows) == 2 * SHOWN
    values = [float(row.cells[0]) for row in rows]
    assert values[:SHOWN] == sorted(values[:SHOWN])
    assert values[SHOWN:] == sorted(values[SHOWN:], reverse=True)


def test_prompts_stand_there_with_their_text() -> None:
    texts = found(spoken=True).to_frame("prompts")
    expected = {f"prompt {row.prompt}: {row.text}": f"{row.contribution:+.3e}" for row in texts.itertuples()}
    assert {row.cells[-1]: row.cells[0] for row in movers_table(found(spoken=True), "prompts").rows} == expected
    assert " the" in "".join(expected)


def test_fewer_rows_than_shown_are_each_shown_once() -> None:
    prompts = [row.cells[-1].split(":")[0] for row in movers_table(found(), "prompts").rows]
    assert sorted(prompts) == [f"prompt {p}" for p in sorted(found().columns("prompts")["prompt"])]
    assert len(prompts) < 2 * SHOWN


def test_warnings_are_said_last() -> None:
    outcome = dataclasses.replace(found().probe.outcome, warnings=(Note("test", "Beware."),))
    warned = dataclasses.replace(found(), probe=dataclasses.replace(found().probe, outcome=outcome))
    assert warned.summary().endswith("\nWarning: Beware.")
    assert "warning" not in [block.kind for block in found().blocks() if isinstance(block, Remark)]


def test_html_holds_the_same_rows_and_is_escaped() -> None:
    page = found()._repr_html_()
    for block in found().blocks():
        for row in block.rows if isinstance(block, Table) else ():
            assert all(html.escape(cell) in page for cell in row.cells)
    odd = Stepped("two lines").attribute({"a<b & c": fp.entropy(per="sequence")})
    assert "<b &" not in odd._repr_html_()
