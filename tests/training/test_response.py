"""∇F carried back through a step: shares of the gradient's parts that sum to the whole, or that follow the Jacobian."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.groups import Group
from funcprobe.training.response import respond
from funcprobe.types import OptState, Params
from tests.cases import trees as cases
from tests.cases.tables import CLOSED_FORM, LR

#: Every class of torch.optim that steps without a closure on dense gradients, and what makes its step smooth.
LIFTED: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {"d": 1e3},  # its clip is read out as a number; out of reach it is 1
    "Adagrad": {},
    "Adamax": {},
    "Muon": {},
    "NAdam": {"weight_decay": 0.1},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9},
    "Rprop": {},
}


def covector(params: Params, seed: int = 7) -> Params:
    """Return some ∇F, float64."""
    return cases.leaves(torch.float64, seed)


def warm(step: fp.training.step.Step, params: Params, seed: int = 1) -> OptState:
    """Return the state after one step on another gradient, so that moments are real."""
    return step.apply(params, step.optimizer.init(params), cases.gradients(params, seed)).opt_state


#: A gradient whose entries stay away from 0, where a sign has no derivative.
AWAY: Params = {n: g.sign() * (0.3 + g.abs()) for n, g in cases.leaves(torch.float64, 1003).items()}


#: A policy of which no model is run here.
NOBODY: Any = SimpleNamespace(names=(), vocab_size=0, device="cpu")


def step_of(optimizer: Any, clip: float | None) -> Any:
    return fp.make_step(NOBODY, fp.grpo(), optimizer, clip)


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
@pytest.mark.parametrize("name", CLOSED_FORM)
@given(seed=st.integers(0, 2**20), cold=st.booleans(), wide=st.booleans())
def test_shares_momentum_and_decay_sum_to_the_whole(
    name: str, clip: float | None, seed: int, cold: bool, wide: bool
) -> None:
    params = cases.leaves(torch.float64 if wide else torch.float32, seed)
    step, g = step_of(CLOSED_FORM[name](params), clip), cases.gradients(params, seed)
    state = step.optimizer.init(params) if cold else warm(step, params)
    c = covector(params)
    found = respond(step.rule, params, state, g, c)
    taken = step.apply(params, state, g)
    assert found.form == "additive"
    parts = {
        n: [float(tree.dot({n: found.direction[n]}, {n: g[n]})), *(o[n] for o in found.offsets.values())] for n in g
    }
    for n in params:
        whole = float(tree.dot({n: c[n]}, {n: taken.delta[n]}))
        # float64: a dozen roundings a term; float32: direction, clipped gradient and update are kept in it
        size = float((c[n].double() * taken.delta[n].double()).abs().sum()) + sum(map(abs, parts[n]))
        assert abs(sum(parts[n]) - whole) <= (1e-14 if wide else 1e-6) * size, n


def test_offsets_are_what_a_zero_gradient_would_leave_of_sgd() -> None:
    params = cases.leaves(torch.float64)
    step = step_of(fp.sgd(LR, momentum=0.9, weight_decay=0.1), None)
    state, c, zero = warm(step, params), covector(params), tree.zeros_like(params)
    left = step.apply(params, state, zero).delta
    found = respond(step.rule, params, state, cases.gradients(params, 3), c)
    for n in params:
        expected = float(tree.dot({n: c[n]}, {n: left[n]}))
        assert sum(o[n] for o in found.offsets.values()) == pytest.approx(expected, rel=1e-12)
        decay = -LR * 0.1 * float(tree.dot({n: c[n]}, {n: params[n]}))
        assert found.offsets["weight decay"][n] == pytest.approx(decay, rel=1e-12)


def smooth(optimizer: Any) -> Any:
    """Return the optimizer with an epsilon of the size of the gradients, where its first step is no sign any more."""
    if "eps" not in optimizer.groups[0].hyperparameters or optimizer.cls is torch.optim.Adafactor:
        return optimizer
    return dataclasses.replace(optimizer, groups=(Group(None, {**optimizer.groups[0].hyperparameters, "eps": 0.5}),))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("name", [*CLOSED_FORM, *LIFTED])
def test_the_jacobian_form_is_the_derivative_of_the_whole_in_the_gradient(
    name: str, cold: bool, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = cases.leaves(torch.float64)
    if name in CLOSED_FORM:
        optimizer = smooth(CLOSED_FORM[name](params))
    else:
        optimizer = smooth(fp.from_torch(getattr(torch.optim, name), lr=LR, **LIFTED[name]))
    if name == "Muon":  # it takes matrices alone, and rounds to bfloat16 inside, which no finite difference survives
        params = {n: p for n, p in params.items() if p.ndim == 2}
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    g, c, v = (
        {n: x[n] for n in params} for x in (AWAY, covector(cases.leaves()), cases.leaves(torch.float64, 11, scale=0.1))
    )
    step = step_of(optimizer, clip)
    empty = optimizer.init(params)
    state = empty if cold else step.apply(params, empty, tree.scale(0.7, g)).opt_state
    found = respond(step.rule, params, state, g, c, form="jacobian")
    assert (found.form, found.offsets) == ("jacobian", {})

    def whole(e: float) -> float:
        return float(tree.dot(c, step.apply(params, state, tree.axpy(e, v, g)).delta))

    # central differences, twice, with Richardson's step: O(h⁴) = 1e-12 of curvatures of order one, and rounding of
    # the whole, 1e-16 of its terms, divided by h
    h = 1e-3
    slopes = [(whole(e) - whole(-e)) / (2 * e) for e in (h, h / 2)]
    size = float(tree.norm(found.direction) * tree.norm(v))
    rounding = 1e-15 * float(tree.norm(c) * tree.norm(step.apply(params, state, g).delta)) / h
    expected = (4 * slopes[1] - slopes[0]) / 3
    assert float(tree.dot(found.direction, v)) == pytest.approx(expected, rel=1e-7, abs=1e-7 * size + rounding)


def test_the_two_forms_agree_where_the_step_is_linear_in_the_gradient_and_part_under_adam() -> None:
    params = cases.leaves(torch.float64)
    g, c = cases.gradients(params, 3), covector(params)
    for optimizer, same in ((fp.sgd(LR, momentum=0.9), True), (fp.adamw(LR), False)):
        step = step_of(optimizer, None)
        state = warm(step, params)
        one, other = (respond(step.rule, params, state, g, c, form=form).direction for form in ("additive", "jacobian"))
        off = float(tree.norm(tree.sub(one, other)) / tree.norm(one))
        assert (off < 1e-14) == same, (optimizer, off)


def test_a_learning_rate_that_is_given_counts() -> None:
    params = cases.leaves(torch.float64)
    g, c = cases.gradients(params, 3), covector(params)
    for optimizer in (fp.sgd(LR), fp.from_torch(torch.optim.RMSprop, lr=LR)):
        step = step_of(optimizer, None)
        state = warm(step, params)
        one, three = (respond(step.rule, params, state, g, c, lr) for lr in (None, 3 * LR))
        assert float(tree.norm(tree.sub(three.direction, tree.scale(3.0, one.direction)))) <= 1e-12 * float(
            tree.norm(three.direction)
        )


def test_an_entry_that_never_had_a_gradient_has_a_share_of_nothing_and_no_nan() -> None:
    """√v has no derivative at v = 0: so it is for every embedding row that no token reads."""
    params, c = cases.leaves(torch.float64), covector(cases.leaves())
    g = cases.gradients(params, 3)  # one of its entries is exactly 0
    for cls in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.AdamW):
        step = step_of(fp.from_torch(cls, lr=LR), None)
        found = respond(step.rule, params, step.optimizer.init(params), g, c, form="jacobian").direction
        assert tree.is_finite(found), cls
        assert float(found["layer.2.bias"][0]) == 0.0 or cls is torch.optim.AdamW


def test_nothing_that_is_passed_in_changes() -> None:
    params = cases.leaves(torch.float64)
    for optimizer in (fp.adamw(LR), fp.from_torch(torch.optim.RMSprop, lr=LR, momentum=0.9)):
        step = step_of(optimizer, 0.5)
        state, g, c = warm(step, params), cases.gradients(params, 3), covector(params)
        before = [cases.clone(x) for x in (params, state, g, c)]
        generator = torch.get_rng_state()
        for form in ("auto", "jacobian"):
            respond(step.rule, params, state, g, c, form=form)  # type: ignore[arg-type]
        for found, kept in zip((params, state, g, c), before, strict=True):
            cases.assert_same(found, kept)
        assert torch.equal(torch.get_rng_state(), generator)


class HandWritten:
    """An optimizer that says nothing of its derivative."""

    lr = LR

    def init(self, params: Params) -> OptState:
        return {n: {} for n in params}

    def apply(self, params: Params, state: OptState, gradient: Params, lr: float | None = None) -> Any:
        return fp.sgd(LR).apply(params, state, gradient, lr)


class Cutting(torch.optim.Optimizer):
    """A torch optimizer whose step reads its gradient as numbers."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.sign(p.grad.detach()), alpha=-group["lr"])


