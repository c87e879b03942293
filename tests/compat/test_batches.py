"""Dictionaries of `[B, G, T]` tensors as rollouts, and what cannot be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.compat.batches import for_the_loss, prompts_in, rows_of_prompts, to_rollouts
from funcprobe.errors import InputError
from tests.cases import stateful as cases


def test_rows_are_those_of_the_lists() -> None:
    packed = cases.packed(4, 3, 2)
    found, plain = to_rollouts(packed.batch, 0.7), cases.rollouts_of(packed)
    for field in ("ids", "attention_mask", "prompt_lengths", "completion_mask"):
        assert torch.equal(getattr(found, field), getattr(plain, field)), field
    assert found.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert set(found.temperature.tolist()) == {0.7}
    assert set(to_rollouts({**packed.batch, "temperature": 0.5}, 0.7).temperature.tolist()) == {0.5}
    assert torch.equal(found.advantages, packed.batch["advantages"].flatten())
    assert to_rollouts(plain) is plain


def test_an_end_token_inside_a_prompt_is_no_padding() -> None:
    ids = torch.tensor([[[0, 5, 0, 6, 3, 0, 0]]])
    batch = {"sequences": ids, "attention_masks": ids != 0, "prompt_lens": [4]}
    assert to_rollouts(batch, eos=[0]).ids.tolist() == [[5, 0, 6, 3, 0]]
    cut = {"sequences": ids[..., :5], "attention_masks": ids[..., :5] != 0, "prompt_lens": torch.tensor([4])}
    assert to_rollouts(cut, eos=[0]).ids.tolist() == [[5, 0, 6, 3]]  # cut at the limit: no end token came


def test_weights_of_the_loss() -> None:
    batch = cases.update(max_lengths=[3, 5, 7, 11])
    found = for_the_loss(batch, to_rollouts(batch))
    expected = [1 / (4 * 3 * length) for length in (3, 5, 7, 11) for _ in range(3)]
    assert found.weight.tolist() == pytest.approx(expected, rel=1e-15)
    own = {k: v for k, v in batch.items() if k != "max_lengths"}
    lengths = to_rollouts(own).completion_mask.sum(1).reshape(4, 3).amax(1)
    assert for_the_loss(own, to_rollouts(own)).weight.tolist() == pytest.approx(
        (1 / (12 * lengths)).double().repeat_interleave(3).tolist(), rel=1e-7
    )
    plain = fp.rollouts_from_lists([[1], [2], [2]], [[3], [4, 4], [5]], temperature=1.0)
    assert for_the_loss(plain, plain).weight.tolist() == [1 / 2, 1 / (2 * 2 * 2), 1 / (2 * 2 * 2)]
    assert (prompts_in(plain), prompts_in(batch), prompts_in(None)) == (2, 4, 0)
    assert rows_of_prompts(2, found) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sequences": None}, "no 'sequences'"),
        ({"sequences": torch.ones(4, 3)}, r"expected \[B, G, T\]"),
        ({"num_prompts": 5}, "num_prompts is 5"),
        ({"prompt_lens": [3]}, "'prompt_lens' has 1 values; expected 4"),
        ({"prompt_lens": [0] * 4}, "prompt_lens are"),
        ({"advantages": torch.zeros(4)}, "'advantages' has shape"),
        ({"gen_lens": [[1, 1, 1]] * 4}, "gen_lens of prompt 0, completion 0 is 1"),
        ({"gen_lens": [[99] * 3] * 4}, "is 99, and the attention mask counts"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        to_rollouts(cases.update(**changes))


def test_holes_are_refused() -> None:
    batch = cases.update()
    width = batch["prompt_lens"][0]
    mask = batch["attention_masks"].clone()
    mask[0, 0, width] = 0
    with pytest.raises(InputError, match=f"prompt 0, completion 0 has a hole at column {width}"):
        to_rollouts({**batch, "attention_masks": mask}, eos=[cases.END])
    with pytest.raises(InputError, match="max_lengths are"):
        for_the_loss({**batch, "max_lengths": [0] * 4}, to_rollouts(batch))
