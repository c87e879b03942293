from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.errors import InputError
from funcprobe.objectives.advantages import advantages
from tests.cases.scored import batch, law
from tests.oracles import losses

NUMBERS = st.floats(-10, 10).map(lambda x: round(x, 3))


def rollouts_of(rewards: list[float], groups: list[int]):
    made = batch([[True]] * len(rewards), rewards=torch.tensor(rewards, dtype=torch.float64)).rollouts
    return made._replace(group_ids=torch.tensor(groups))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(data=st.data())
@law
def test_advantages_are_those_of_the_loop(scale: str, data: st.DataObject) -> None:
    groups = [g for g in data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4)) for _ in range(2)]
    rewards = data.draw(st.lists(NUMBERS, min_size=len(groups), max_size=len(groups)))
    found = advantages(rollouts_of(rewards, groups), "group", scale)
    wanted = torch.tensor(losses.advantages(rewards, groups, scale), dtype=torch.float64)
    # Rounding of 1e-15 in R − mean is divided by a standard deviation of at least 1e-4.
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    found = advantages(rollouts_of(rewards, groups), "leave_one_out", "none")
    wanted = torch.tensor(losses.leave_one_out(rewards, groups), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@given(reward=NUMBERS, size=st.integers(2, 7))
@law
def test_equal_rewards_have_exactly_no_advantage(reward: float, size: int) -> None:
    rollouts = rollouts_of([reward] * size, [0] * size)
    for baseline, scale in [("group", "group"), ("group", "none"), ("leave_one_out", "none")]:
        assert not bool(advantages(rollouts, baseline, scale).any())


def test_no_baseline_is_the_reward_itself() -> None:
    rollouts = rollouts_of([1.0, 3.0, 5.0], [0, 1, 2])
    assert advantages(rollouts, "none", "none").tolist() == [1.0, 3.0, 5.0]
    assert advantages(rollouts, "none", "batch").tolist() == pytest.approx([1 / 2.0001, 3 / 2.0001, 5 / 2.0001])
    assert advantages(rollouts, "group", "batch").tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("baseline", "scale", "message"),
    [
        ("group", "group", r"Group 7 has a single rollout \(row 2\).*standard deviation.*scale_rewards='batch' or"),
        ("leave_one_out", "none", r"Group 7 has a single rollout \(row 2\).*other rollout.*another objective"),
    ],
)
def test_a_group_of_one_is_named(baseline: str, scale: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        advantages(rollouts_of([1.0, 2.0, 3.0], [4, 4, 7]), baseline, scale)


def test_a_batch_of_one_has_no_standard_deviation() -> None:
    with pytest.raises(InputError, match="one rollout, whose standard deviation is undefined"):
        advantages(rollouts_of([1.0], [0]), "group", "batch")


def test_missing_and_non_finite_numbers_are_refused() -> None:
    rollouts = rollouts_of([1.0, 2.0], [0, 0])
    with pytest.raises(InputError, match="neither rewards nor advantages"):
        advantages(rollouts._replace(rewards=None))
    for bad in (float("nan"), float("inf")):
        spoiled = torch.tensor([0.0, bad], dtype=torch.float64)
        with pytest.raises(InputError, match=f"Row 1: rewards is {bad}"):
            advantages(rollouts._replace(rewards=spoiled))
        with pytest.raises(InputError, match=f"Row 1: advantages is {bad}"):
            advantages(rollouts._replace(advantages=spoiled))
