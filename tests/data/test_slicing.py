"""Cutting and joining: a slice is the batch one would have built from those rows, and every row appears once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.data.rollouts import Overlap, concatenate, microbatches, overlap, split, take, to_device
from funcprobe.errors import InputError
from funcprobe.types import Rollouts, TokenBudget
from tests.cases.rollout_lists import Lists, assert_same_rollouts, fixed, lists


@given(lists(), st.data())
def test_taking_rows_is_building_them(batch: Lists, data: Any) -> None:
    rows = len(batch.prompts)
    index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=2 * rows))
    expected = batch.rows(index).build()
    rollouts = batch.build()
    assert_same_rollouts(take(rollouts, index), expected)
    assert_same_rollouts(take(rollouts, torch.tensor(index)), expected)
    assert_same_rollouts(take(rollouts, [i - rows for i in index]), expected)
    assert_same_rollouts(rollouts, batch.build())


@given(lists(), st.data())
def test_slices_and_masks_take_the_same_rows(batch: Lists, data: Any) -> None:
    rows = len(batch.prompts)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    expected = batch.rows(list(range(start, stop))).build()
    chosen = [start <= row < stop for row in range(rows)]
    assert_same_rollouts(take(batch.build(), slice(start, stop)), expected)
    assert_same_rollouts(take(batch.build(), torch.tensor(chosen)), expected)


def test_token_weights_are_cut_like_the_other_token_fields() -> None:
    rollouts = fixed().build()
    rollouts = rollouts._replace(token_weights=torch.arange(9.0, dtype=torch.float64).reshape(3, 3))
    weights = take(rollouts, [0, 1]).token_weights
    assert weights is not None
    assert weights.tolist() == [[0.0, 1.0], [3.0, 4.0]]
    assert weights.is_contiguous()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "picks none of the 3 rows"),
        ([0, 3], "from 0 to 3; there are 3 rows"),
        ([-4], "from -4"),
        (slice(3, 9), "none"),
    ],
)
def test_no_row_to_take(index: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        take(fixed().build(), index)


@given(lists())
def test_concatenating_single_rows_gives_the_batch(batch: Lists) -> None:
    rollouts = batch.build()
    pieces = [take(rollouts, [row]) for row in range(len(batch.prompts))]
    assert_same_rollouts(concatenate(pieces), rollouts)


def test_concatenate_wants_the_same_fields() -> None:
    rollouts = fixed().build()
    with pytest.raises(InputError, match="'rewards' is missing in batch 1 and present in others"):
        concatenate([rollouts, rollouts._replace(rewards=None)])
    with pytest.raises(InputError, match="nothing to concatenate"):
        concatenate([])


@given(lists(max_rows=9), st.integers(1, 40), st.booleans())
def test_microbatches_cover_every_row_once(batch: Lists, size: int, by_tokens: bool) -> None:
    rollouts = batch.build()
    pieces = microbatches(rollouts, TokenBudget(size) if by_tokens else size)
    assert sorted(torch.cat(pieces).tolist()) == list(range(len(batch.prompts)))
    shapes = [take(rollouts, piece).ids.shape for piece in pieces]
    assert [n for _, n in shapes] == sorted(n for _, n in shapes)
    if not by_tokens:
        assert all(rows == size for rows, _ in shapes[:-1])
        assert shapes[-1][0] <= size
        return
    for number, (rows, longest) in enumerate(shapes):
        assert rows == 1 or rows * longest <= size
        if number + 1 < len(shapes):  # the next row did not fit
            follower = int(rollouts.attention_mask[pieces[number + 1][0]].sum())
            assert (rows + 1) * follower > size


def test_one_piece_keeps_the_order() -> None:
    assert [piece.tolist() for piece in microbatches(fixed().build(), None)] == [[0, 1, 2]]


def test_rows_of_equal_length_keep_their_order() -> None:
    batch = Lists([[1], [2], [3], [4]], [[1, 2], [1], [1, 2], [1]], {"temperature": 1.0})
    assert [piece.tolist() for piece in microbatches(batch.build(), 2)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("size", [0, -1, TokenBudget(0), 1.5, True])
def test_microbatch_sizes_start_at_1(size: Any) -> None:
    with pytest.raises(InputError, match=r"microbatch size is .*; expected a whole number of at least 1"):
        microbatches(fixed().build(), size)


def grouped(groups: list[int]) -> Rollouts:
    keywords = {"temperature": 1.0, "group_ids": groups, "rewards": [float(i) for i in range(len(groups))]}
    return Lists([[1]] * len(groups), [[2]] * len(groups), keywords).build()


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=12).filter(lambda groups: len(set(groups)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_split_shares_no_prompt(groups: list[int], fraction: float, seed: int) -> None:
    state = torch.get_rng_state()
    first, second = split(grouped(groups), fraction, torch.Generator().manual_seed(seed))
    again, _ = split(grouped(groups), fraction, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_rollouts(first, again)
    assert not set(first.group_ids.tolist()) & set(second.group_ids.tolist())
    kept = [part.rewards.tolist() for part in (first, second) if part.rewards is not None]
    assert sorted(kept[0] + kept[1]) == [float(i) for i in range(len(groups))]
    assert all(rows == sorted(rows) for rows in kept)
    count = len(set(groups))
    assert len(set(first.group_ids.tolist())) == min(max(round(fraction * count), 1), count - 1)


def test_split_draws_from_the_generator() -> None:
    drawn = {tuple(split(grouped([0, 1, 2, 3]), 0.5, torch.Generator().manual_seed(s))[0].group_ids) for s in range(20)}
    assert len({tuple(map(int, groups)) for groups in drawn}) > 1


@pytest.mark.parametrize(("groups", "fraction"), [([1, 1], 0.5), ([1, 2], 0.0), ([1, 2], 1.0)])
def test_split_that_cannot_be_made(groups: list[int], fraction: float) -> None:
    with pytest.raises(InputError, match=r"one prompt \(group\) only|between 0 and 1"):
        split(grouped(groups), fraction, torch.Generator())


@given(lists(), lists())
def test_overlap_counts_equal_tokens(evaluation: Lists, update: Lists) -> None:
    joined = [p + c for p, c in zip(update.prompts, update.completions, strict=True)]
    expected = Overlap(
        sequences=sum(p + c in joined for p, c in zip(evaluation.prompts, evaluation.completions, strict=True)),
        prompts=len({tuple(p) for p in evaluation.prompts if p in update.prompts}),
    )
    assert overlap(evaluation.build(), update.build()) == expected


def test_overlap_ignores_padding() -> None:
    wide = Lists([[1, 0], [1, 2, 3]], [[2], [4, 4, 4]], {"temperature": 1.0}).build()
    narrow = Lists([[1, 0]], [[2]], {"temperature": 1.0}).build()
    assert overlap(narrow, wide) == Overlap(sequences=1, prompts=1)
    assert overlap(wide, narrow) == Overlap(sequences=1, prompts=1)


def test_devices_change_nothing_else() -> None:
    moved = to_device(fixed().build(), "meta")
    assert {value.device.type for value in moved if value is not None} == {"meta"}
    assert_same_rollouts(to_device(fixed().build(), "cpu"), fixed().build())
