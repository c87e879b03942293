"""The Jacobian form against steps taken anew with one sequence, or one token, that weighs a little more or less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import FuncprobeWarning
from funcprobe.types import Params, Rollouts, Statistic, TokenScores
from tests.cases.attributions import Stepped
from tests.cases.probes import E, U
from tests.cases.tables import LR
from tests.oracles import attribution as oracle


class Reweighed:
    """An objective in which the terms of one sequence, or of one of its tokens, are multiplied after preparation."""

    def __init__(self, base: Any, factor: float, row: int, token: int | None = None) -> None:
        self.base, self.factor, self.where = base, factor, (row, token)
        self.name, self.separable = base.name, base.separable
        self.stats: Mapping[str, Statistic] = base.stats

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """Return what the base prepares, with the weights of the one changed."""
        prepared = self.base.prepare(rollouts)
        weights: Tensor = prepared.token_weights.clone()
        row, token = self.where
        weights[row, slice(None) if token is None else token] *= self.factor
        return prepared._replace(token_weights=weights)

    def __call__(self, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the base's loss."""
        return self.base(scores, rollouts)


#: Optimizers whose step is not linear in the gradient, or is not with clipping.
CURVED: dict[str, tuple[Callable[[], Any], float | None]] = {
    "adamw": (lambda: fp.adamw(LR, weight_decay=0.1), None),
    "adamw, clipped": (lambda: fp.adamw(LR, weight_decay=0.1), 0.05),
    "adam, coupled": (lambda: fp.adam(LR, weight_decay=0.1), None),
    "sgd, clipped": (lambda: fp.sgd(LR, momentum=0.9), 0.05),
    "RMSprop": (lambda: fp.from_torch(torch.optim.RMSprop, lr=LR, momentum=0.5), None),
    "NAdam, clipped": (lambda: fp.from_torch(torch.optim.NAdam, lr=LR), 0.05),
    "Adagrad": (lambda: fp.from_torch(torch.optim.Adagrad, lr=LR), None),
}


def gradient_of_f(case: Stepped) -> Params:
    return torch.func.grad(fp.anchored(fp.entropy(), case.policy, E, case.params))(case.params)


def rerun(case: Stepped, covector: Params, factor: float, row: int, token: int | None = None) -> float:
    """Return ⟨∇F, Δθ⟩ of a step in which one sequence or token weighs `factor` times as much."""
    step = dataclasses.replace(case.step, objective=Reweighed(case.step.objective, factor, row, token))
    return float(tree.dot(covector, step(case.params, case.state, case.batch).delta))


@pytest.mark.parametrize("model", ["two lines", "gpt2"])
@pytest.mark.parametrize("name", CURVED)
def test_contributions_are_what_a_little_less_weight_would_change(name: str, model: str) -> None:
    """Step rule: a weight changes by h = 2e-3, which leaves O(h⁴) = 1e-11 of Σ|parts| times a fifth derivative.

    Where a gradient all but cancels, √v turns within |g|/|g_j| and that derivative is large: hence 1e-9. The two forms
    differ by tenths.
    """
    build, clip = CURVED[name]
    case = Stepped(model, "grpo", build(), clip)
    covector = gradient_of_f(case)
    found = case.attribute(form="jacobian")
    assert found.form == "jacobian"
    total, size = found.batch.total, found.batch.magnitude()
    for row, token in ((0, None), (7, None), (2, 1), (10, 0)):
        part = float(total[row].sum() if token is None else total[row, token])
        slope = oracle.richardson(
            lambda e, row=row, token=token: torch.tensor(  # type: ignore[misc]
                rerun(case, covector, 1 + e, row, token), dtype=torch.float64
            ),
            2e-3,
        )
        assert abs(part - float(slope)) <= 1e-9 * size, (row, token, part, float(slope))


