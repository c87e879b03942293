"""Gradient accumulation: the sum of the losses that every micro-batch has by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.errors import InputError
from funcprobe.objectives.accumulated import Accumulated
from funcprobe.objectives.losses import bnpo, dapo, grpo
from funcprobe.objectives.variants import top_entropy_quantile
from funcprobe.types import Objective, Rollouts, TokenScores
from tests.cases.scored import Batch, batch, law, masks, seeds
from tests.cases.tables import OBJECTIVES

# Sums of at most 30 terms below 100 in float64: 30 · 100 · 2^-53 < 1e-12.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

#: One of each way to divide by tokens or rows, a KL term, and modifiers that need entropies or pick tokens.
BASES = ("bnpo", "dapo", "cispo", "grpo, kl", "entropy_bonus", "top_entropy_quantile", "two modifiers")


def cut(rollouts: Rollouts, part: slice) -> Rollouts:
    return Rollouts(*(None if x is None else x[part] for x in rollouts))


def parts_of(rows: int, first: int) -> list[slice]:
    return [slice(0, first), slice(first, rows)]


@pytest.mark.parametrize("name", BASES)
@given(mask=masks(), seed=seeds, data=st.data())
@law
def test_the_loss_is_the_sum_of_the_micro_batches(
    name: str, mask: list[list[bool]], seed: int, data: st.DataObject
) -> None:
    base, (rollouts, scores) = OBJECTIVES[name], batch(mask, seed)
    rollouts = rollouts._replace(advantages=torch.randn(len(mask), dtype=torch.float64, generator=generator(seed)))
    first = data.draw(st.integers(1, len(mask) - 1))
    divisors = tuple(data.draw(st.floats(0.5, 9)) for _ in range(2)) if base.aggregation == "token_mean" else None
    accumulated = Accumulated(base, (first, len(mask) - first), divisors)

    def by_hand(logp: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k, part in enumerate(parts_of(len(mask), first)):
            alone = replace(base, normaliser=len(mask) if divisors is None else divisors[k])
            if bool(rollouts.completion_mask[part].any()):
                total = total + alone(TokenScores(logp[part], scores.entropy[part]), cut(rollouts, part))[0]
        return total

    gradient, value = torch.func.grad_and_value(lambda x: accumulated(scores._replace(logp=x), rollouts)[0])(
        scores.logp
    )
    wanted_gradient, wanted = torch.func.grad_and_value(by_hand)(scores.logp)
    torch.testing.assert_close(value, wanted, **CLOSE)
    torch.testing.assert_close(gradient, wanted_gradient, **CLOSE)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(mask=masks(), seed=seeds, divisor=st.floats(0.5, 9))
@law
def test_equal_divisors_are_a_normaliser(mask: list[list[bool]], seed: int, divisor: float) -> None:
    rollouts, scores = batch(mask, seed)
    rows = (1, len(mask) - 1)
    found = Accumulated(dapo(), rows, (divisor, divisor))(scores, rollouts)
    wanted = dapo(normaliser=divisor)(scores, rollouts)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_slice_of_a_prepared_batch_has_its_part_of_the_loss() -> None:
    made = batch([[True, True, False], [True, False, False], [True, True, True], [True, False, True]], 3)
    loss = Accumulated(bnpo(), (1, 3), (4.0, 14.0))
    assert isinstance(loss, Objective)
    prepared = loss.prepare(made.rollouts)
    whole = loss(made.scores, prepared)[0]
    sliced = [slice_loss(loss, made, prepared, slice(b, b + 1)) for b in range(4)]
    torch.testing.assert_close(sum(sliced), whole, **CLOSE)


def slice_loss(loss: Accumulated, made: Batch, prepared: Rollouts, part: slice) -> Any:
    return loss(TokenScores(made.scores.logp[part], made.scores.entropy[part]), cut(prepared, part))[0]


def test_what_is_reported_is_a_mean_over_all_tokens() -> None:
    made = batch([[True, True, False], [True, False, False], [True, True, True], [True, False, True]], 4)
    base = top_entropy_quantile("bnpo", top_entropy_quantile=0.999)
    _, found = Accumulated(base, (1, 3), (2.0, 2.0))(made.scores, made.rollouts)
    _, wanted = bnpo()(made.scores, made.rollouts)
    for name in ("ratio_mean", "clip_fraction", "approx_kl", "entropy"):
        torch.testing.assert_close(found[name], wanted[name], **CLOSE)
    assert "top_entropy_quantile_fraction" in found


def test_rows_and_divisors_fit() -> None:
    made = batch([[True], [True]])
    with pytest.raises(InputError, match="The batch has 2 rows and the micro-batches 3 in all"):
        Accumulated(grpo(), (1, 2)).prepare(made.rollouts)
    with pytest.raises(InputError, match=r"The micro-batches have \(2, 0\) rows"):
        Accumulated(grpo(), (2, 0))
    for wrong in ((1.0,), (1.0, 0.0)):
        with pytest.raises(InputError, match="expected 2 numbers above 0"):
            Accumulated(grpo(), (1, 1), wrong)
