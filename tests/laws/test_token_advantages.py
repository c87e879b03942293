"""Advantages of tokens: a loss with them is the sum over positions of losses with the rows' advantages there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.attribution.predictors import predictions
from funcprobe.data.files import write_rollouts
from funcprobe.data.rollouts import concatenate, rollouts_from_lists, take, validate
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.objectives.by_name import objective
from funcprobe.objectives.losses import BASES, grpo
from funcprobe.types import Rollouts
from tests.cases.scored import Batch, batch, law, masks, seeds

# Sums of at most 30 terms below 100 in float64: 30 · 100 · 2^-53 < 1e-12.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def case_of(mask: list[list[bool]], seed: int) -> Batch:
    """Return a batch whose tokens have advantages of either sign, NaN where nobody looks."""
    made = batch(mask, seed)
    g = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randn(len(mask), len(mask[0]), generator=g, dtype=torch.float64)
    advantages = torch.where(made.rollouts.completion_mask, drawn, torch.nan)
    return made._replace(rollouts=made.rollouts._replace(advantages=advantages, rewards=None))


@pytest.mark.parametrize("options", [{}, {"beta": 0.3}], ids=["plain", "kl"])
@pytest.mark.parametrize("name", BASES)
@given(mask=masks(), seed=seeds)
@law
def test_a_loss_is_the_sum_over_positions(
    name: str, options: dict[str, Any], mask: list[list[bool]], seed: int
) -> None:
    loss, (rollouts, scores) = objective(name, **options), case_of(mask, seed)
    prepared = loss.prepare(rollouts)
    assert prepared.advantages is not None
    assert prepared.token_weights is not None

    def parts(logp: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for t in range(len(mask[0])):
            here = torch.nan_to_num(rollouts.advantages[:, t])
            only = torch.zeros_like(prepared.token_weights)
            only[:, t] = prepared.token_weights[:, t]
            total = total + loss(scores._replace(logp=logp), prepared._replace(advantages=here, token_weights=only))[0]
        return total

    gradient, value = torch.func.grad_and_value(lambda x: loss(scores._replace(logp=x), prepared)[0])(scores.logp)
    wanted_gradient, wanted = torch.func.grad_and_value(parts)(scores.logp)
    torch.testing.assert_close(value, wanted, **CLOSE)
    torch.testing.assert_close(gradient, wanted_gradient, **CLOSE)


@pytest.mark.parametrize("name", BASES)
@given(mask=masks(), seed=seeds)
@law
def test_one_value_a_row_is_the_advantage_of_the_row(name: str, mask: list[list[bool]], seed: int) -> None:
    loss, (rollouts, scores) = objective(name), batch(mask, seed)
    rows = loss.prepare(rollouts)
    spread = rows._replace(advantages=rows.advantages[:, None].expand(rollouts.completion_mask.shape))
    assert torch.equal(loss(scores, rows)[0], loss(scores, spread)[0])


def pair(width: int, advantages: Any) -> Rollouts:
    made = rollouts_from_lists([[1], [2, 3]], [[4] * width, [5]], temperature=1.0, group_ids=[0, 1])
    return made._replace(advantages=torch.tensor(advantages, dtype=torch.float64))


def test_they_are_cut_and_joined_like_other_fields_of_tokens() -> None:
    long, short = pair(3, [[1, 2, 3], [4, 0, 0]]), pair(1, [[5], [6]])
    assert take(long, [1]).advantages.tolist() == [[4.0]]
    assert concatenate([long, short]).advantages.tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0], [6, 0, 0]]
    rows = pair(2, [7, 8])
    assert concatenate([rows, short]).advantages.tolist() == [[7, 7], [8, 0], [5, 0], [6, 0]]
    assert concatenate([rows, rows]).advantages.tolist() == [7, 8, 7, 8]


def test_they_are_checked_where_a_token_is() -> None:
    nan = float("nan")
    assert validate(pair(3, [[1, 2, 3], [4, nan, nan]])) is not None
    with pytest.raises(InputError, match="Row 0: advantages is nan"):
        validate(pair(3, [[1, nan, 3], [4, 0, 0]]))
    with pytest.raises(InputError, match=r"'advantages' has shape \(2, 2\); expected \(2, 3\)"):
        validate(pair(3, [[1, 2], [4, 0]]))
    with pytest.raises(InputError, match="Row 0: advantages is nan"):
        grpo().prepare(pair(3, [[1, nan, 3], [4, 0, 0]]))
    with pytest.warns(FuncprobeWarning, match="All advantages are zero"):
        grpo().prepare(pair(3, [[0, 0, 0], [0, 9, 9]]))


def test_a_file_holds_one_a_row_and_says_so(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="the tokens of a row have advantages of their own"):
        write_rollouts(tmp_path / "batch.jsonl", pair(3, [[1, 2, 3], [4, 0, 0]]))


@given(seed=st.integers(0, 99))
@law
def test_predictors_read_them(seed: int) -> None:
    rollouts, scores = case_of([[True, True, False], [True, True, True]], seed)
    extra = {name: torch.full_like(scores.logp, 0.2) for name in ("sum_p2", "sum_p2_logp")}
    found = predictions(scores._replace(extra=extra), rollouts).tokens["discriminant"]
    for t in range(3):
        here = rollouts._replace(advantages=torch.nan_to_num(rollouts.advantages[:, t]))
        wanted = predictions(scores._replace(extra=extra), here).tokens["discriminant"]
        torch.testing.assert_close(found[:, t], wanted[:, t], **CLOSE)