def test_what_an_optimizer_cannot_give_is_said() -> None:
    params = cases.leaves(torch.float64)
    g, c = cases.gradients(params, 3), covector(params)

    def asked(optimizer: Any, form: Any = "auto") -> None:
        respond(step_of(optimizer, None).rule, params, optimizer.init(params), g, c, form=form)

    with pytest.raises(InputError, match=r"RMSprop has no additive form.*form='jacobian'"):
        asked(fp.from_torch(torch.optim.RMSprop, lr=LR), "additive")
    with pytest.raises(InputError, match=r"HandWritten has no derivative in the gradient.*vjp"):
        asked(HandWritten())
    with pytest.raises(InputError, match="Cutting cuts the graph"):
        asked(fp.from_torch(Cutting, lr=LR))
    with pytest.raises(InputError, match="Unknown form 'exact'"):
        asked(fp.sgd(LR), "exact")


def test_a_leaf_of_many_pieces_is_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    params = cases.leaves(torch.float64)
    step = step_of(fp.adamw(LR, weight_decay=0.1), 0.5)
    state, g, c = warm(step, params), cases.gradients(params, 3), covector(params)
    whole, update = respond(step.rule, params, state, g, c), step.apply(params, state, g).delta
    direction = dict(whole.direction)  # a leaf is computed when it is read
    monkeypatch.setattr("funcprobe.tree.PIECE", 4)
    cut = respond(step.rule, params, state, g, c)
    cases.assert_same(dict(cut.direction), direction)
    cases.assert_same(step.apply(params, state, g).delta, update)
    for what, of in whole.offsets.items():
        assert cut.offsets[what] == pytest.approx(of, rel=1e-13), what
    assert isinstance(step.optimizer, PureOptimizer)
