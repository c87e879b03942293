"""`Diagnosis`: answers by a word of their question; in other tests it is kept as every result is."""

from __future__ import annotations

import pytest

from funcprobe.errors import InputError
from tests.cases.written_diagnosis import diagnosis


def test_an_answer_goes_by_a_word_of_its_question() -> None:
    found = diagnosis()
    assert found.answer("STALE").question == "Is the batch stale, or from another policy?"
    assert [found.answer(answer.question) for answer in found.answers] == list(found.answers)
    with pytest.raises(InputError, match="No question has 'weather' in it; they are Does the entropy fall"):
        found.answer("weather")
