"""How a batch was drawn, against numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

import funcprobe as fp
from funcprobe.measurement.drawn import drawn_of, ratios_of
from funcprobe.types import Rollouts, TokenScores

PLAIN = fp.rollouts_from_lists(
    [[1], [1], [2]],
    [[3, 4], [5, 6, 7], [8]],
    temperature=[1.0, 1.0, 0.8],
    completion_masks=[[True, True], [True, False, True], [True]],
)


def scores(rollouts: Rollouts, value: float = -1.0) -> TokenScores:
    logp = value * rollouts.completion_mask.double()
    return TokenScores(logp, torch.zeros_like(logp))


def test_columns_tell_temperatures_steps_sampler_and_holes() -> None:
    found = drawn_of(PLAIN, None)
    assert found == ((0.8, 1.0), None, False, None, 5, 1)
    more = PLAIN._replace(step=torch.tensor([4, 2, 9]), top_k=torch.tensor([0, 0, 5]))
    assert drawn_of(more, None)[1:3] == ((2, 9), True)
    assert drawn_of(PLAIN._replace(top_p=torch.tensor([1.0, 1.0, 1.0]).double()), None).truncated is False


def test_a_gap_is_that_to_the_sampler() -> None:
    reported = torch.where(PLAIN.completion_mask, -1.25, 0.0).double()
    assert drawn_of(PLAIN._replace(sampling_logps=reported), scores(PLAIN)).gap == pytest.approx(0.25)
    assert drawn_of(PLAIN, scores(PLAIN)).gap is None


def test_ratios_are_those_of_tokens_and_their_effective_sample_that_of_rows() -> None:
    assert ratios_of(PLAIN, scores(PLAIN)) is None
    same = ratios_of(PLAIN._replace(old_logps=scores(PLAIN).logp), scores(PLAIN))
    assert same == (0.0, 1.0, pytest.approx(1.0))
    old = scores(PLAIN).logp.clone()
    old[0, 0] -= math.log(2)  # row 0 has ratio 2, the others 1
    old[1, 1] = 50.0  # in a hole, which is not looked at
    found = ratios_of(PLAIN._replace(old_logps=old), scores(PLAIN))
    assert found is not None
    assert found.mean == pytest.approx(math.log(2) / 5)
    assert found.largest == pytest.approx(2.0)
    assert found.ess == pytest.approx((4**2 / (4 + 1 + 1)) / 3)
