"""Building batches: the layout of the contract, and the law that only masks decide what is a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.data.rollouts import rollouts_from_lists, rollouts_from_padded
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.types import Rollouts
from tests.cases.rollout_lists import END, LOGPS, Lists, assert_same_rollouts, fixed, lists


@given(lists())
def test_layout_is_the_one_of_the_contract(batch: Lists) -> None:
    rollouts = batch.build()
    assert rollouts.ids.shape[1] == max(len(p) + len(c) for p, c in zip(batch.prompts, batch.completions, strict=True))
    assert rollouts.completion_mask.shape[1] == max(map(len, batch.completions))
    for b, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        total = len(prompt) + len(completion)
        mask = batch.keywords.get("completion_masks", [[1] * len(c) for c in batch.completions])[b]
        assert rollouts.ids[b].tolist() == [*prompt, *completion] + [0] * (rollouts.ids.shape[1] - total)
        assert rollouts.attention_mask[b].tolist() == [c < total for c in range(rollouts.ids.shape[1])]
        assert int(rollouts.prompt_lengths[b]) == len(prompt)
        width = rollouts.completion_mask.shape[1]
        assert rollouts.completion_mask[b].tolist() == [t < len(mask) and mask[t] == 1 for t in range(width)]
        for name in [name for name in LOGPS if name in batch.keywords]:
            row = batch.keywords[name][b]
            expected = [row[t] if t < len(mask) and mask[t] else 0.0 for t in range(width)]
            assert getattr(rollouts, name)[b].tolist() == expected


def padded(batch: Lists, draw: Any, aligned_with_ids: bool) -> tuple[list[Any], dict[str, Any]]:
    """Insert padding (any token, the end token above all) at any place of every row, and say so in the masks only."""
    pairs = list(zip(batch.prompts, batch.completions, strict=True))
    width = max(len(p) + len(c) for p, c in pairs) + draw(st.integers(0, 3))
    ids, attention, chosen = [], [], []
    logps: dict[str, list[list[float]]] = {name: [] for name in LOGPS if name in batch.keywords}
    for b, (prompt, completion) in enumerate(pairs):
        real = sorted(draw(st.permutations(range(width)))[: len(prompt) + len(completion)])
        mask = batch.keywords.get("completion_masks", [[1] * len(c) for c in batch.completions])[b]
        ids.append(_scatter(width, real, [*prompt, *completion], draw(st.sampled_from([END, 3, -100]))))
        attention.append(_scatter(width, real, [1] * len(real), 0))
        chosen.append(_scatter(width, real, [0] * len(prompt) + mask, 0))
        for name, rows in logps.items():
            values = batch.keywords[name][b]
            longest = max(map(len, batch.completions))
            aligned = _scatter(width, real, [float("nan")] * len(prompt) + values, float("nan"))
            rows.append(aligned if aligned_with_ids else values + [float("nan")] * (longest - len(values)))
    keywords = {k: v for k, v in batch.keywords.items() if k != "completion_masks"} | logps
    return [ids, attention, chosen], keywords | {"prompt_lengths": [len(p) for p in batch.prompts]}


def _scatter(width: int, places: list[int], values: list[Any], fill: Any) -> list[Any]:
    row = [fill] * width
    for place, value in zip(places, values, strict=True):
        row[place] = value
    return row


@given(lists(), st.data(), st.booleans(), st.sampled_from([list, np.array, torch.tensor]))
def test_padding_never_loses_or_adds_a_token(batch: Lists, data: Any, aligned_with_ids: bool, kind: Any) -> None:
    arrays, keywords = padded(batch, data.draw, aligned_with_ids)
    assert_same_rollouts(rollouts_from_padded(*(kind(array) for array in arrays), **keywords), batch.build())


@given(lists(), st.data())
def test_the_completion_starts_at_the_first_chosen_token(batch: Lists, data: Any) -> None:
    arrays, keywords = padded(batch, data.draw, aligned_with_ids=True)
    starts = rollouts_from_padded(*arrays, **(keywords | {"prompt_lengths": None})).prompt_lengths.tolist()
    holes = [mask.index(1) for mask in batch.keywords.get("completion_masks", [[1]] * len(batch.prompts))]
    assert starts == [len(prompt) + hole for prompt, hole in zip(batch.prompts, holes, strict=True)]


def test_left_padded_prompts_beside_right_padded_completions() -> None:
    # The layout of a TRL batch with pad = eos: [pad prompt | completion eos pad].
    rollouts = rollouts_from_padded(
        [[0, 5, 6, 7, 0, 0], [1, 2, 3, 0, 4, 0]],
        [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
        [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
        temperature=1.0,
        old_logps=torch.tensor([[-1.0, -2.0, 9.0], [-3.0, -4.0, -5.0]], dtype=torch.bfloat16),
    )
    assert rollouts.ids.tolist() == [[5, 6, 7, 0, 0, 0], [1, 2, 3, 0, 4, 0]]
    assert rollouts.prompt_lengths.tolist() == [2, 3]
    assert rollouts.completion_mask.tolist() == [[True, True, False], [True, True, True]]
    assert rollouts.old_logps is not None
    assert rollouts.old_logps.tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]


def test_groups_default_to_equal_prompts_in_order_of_appearance() -> None:
    rollouts = rollouts_from_lists([[7], [1, 2], [7], [7, 7], [1, 2]], [[1]] * 5, temperature=1)
    assert rollouts.group_ids.tolist() == [0, 1, 0, 2, 1]


def test_defaults_and_scalars() -> None:
    rollouts = rollouts_from_lists([[1], [2]], [[1], [2]], temperature=0.5, step=3)
    assert rollouts.weight.tolist() == [1.0, 1.0]
    assert rollouts.temperature.tolist() == [0.5, 0.5]
    assert rollouts.step is not None
    assert rollouts.step.tolist() == [3, 3]
    assert rollouts.rewards is None


@given(lists())
def test_building_reads_its_arguments_only(batch: Lists) -> None:
    prompts = [np.array(row) for row in batch.prompts]
    rewards = np.zeros(len(prompts))
    rollouts = rollouts_from_lists(prompts, batch.completions, temperature=1.0, rewards=rewards)
    for tensor in (rollouts.ids, rollouts.rewards):
        assert tensor is not None
        tensor.add_(1)
    assert [row.tolist() for row in prompts] == batch.prompts
    assert not rewards.any()


@pytest.mark.parametrize(
    ("change", "count"), [({"top_p": [1.0, 0.9, 1.0]}, 1), ({"top_k": 50}, 3), ({"top_p": 0.9, "top_k": [0, 5, 0]}, 3)]
)
def test_truncated_sampling_warns_once(change: dict[str, Any], count: int) -> None:
    batch = fixed()
    with pytest.warns(FuncprobeWarning, match=rf"{count} of 3 rows .* top_p < 1 or top_k > 0.* mismatch") as caught:
        rollouts_from_lists(batch.prompts, batch.completions, **(batch.keywords | change))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_unrestricted_top_k_is_0_however_it_was_written() -> None:
    rollouts = rollouts_from_lists([[1]], [[2]], temperature=1.0, top_k=-1, top_p=1.0)
    assert rollouts.top_k is not None
    assert rollouts.top_k.tolist() == [0]


BAD_LISTS: list[tuple[dict[str, Any], str]] = [
    ({"prompts": [], "completions": []}, "batch is empty"),
    ({"prompts": [[1]]}, "1 prompts and 3 completions"),
    ({"prompts": "text"}, "'prompts' is str; expected a list"),
    ({"prompts": [[1.5], [1], [1]]}, "'prompts, row 0' holds float64 values; expected integers"),
    ({"prompts": [["a"], [1], [1]]}, "'prompts, row 0' holds <U1 values; expected numbers"),
    ({"prompts": [[1], [None], [1]]}, "'prompts, row 1' holds float64 values; expected integers"),
    ({"prompts": [[1], [[1]], [1]]}, "'prompts, row 1' has 2 dimensions"),
    ({"prompts": [[1], [[1], [2, 3]], [1]]}, "'prompts, row 1' does not form an array"),
    ({"prompts": [[1], [{}], [1]]}, "'prompts, row 1' holds entries that are no numbers"),
    ({"completion_masks": [[1, 1], [1], [1, 1]]}, "Row 2: the completion mask has 2 entries for 3 completion tokens"),
    ({"completion_masks": [[0, 0, 1, 1], [1], [1, 1, 1]]}, "Row 0: .*has 4 .* seems to cover the prompt"),
    ({"completion_masks": [[1, 2], [1], [1, 1, 1]]}, "row 0' holds values other than 0 and 1"),
    ({"completion_masks": [[1, 1]]}, "There are 1 completion masks for 3 completions"),
    ({"old_logps": [[-1.0], [-1.0], [-1.0]]}, "Row 0: old_logps has 1 values for 2 completion tokens"),
    ({"old_logps": [[-1.0, -1.0]]}, "'old_logps' has 1 rows; expected 3"),
    ({"rewards": [1.0, 2.0]}, r"'rewards' has shape \(2,\); expected one number, or 3"),
    ({"rewards": [[1.0], [2.0, 3.0], [1.0]]}, "'rewards' does not form an array"),
    ({"rewards": ["1", True, 2]}, "'rewards' holds .*expected numbers"),
    ({"rewards": [1, True, None]}, "'rewards' holds entries that are no numbers"),
    ({"group_ids": [0.5, 1, 1]}, "'group_ids' holds float64 values; expected integers"),
    ({"temperature": None}, "temperature is missing; give the one that the rows were sampled at"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LISTS)
def test_lists_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    batch = fixed()
    arguments = {"prompts": batch.prompts, "completions": batch.completions} | batch.keywords | change
    with pytest.raises(InputError, match=message):
        rollouts_from_lists(**arguments)


BAD_PADDED: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": [[1, 1, 1]]}, r"'attention_mask' has shape \(1, 3\), ids \(2, 4\)"),
    ({"ids": [1, 2, 3, 4]}, r"ids \(4,\); expected \[B, L\]"),
    ({"ids": [[1, 2, 3, 4], [1, 2]]}, "'ids' does not form an array"),
    ({"completion_mask": [[0, 0, 1, 1], [0, 0, 1, 1]]}, "Row 1: the completion mask is 1 on a padded column"),
    ({"completion_mask": [[0, 0, 1, 1], [1, 1, 1, 0]]}, "Row 1: .*completion mask reaches over the prompt"),
    ({"completion_mask": [[0, 0, 0, 0], [0, 0, 0, 0]]}, "Row 0 has no completion token"),
    ({"prompt_lengths": [2, 3]}, "Row 1: prompt_lengths is 3, but the completion mask starts after 2 real tokens"),
    ({"prompt_lengths": 0}, "Row 0: prompt_lengths is 0"),
    ({"old_logps": [[-1.0], [-1.0]]}, r"'old_logps' has shape \(2, 1\); expected \[2, 4\] aligned with ids, or"),
    ({"old_logps": [[-1.0] * 5] * 2}, r"'old_logps' has shape \(2, 5\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_PADDED)
def test_padded_arrays_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "ids": [[1, 2, 3, 4], [1, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 0, 1, 0]],
        "temperature": 1.0,
    }
    assert isinstance(rollouts_from_padded(**arguments), Rollouts)
    with pytest.raises(InputError, match=message):
        rollouts_from_padded(**(arguments | change))
