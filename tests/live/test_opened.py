"""A step opened to its tokens: those that an attribution of the same update tells."""

from __future__ import annotations

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.live.opened import OTHER_GRADIENT, opened
from funcprobe.live.steps import Kept
from funcprobe.types import Gradients, Params
from tests.cases.probes import Case, E


def covector_of(case: Case) -> Params:
    found = fp.anchored(fp.entropy(), case.policy, E, case.params)
    return torch.func.grad(found)(case.params)  # type: ignore[no-any-return]


def used(update: fp.Update) -> Gradients:
    assert update.rule is not None
    return update.rule.clipped(update.gradient().gradient)[0]


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["not clipped", "clipped"])
def test_tokens_are_those_of_an_attribution(clip: float | None) -> None:
    case = Case()
    step = fp.make_step(case.policy, fp.grpo(), case.optimizer, max_grad_norm=clip)
    update = case.update(step=step)
    told = opened(Kept(3, update, used(update)), covector_of(case), None)
    expected = fp.attribute(update, E, bars=None).columns("tokens")
    # float64, two ways to one ∇F
    assert told.tokens["contribution"] == pytest.approx(expected["contribution"], rel=1e-9, abs=1e-15)
    assert told.summary.step == 3
    assert told.summary.whole == pytest.approx(expected["contribution"].sum(), rel=1e-9)
    assert told.summary.given == pytest.approx(told.summary.whole, rel=1e-9)
    assert told.summary.off < 1e-12
    assert told.summary.clipped == 0.0
    assert told.warnings == ()
    largest = max(told.summary.tokens, key=lambda token: abs(token.contribution))
    k = int(abs(expected["contribution"]).argmax())
    where = tuple(int(expected[name][k]) for name in ("sequence", "prompt", "position", "token"))
    assert (largest.sequence, largest.prompt, largest.position, largest.token) == where
    assert largest.advantage == pytest.approx(expected["advantage"][k])
    assert sum(prompt.contribution for prompt in told.summary.prompts) == pytest.approx(told.summary.whole)


def test_another_gradient_than_the_objectives_is_told() -> None:
    case = Case()
    update = case.update()
    other = tree.scale(1 + 2 * OTHER_GRADIENT, dict(used(update)))
    told = opened(Kept(0, update, other), covector_of(case), None)
    assert told.summary.off == pytest.approx(2 * OTHER_GRADIENT / (1 + 2 * OTHER_GRADIENT))
    assert told.summary.given == pytest.approx(told.summary.whole * (1 + 2 * OTHER_GRADIENT))
    assert [note.kind for note in told.warnings] == ["other gradient"]
