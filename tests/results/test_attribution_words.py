"""What an attribution says of itself: the ledger as shares of δF₁, the ways of tokens, and the largest movers."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.results.attribution_words import SHOWN, html_of, ledger_rows, mover_rows, sections, share, ways_rows
from funcprobe.results.probe_words import with_error
from tests.cases.attributions import Stepped
from tests.cases.probes import U
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
    reading = found().result.readings[found().observable]
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


def test_the_summary_names_who_moved_most() -> None:
    text = found().summary()
    lines = text.splitlines()
    assert lines[0] == "rao_blackwell/per_decision/token, nats per token (additive form)"
    assert lines[1] == "E: 10 sequences, 45 tokens   U: 12 sequences, 45 tokens"
    for heading, rows in sections(found()):
        at = lines.index(heading)
        assert lines[at + 1 : at + 1 + len(rows)] == [f"  {value:+.3e}  {label}" for label, value in rows]
    frame = found().to_frame("tokens").sort_values("contribution")
    lowest, highest = frame.iloc[0], frame.iloc[-1]
    moved = dict(sections(found()))["tokens of U"]
    place = "{0!r} at {1.position} of sequence {1.sequence}"
    assert moved[0] == (place.format(lowest["text"], lowest), lowest["contribution"])
    assert moved[SHOWN] == (place.format(highest["text"], highest), highest["contribution"])
    assert len(moved) == 2 * SHOWN
    values = [value for _, value in moved]
    assert values[:SHOWN] == sorted(values[:SHOWN])
    assert values[SHOWN:] == sorted(values[SHOWN:], reverse=True)


def test_prompts_stand_there_with_their_text_where_there_are_several() -> None:
    prompts = dict(sections(found(spoken=True)))["prompts of U"]
    texts = found(spoken=True).to_frame("prompts")
    expected = {f"prompt {row.prompt}: {row.text}": row.contribution for row in texts.itertuples()}
    assert dict(prompts) == expected
    assert " the" in "".join(expected)
    one = U._replace(group_ids=torch.zeros(len(U.ids), dtype=torch.int64))
    assert [heading for heading, _ in sections(Stepped("gpt2").attribute(batch=one))] == ["layers", "tokens of U"]


def test_fewer_rows_than_shown_are_each_shown_once() -> None:
    layers = mover_rows(found().columns("layers"), "layer", 10)
    assert sorted(label for label, _ in layers) == sorted(found().columns("layers")["layer"])


def test_warnings_are_said_last() -> None:
    warned = dataclasses.replace(found(), result=dataclasses.replace(found().result, warnings=("Beware.",)))
    assert warned.summary().endswith("\n\nWarning: Beware.")
    assert "Warning" not in found().summary()


def test_html_holds_the_same_rows_and_is_escaped() -> None:
    page = found()._repr_html_()
    assert page == html_of(found())
    for name, value in [*ledger_rows(found()), *ways_rows(found())]:
        assert f"<td>{name}</td>" in page
        assert value in page
    named = {"a<b & c": fp.entropy()}
    odd = Stepped("two lines").attribute(observables=named)
    assert "a&lt;b &amp; c" in odd._repr_html_()
    assert "<b" not in odd._repr_html_()