@pytest.mark.parametrize("name", ["adamw", "adam, coupled", "sgd, clipped"])
def test_the_two_forms_answer_two_questions(name: str) -> None:
    """Who would see no difference between them would pass for both; what each sums to is another thing too."""
    build, clip = CURVED[name]
    case = Stepped("gpt2", "grpo", build(), clip)
    additive, jacobian = (case.attribute(form=form) for form in ("additive", "jacobian"))
    off = (additive.batch.total - jacobian.batch.total).abs().sum()
    assert float(off) > 0.1 * additive.batch.magnitude()
    assert list(additive.ledger) == ["gradient on U", "momentum", "weight decay"]
    assert list(jacobian.ledger) == ["gradient on U", "rest"]
    own = additive.ledger["momentum"] + additive.ledger["weight decay"]
    assert abs(jacobian.ledger["rest"] - own) > 0.05 * abs(additive.first_order)
    assert all(part.momentum == part.decay == 0.0 for part in jacobian.leaves)
    assert max(additive.completeness_error, jacobian.completeness_error) <= 1e-12
    # parameters and tokens of E are not asked what the gradient did
    for a, b in zip(additive.leaves, jacobian.leaves, strict=True):
        assert a.contribution == b.contribution
    assert torch.equal(additive.evaluation.total, jacobian.evaluation.total)


def test_a_first_step_of_adam_is_a_sign_and_hardly_answers_to_a_weight() -> None:
    """With cold moments Δθ = −η g/(|g| + ε): additively all of it is the gradient's; its slope is ε/|g| of that."""
    case = Stepped("two lines", "grpo", fp.adamw(LR, weight_decay=0.0), cold=True)
    # where g nearly cancels over U, its sign is one entry's that carries whole rows
    with pytest.warns(FuncprobeWarning, match="One entry of head.weight carries"):
        additive, jacobian = (case.attribute(form=form) for form in ("additive", "jacobian"))
    assert additive.ledger["gradient on U"] == pytest.approx(additive.first_order, rel=1e-12)
    assert jacobian.batch.magnitude() < 1e-3 * additive.batch.magnitude()
    assert jacobian.ledger["rest"] == pytest.approx(jacobian.first_order, rel=1e-2)


def test_forms_agree_where_the_step_is_linear() -> None:
    case = Stepped("gpt2", "grpo", "sgd, nesterov")
    additive, jacobian = (case.attribute(form=form) for form in ("additive", "jacobian"))
    off = (additive.batch.total - jacobian.batch.total).abs().sum()
    assert float(off) <= 1e-13 * additive.batch.magnitude()
    own = additive.ledger["momentum"] + additive.ledger["weight decay"]
    assert jacobian.ledger["rest"] == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("cls", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad])
def test_an_optimizer_without_an_additive_form_is_attributed_by_its_jacobian_and_says_so(cls: Any) -> None:
    case = Stepped("two lines", "grpo", fp.from_torch(cls, lr=LR))
    auto, asked = case.attribute(), case.attribute(form="jacobian")
    assert (auto.form, asked.form) == ("jacobian", "jacobian")
    said = "the optimizer has no additive form; tokens of U are attributed by its Jacobian"
    assert said in auto.probe.notes
    assert said not in asked.probe.notes  # it was asked for
    assert torch.equal(auto.batch.total, asked.batch.total)
    assert "jacobian form" in auto.summary()
    assert "by rest" in auto.summary()
    with pytest.raises(fp.errors.InputError, match=rf"{cls.__name__} has no additive form.*form='jacobian'"):
        case.attribute(form="additive")


def test_clipping_turns_what_lies_along_the_gradient() -> None:
    """All sequences together are the gradient, and a clipped step of SGD does not grow with it: they sum to nothing."""
    case = Stepped("gpt2", "grpo", fp.sgd(LR), clip=0.05)
    found = case.attribute(form="jacobian", batch=U)
    assert found.probe.outcome.info["clip_coefficient"] < 0.9
    # (the 1e-6 that torch adds to the norm leaves 1e-6/‖g‖ of it)
    assert abs(found.ledger["gradient on U"]) <= 1e-4 * found.batch.magnitude()
    assert found.ledger["rest"] == pytest.approx(found.first_order, rel=1e-4)
    assert case.attribute(form="additive", batch=U).ledger["gradient on U"] == pytest.approx(found.first_order)
