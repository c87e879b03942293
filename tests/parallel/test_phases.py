"""An error of one process is the same error of all, at once; a process that is gone ends the others in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cases import shared_work
from tests.cases.processes import together

#: Seconds within which every process knows of the failure of another one.
SOON = 5.0


@pytest.mark.parametrize(
    ("work", "kind", "words"),
    [
        (shared_work.one_fails, "ParallelError", "Process 0 of 2, E, forward mode: RuntimeError (no such prompt here)"),
        (
            shared_work.one_meets_nan,
            "NumericsError",
            "Process 0 of 2: The model returned log-probabilities that are not finite for sequence 2 (in: E, forward",
        ),
    ],
    ids=["an error", "NaN"],
)
def test_a_failure_in_one_process_is_the_same_error_in_all(work: Callable[[], Any], kind: str, words: str) -> None:
    ended = together(work, 2)
    assert ended.codes == [0, 0], ended.words
    one, other = ended.returned
    assert one["said"] == other["said"]
    assert one["said"].startswith(words)
    assert one["kind"] == other["kind"] == kind
    assert max(one["seconds"], other["seconds"]) < SOON


def test_a_process_that_is_killed_ends_the_others_in_one_sentence() -> None:
    ended = together(shared_work.one_is_killed, 2)
    assert ended.codes[1] == 9
    assert ended.returned[0] == (
        "Another of the 2 processes has ended or did not answer in time, so process 0 ends too; see what that one says."
    )
