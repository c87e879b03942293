"""A diagnosis on a terminal: at most 40 lines of 80 columns, whatever was found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe.report.terminal import text_of
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_words import COLUMNS, LINES, ROOM
from funcprobe.results.findings import Answer
from tests.cases.written_diagnosis import diagnosis
from tests.cases.written_probe import warned

FOUND = diagnosis()
WORDS = st.text("abc 漢字-.\n\x1b", max_size=700)


def test_every_answer_stands_there_with_its_verdict_and_one_thing_to_try() -> None:
    lines = text_of(FOUND).splitlines()
    assert len(lines) <= LINES
    text = " ".join(lines)
    for answer in FOUND.answers:
        assert f"{answer.question} {answer.verdict.upper()}" in lines
        assert f"Try: {answer.advice}" in text
    assert text.count("Try:") == len(FOUND.answers) == len(ROOM)


def test_what_should_be_known_beside_it_is_counted_and_named() -> None:
    found = diagnosis(warnings=warned("one", "two", kind="overlap"), notes=warned("three"))
    assert text_of(found).splitlines()[-1] == "Warning: 2 of them and 1 notes (overlap); all stand on the page."
    calm = text_of(diagnosis(notes=warned("one", "two", kind="copy")))
    assert calm.splitlines()[-1] == "Note: 2 notes (copy); all stand on the page."
    assert "on the page" not in text_of(diagnosis())


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDS, min_size=8, max_size=8), st.lists(WORDS, min_size=8, max_size=8))
def test_it_has_forty_lines_of_eighty_columns_whatever_was_found(sentences: list[str], verdicts: list[str]) -> None:
    answers = tuple(
        Answer(own.question, verdict, sentence, own.advice)
        for own, verdict, sentence in zip(FOUND.answers, verdicts, sentences, strict=True)
    )
    found = Diagnosis(**{**vars(FOUND), "answers": answers, "warnings": warned(*"abcdefgh", kind="x" * 30)})
    lines = text_of(found).splitlines()
    assert len(lines) <= LINES
    assert all(len(line) <= COLUMNS for line in lines)


@pytest.mark.parametrize("word", ["word ", "漢字漢字 ", "a-long-word-of-names "])
def test_numbers_are_cut_to_the_room_of_their_answer_before_the_advice_is(word: str) -> None:
    long = Answer("Is it?", "yes", word * 300, "do that.")
    found = Diagnosis(**{**vars(FOUND), "answers": (long,) * len(ROOM)})
    lines = text_of(found).splitlines()
    starts = [k for k, line in enumerate(lines) if line == "Is it? YES"]
    heights = [end - start - 1 for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    assert heights == list(ROOM)
    assert " ".join(lines).count("… Try: do that.") == len(ROOM)
