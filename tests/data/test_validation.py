"""Every way in which a batch can be unusable, with its message and its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from funcprobe.data.rollouts import rollouts_from_lists, validate
from funcprobe.errors import InputError
from funcprobe.types import Rollouts
from tests.cases.rollout_lists import VOCABULARY, assert_same_rollouts, fixed

NAN, INF = math.nan, math.inf

BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompts": [[1, 2], [1, -2], [3]]}, "Row 1: token id -2 at position 1 is negative"),
    ({"completions": [[4, 0], [5], [1, 2, 0]]}, "Row 1: token id 5 at position 2 is outside the vocabulary of 5"),
    ({"prompts": [[1, 2], [], [3]]}, "Row 1: .*reaches over the prompt; every row needs at least one prompt token"),
    ({"completion_masks": [[0, 0], [0], [0, 0, 0]]}, "Row 0 has no completion token: its completion mask is empty"),
    ({"completions": [[], [], []], "completion_masks": None, "sampling_logps": None}, "Row 0 has no completion token"),
    ({"temperature": [1.0, 0.0, 1.0]}, "Row 1: temperature is 0.0; give the temperature"),
    ({"temperature": -1.0}, "Row 0: temperature is -1.0"),
    ({"temperature": [1.0, 1.0, NAN]}, "Row 2: temperature is nan"),
    ({"temperature": [1.0, None, 1.0]}, "Row 1: temperature is nan"),
    ({"temperature": INF}, "Row 0: temperature is inf"),
    ({"rewards": [0.0, NAN, 1.0]}, "Row 1: rewards is nan; every row needs a finite number"),
    ({"rewards": [0.0, 1.0, INF]}, "Row 2: rewards is inf"),
    ({"advantages": [NAN, 0.0, 1.0]}, "Row 0: advantages is nan"),
    ({"advantages": [0.0, -INF, 1.0]}, "Row 1: advantages is -inf"),
    ({"weight": [1.0, -1.0, 1.0]}, "Row 1: weight is -1.0; weights are finite and not negative"),
    ({"weight": [1.0, 1.0, NAN]}, "Row 2: weight is nan"),
    ({"weight": 0.0}, "All 3 weights are 0; at least one row must count"),
    ({"top_p": 0.0}, "Row 0: top_p is 0.0; expected 0 < top_p <= 1"),
    ({"top_p": [1.0, 1.5, 1.0]}, "Row 1: top_p is 1.5"),
    ({"top_p": NAN}, "Row 0: top_p is nan"),
    ({"top_k": [0, 0, -5]}, "Row 2: top_k is -5; expected top_k >= 0"),
    ({"old_logps": [[-1, -1], [0.5], [-1, -1, -1]]}, "Row 1: old_logps is 0.5 at completion position 0; .*at most 0"),
    ({"ref_logps": [[-1, -1], [-1], [-1, -1, NAN]]}, "Row 2: ref_logps is nan at completion position 2"),
    ({"sampling_logps": [[-1, -INF], [-1], [-1, -1, -1]]}, "Row 0: sampling_logps is -inf at completion position 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_values_name_their_row(change: dict[str, Any], message: str) -> None:
    batch = fixed()
    arguments = {"prompts": batch.prompts, "completions": batch.completions} | batch.keywords | change
    with pytest.raises(InputError, match=message):
        rollouts_from_lists(**arguments, vocab_size=VOCABULARY)


SPOILED: list[tuple[Callable[[Rollouts], Rollouts], str]] = [
    (lambda r: r._replace(ids=r.ids[:0]), r"The batch is empty: ids have shape \(0, 4\)"),
    (lambda r: r._replace(ids=r.ids[0]), r"ids have shape \(4,\); expected \[B, L\]"),
    (lambda r: r._replace(rewards=r.temperature[:2]), r"'rewards' has shape \(2,\); expected \(3,\) for 3 rows"),
    (lambda r: r._replace(attention_mask=r.attention_mask[:, :2]), r"'attention_mask' has shape \(3, 2\)"),
    (lambda r: r._replace(old_logps=torch.zeros(3, 2).double()), r"'old_logps' has shape \(3, 2\); expected \(3, 3\)"),
    (lambda r: r._replace(weight=r.weight.float()), "'weight' has dtype torch.float32; expected torch.float64"),
    (lambda r: r._replace(ids=r.ids.int()), "'ids' has dtype torch.int32; expected torch.int64"),
    (lambda r: r._replace(completion_mask=r.completion_mask.long()), "dtype torch.int64; expected torch.bool"),
    (lambda r: r._replace(attention_mask=r.attention_mask.flip(1)), "Row 1 is not right-padded.*rollouts_from_padded"),
    (
        lambda r: r._replace(completion_mask=torch.ones_like(r.completion_mask)),
        "Row 0: the completion mask marks 1 positions past the last real token, and the completion has 2 tokens",
    ),
    (lambda r: r._replace(prompt_lengths=r.prompt_lengths + 3), "Row 0: the completion mask marks 2 .* has 0 tokens"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_rollouts_put_together_by_hand(spoil: Callable[[Rollouts], Rollouts], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(spoil(fixed().build()))


def test_valid_rollouts_come_back_as_they_are() -> None:
    rollouts = fixed().build()
    assert validate(rollouts, VOCABULARY) is rollouts
    assert_same_rollouts(rollouts, fixed().build())


def test_padding_and_holes_are_never_looked_at() -> None:
    rollouts = fixed().build()
    ids = rollouts.ids.masked_fill(~rollouts.attention_mask, -100)
    logps = rollouts.completion_mask.double().where(~rollouts.completion_mask, torch.tensor(-1.0).double())
    logps = logps.masked_fill(~rollouts.completion_mask, NAN)
    assert validate(rollouts._replace(ids=ids, old_logps=logps), VOCABULARY).ids is ids


def test_a_log_probability_may_exceed_0_by_rounding() -> None:
    logps = [[1e-5, -0.2], [-0.3], [-0.4, -0.5, -0.6]]
    batch = fixed()
    keywords = batch.keywords | {"sampling_logps": logps}
    assert rollouts_from_lists(batch.prompts, batch.completions, **keywords).sampling_logps is not None
