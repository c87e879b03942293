"""Two and three processes give the numbers of one, with uneven shares and with none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.parallel.world import ALONE, World, world
from tests.cases import shared_work
from tests.cases.numbers import near, numbers
from tests.cases.processes import together

#: The same sums in another order: of some thousand float64 terms, rounded to 2^-53 of Σ|terms| each, of which F keeps a
#: hundredth or more.
SAME = 1e-10


@pytest.fixture(scope="module")
def of_one() -> dict[str, float]:
    assert world() == ALONE
    return dict(numbers(shared_work.every_verb()))


@pytest.mark.parametrize("size", [2, 3])
def test_every_verb_gives_the_numbers_of_one_process(of_one: dict[str, float], size: int) -> None:
    ended = together(shared_work.every_verb, size)
    assert ended.codes == [0] * size, ended.words
    for found in ended.returned:
        several = dict(numbers(found))
        assert several.keys() == of_one.keys()
        for place, expected in of_one.items():
            if "bits" not in place:
                assert several[place] == near(place, expected, SAME), place
    # all processes have made the same step, and read the same numbers, to the last bit
    assert all(repr(dict(numbers(each))) == repr(dict(numbers(ended.returned[0]))) for each in ended.returned)


def test_a_journal_of_three_processes_goes_on_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "kept.jsonl"
    ended = together(shared_work.journaled, 3, FUNCPROBE_TEST_JOURNAL=str(journal))
    assert ended.codes == [0, 0, 0], ended.words
    monkeypatch.setenv("FUNCPROBE_TEST_JOURNAL", str(journal))
    again = shared_work.journaled()
    assert repr(again["points"]) == repr(ended.returned[0]["points"])
    assert again["rows"] < sum(found["rows"] for found in ended.returned) / 2  # U, and first order on E


@pytest.mark.filterwarnings("ignore:Tokens of E are sent to other experts")
def test_tokens_that_change_experts_are_counted_over_all_processes() -> None:
    ended = together(shared_work.experts, 2)
    assert ended.codes == [0, 0], ended.words
    alone = shared_work.experts()
    assert alone["routing"][0] > 0
    for found in ended.returned:
        assert found["routing"] == alone["routing"]
        assert found["change"] == pytest.approx(alone["change"], rel=SAME)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_shares_are_a_partition_that_differs_by_one_row_at_most(lengths: list[int], size: int) -> None:
    batch = rollouts_from_lists([[1]] * len(lengths), [[2] * n for n in lengths], temperature=1.0)
    shares = World(0, size).shares(batch)
    assert sorted(torch.cat(shares).tolist()) == list(range(len(lengths)))
    counts = [len(rows) for rows in shares]
    assert max(counts) - min(counts) <= 1
    assert counts[0] == max(counts)  # the first one never has none
