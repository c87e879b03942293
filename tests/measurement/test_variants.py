"""Which variants of an update apply, and why others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.measurement.drawn import Ratios
from funcprobe.measurement.variants import AS_IT_IS, CLIP_HIGHER, variants_of
from tests.cases.probes import Case, U

FAR = Ratios(0.1, 1.5, 0.8)
CASE = Case()
LR = 1e-3


def update(objective: Any = None, **own: Any) -> fp.Update:
    return CASE.update(**own) if objective is None else CASE.update(**own).vary(objective=objective)


def test_all_of_them_apply_to_a_batch_whose_ratios_move() -> None:
    base = update()
    found = variants_of(base, FAR, LR)
    assert list(found.updates) == [
        AS_IT_IS,
        "half the lr",
        "entropy bonus",
        "clip-higher",
        "Clip-Cov",
        "drop negatives",
    ]
    assert found.left_out == {}
    assert found.updates[AS_IT_IS] is base
    assert found.updates["half the lr"].lr == LR / 2
    assert found.updates["half the lr"].shares_gradient(base)
    higher = found.updates["clip-higher"].step.objective  # type: ignore[union-attr]
    assert (higher.epsilon, higher.epsilon_high) == (0.2, CLIP_HIGHER)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("objective", "ratios", "why"),
    [
        (None, None, "every ratio is 1, where clipping does nothing"),
        (None, Ratios(1e-7, 1.1, 1.0), "no ratio is above 1.2, where clipping begins"),
        (fp.dapo(), FAR, "epsilon_high is 0.28 already"),
        (fp.reinforce(), FAR, "reinforce does not clip"),
    ],
)
def test_clip_higher_is_left_out_where_it_can_do_nothing(objective: Any, ratios: Ratios | None, why: str) -> None:
    found = variants_of(update(objective), ratios, LR)
    assert found.left_out == {"clip-higher": why}
    assert "clip-higher" not in found.updates


def test_what_an_update_does_not_know_leaves_variants_out() -> None:
    positive = U._replace(advantages=torch.ones(len(U.ids), dtype=torch.float64))
    assert variants_of(update(batch=positive), FAR, LR).left_out == {"drop negatives": "no advantage is below 0"}
    gradient = CASE.step.gradient(CASE.params, U)[0]
    known = fp.Update.from_gradient(CASE.policy, CASE.optimizer, CASE.params, CASE.state, gradient)
    found = variants_of(known, None, LR)
    assert list(found.updates) == [AS_IT_IS, "half the lr"]
    assert set(found.left_out.values()) == {"the update knows no tokens of U"}
    delta = fp.Update.from_delta(CASE.policy, CASE.params, CASE.step(CASE.params, CASE.state, U).delta)
    assert variants_of(delta, None, None) == ({AS_IT_IS: delta}, {"half the lr": "the update has no learning rate"})


def test_an_objective_of_ones_own_has_half_the_learning_rate_alone() -> None:
    class Own:
        name, separable, stats = "own", True, {}

        def prepare(self, rollouts: fp.Rollouts) -> fp.Rollouts:
            return rollouts

        def __call__(self, scores: Any, rollouts: fp.Rollouts) -> Any:
            return scores.logp.sum(), {}

    found = variants_of(update(Own()), FAR, LR)
    assert list(found.updates) == [AS_IT_IS, "half the lr"]
    assert set(found.left_out.values()) == {"the objective is one of your own"}
