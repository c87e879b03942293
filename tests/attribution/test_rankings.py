"""Rankings are the numbers that attribution and prediction give, by token."""

from __future__ import annotations

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.attribution.rankings import METHODS, check_methods, rankings
from funcprobe.attribution.step_parts import StepParts
from funcprobe.errors import InputError
from tests.cases.probes import Case, E


def gradient_of_f(case: Case) -> dict[str, torch.Tensor]:
    return torch.func.grad(fp.anchored(fp.entropy(), case.policy, E, case.params))(case.params)


def test_every_method_gives_the_numbers_that_its_own_verb_gives() -> None:
    case = Case()
    update = case.update()
    parts = StepParts.of(update, update.move()[0], None, "additive")
    g = gradient_of_f(case)
    found = rankings(parts, g, list(METHODS))
    for form in ("additive", "jacobian"):
        torch.testing.assert_close(found[form], fp.attribute(update, E, form=form).batch.total, rtol=1e-7, atol=1e-12)
    plain = fp.sgd(1.0)
    step = fp.make_step(case.policy, case.step.objective, plain)
    other = fp.Update.from_step(step, case.params, plain.init(case.params), update.batch)
    torch.testing.assert_close(found["sgd"], fp.attribute(other, E).batch.total, rtol=1e-7, atol=1e-12)
    for name, tokens in fp.predict(
        update,
    ).tokens.items():
        torch.testing.assert_close(found[name] * case.optimizer.lr, tokens, rtol=1e-9, atol=1e-15)
    scores = fp.score(case.policy, case.params, update.batch)
    torch.testing.assert_close(found["surprisal"], -scores.logp)
    torch.testing.assert_close(found["entropy"], scores.entropy)
    assert bool((found["abs_advantage"] >= 0).all())
    assert all(not bool(x[~parts.prepared.completion_mask].any()) for x in found.values())
    assert tree.dot(g, g) > 0


def test_readings_alone_take_no_derivative() -> None:
    case = Case()
    update = case.update()
    parts = StepParts.of(update, update.move()[0], None, "additive")
    alone = rankings(parts, {}, ["discriminant", "entropy"])
    both = rankings(parts, gradient_of_f(case), ["sgd", "discriminant", "entropy"])
    assert list(alone) == ["discriminant", "entropy"]
    for name, x in alone.items():
        torch.testing.assert_close(x, both[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bad", ["additive", [], ["additive", "luck"]])
def test_unknown_methods_are_refused(bad: list[str]) -> None:
    with pytest.raises(InputError, match=r"Unknown methods .*expected a list of some of additive, jacobian"):
        check_methods(bad)
    assert check_methods(["sgd", "sgd", "entropy"]) == ("sgd", "entropy")
