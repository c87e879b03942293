"""Gradients of several objectives on one batch, from passes that they share: those that each would take by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.measurement.update import take_gradients
from tests.cases import models
from tests.cases.probes import Case, E, prompted

U = prompted(4, 2, seed=2, first=50)

#: Functions of logp, of the entropy too, of the whole batch at once, and of statistics of their own.
OBJECTIVES = {
    "grpo": fp.grpo(),
    "dr_grpo": fp.dr_grpo(),
    "bonus": fp.entropy_bonus(fp.grpo()),
    "covariance": fp.clip_cov(fp.grpo()),
}

#: A leaf's gradient is a sum over tokens of float64 products, in whichever graph: some tens of roundings of 2^-53.
ROUNDING = 1e-13


def updates(case: Case, **objectives: Any) -> dict[str, fp.Update]:
    first = case.update(1e-3, batch=U)
    return {name: first.vary(objective=objective) for name, objective in objectives.items()}


@pytest.mark.parametrize("microbatch", [None, 3])
def test_gradients_of_one_pass_are_those_of_each(microbatch: int | None) -> None:
    case = Case(models.qwen2(torch.float64))
    cut: Any = {"policy": case.policy, "optimizer": case.optimizer, "microbatch": microbatch}
    shared, alone = (
        {
            name: fp.Update.from_step(fp.make_step(objective=o, **cut), case.params, case.state, U)
            for name, o in OBJECTIVES.items()
        }
        for _ in range(2)
    )
    take_gradients(list(shared.values()))
    for name, update in shared.items():
        found, expected = update.gradient(), alone[name].gradient()
        assert found.info.keys() == expected.info.keys()
        assert found.info == pytest.approx(expected.info, rel=ROUNDING), name
        for leaf, g in expected.gradient.items():
            largest = float(g.abs().max())
            torch.testing.assert_close(found.gradient[leaf], g, rtol=0, atol=ROUNDING * max(largest, 1e-3), msg=name)


def test_they_share_the_passes_over_their_batch() -> None:
    rows: list[int] = []
    case = Case(models.qwen2(torch.float64)).watched_rows(rows)
    take_gradients(list(updates(case, grpo=fp.grpo(), dapo=fp.dapo()).values()))
    assert rows == [len(U.ids)]


def test_each_has_its_own_warnings_and_errors() -> None:
    case = Case(models.qwen2(torch.float64))
    flat = U._replace(rewards=torch.ones_like(U.rewards))
    several = {
        name: fp.Update.from_step(fp.make_step(case.policy, o, case.optimizer), case.params, case.state, flat)
        for name, o in {"grpo": fp.grpo(), "needs old": fp.grpo(beta=0.1)}.items()
    }
    take_gradients(list(several.values()))  # the second one needs a reference, and says so where it is asked
    with pytest.raises(InputError, match="Update 'needs old'"):
        fp.compare(several, E)


def test_a_comparison_of_objectives_is_that_of_its_updates_one_by_one() -> None:
    case = Case(models.qwen2(torch.float64))
    together = fp.compare(updates(case, **OBJECTIVES), E, bars=None)
    apart = fp.compare(updates(case, **OBJECTIVES), E, bars=None, chunk=1)
    for name in OBJECTIVES:
        one, other = together.outcomes[name].main, apart.outcomes[name].main
        assert one.change == pytest.approx(other.change, rel=1e-9), name
        assert one.first_order == pytest.approx(other.first_order, rel=1e-9), name
