"""An elementwise operation of a dual number and a constant has the derivatives that torch gives it, and fewer terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from funcprobe import engine
from funcprobe.engine import constants
from funcprobe.engine.constants import ConstantOperands
from tests.cases.engines import setting

Elementwise = Callable[[Tensor, Any], Tensor]

OPERATIONS: dict[str, Elementwise] = {
    "x * c": lambda x, c: x * c,
    "c * x": lambda x, c: c * x,
    "torch.mul(c, x)": lambda x, c: torch.mul(torch.as_tensor(c, dtype=x.dtype), x),
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "torch.rsub(x, c)": lambda x, c: torch.rsub(x, c),
    "x / c": lambda x, c: x / c,
    "c / x": lambda x, c: c / x,
}
CONSTANTS: dict[str, Any] = {
    "number": 3,
    "scalar": torch.tensor(0.7, dtype=torch.float64),
    "row": torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64),
    "wider": torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(2, 2, 3) + 0.1,
}

X = torch.tensor([[0.3, -1.2, 2.0], [1.1, 0.4, -0.7]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.2, -0.5], [0.3, -2.0, 0.9]], dtype=torch.float64)


def derivatives(f: Callable[[Tensor], Tensor], order: int) -> tuple[Tensor, ...]:
    """Return f, Df[V] and, at order 2, D²f[V, V] at X."""

    def once(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(f, (x,), (V,))  # type: ignore[return-value]

    if order == 1:
        return once(X)
    (y, dy), (_, ddy) = torch.func.jvp(once, (X,), (V,))  # type: ignore[misc]
    return y, dy, ddy


def assert_same(made: tuple[Tensor, ...], own: tuple[Tensor, ...]) -> None:
    """Hold them against each other bit by bit; a zero has no sign."""
    for mine, theirs in zip(made, own, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_are_those_of_torch(name: str, constant: str, order: int) -> None:
    operation, c = OPERATIONS[name], CONSTANTS[constant]

    def f(x: Tensor) -> Tensor:
        return operation(x * x * x, c).exp()  # curved before and after: every term of the second derivative is there

    own = derivatives(f, order)
    with ConstantOperands():
        made = derivatives(f, order)
    assert_same(made, own)


@pytest.mark.parametrize("constant", [c for c in CONSTANTS if c != "number"])
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "c / x"])
def test_no_tangent_of_zeros_is_made(name: str, constant: str) -> None:
    def made() -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            torch.func.jvp(lambda x: OPERATIONS[name](x, CONSTANTS[constant]), (X,), (V,))
        return sum(event.count for event in seen.key_averages() if event.key == "aten::_efficientzerotensor")

    assert made()
    with ConstantOperands():
        assert not made()


def test_tangents_are_batched_by_vmap() -> None:
    def push(v: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: (2.0 - x * CONSTANTS["row"]).exp(), (X,), (v,))[1]

    tangents = torch.stack([V, 2 * V, -V])
    with ConstantOperands():
        assert torch.equal(torch.vmap(push)(tangents), torch.stack([push(v) for v in tangents]))


def test_constants_are_batched_by_vmap() -> None:
    def push(c: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: (x * x * c - c).exp(), (X,), (V,))[1]

    rows = torch.stack([CONSTANTS["row"], 1 + CONSTANTS["row"]])
    own = torch.stack([push(c) for c in rows])
    with ConstantOperands():
        assert torch.equal(torch.vmap(push)(rows), own)


def curve(x: Tensor, c: Tensor) -> Tensor:
    return (1.0 - (x * x * c + c) / (c * c + 2.0)).exp()


def push(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.jvp(f, (x,), (V,))[1]


NESTINGS: dict[str, Callable[[], Tensor]] = {
    "three times": lambda: push(push(push(lambda x: curve(x, CONSTANTS["row"]))))(X),
    "twice under vmap of a constant": lambda: torch.vmap(lambda c: push(push(lambda x: curve(x, c)))(X))(
        CONSTANTS["wider"].reshape(4, 3)
    ),
    "vmap between": lambda: push(lambda x: torch.vmap(lambda v: torch.func.jvp(cubed, (x,), (v,))[1])(PAIR))(X),
    "gradient between": lambda: push(lambda x: torch.func.grad(lambda y: push(cubed)(y).sum())(x))(X),
    "gradient outside": lambda: torch.func.grad(lambda x: push(push(cubed))(x).sum())(X),
    "gradient inside": lambda: push(push(lambda x: torch.func.grad(lambda y: cubed(y).sum())(x)))(X),
    "a constant that moves outside": lambda: push(lambda c: push(lambda x: curve(x, c + 2.0))(X))(X),
}
PAIR = torch.stack([V, 2 - V])


def cubed(x: Tensor) -> Tensor:
    return curve(x, CONSTANTS["row"])


@pytest.mark.parametrize("nesting", NESTINGS)
def test_rules_nest_with_one_another_and_with_other_transforms(nesting: str) -> None:
    own = NESTINGS[nesting]()
    with ConstantOperands():
        made = NESTINGS[nesting]()
    assert_same((made,), (own,))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * torch.tensor([1.5, 2.0, -0.1]),  # float32: a tensor of a lesser dtype
        lambda x: x.float() * CONSTANTS["row"],
        lambda x: x * torch.tensor([1, 2, 3]),
        lambda x: torch.add(x, CONSTANTS["row"], alpha=2),
        lambda x: x.clone().mul_(CONSTANTS["row"]),
        lambda x: (x * CONSTANTS["row"]).sub_(1.0).mul_(x),  # in place on what a rule returned
        lambda x: (x + CONSTANTS["row"])[0].add_(x[1]),
        lambda x: (x + CONSTANTS["row"]).mul_(2.0) * x,  # and x keeps its own tangent
        lambda x: (x[0] + CONSTANTS["wider"]).mul_(x),
        lambda x: (CONSTANTS["wider"] - x[0]).mul_(x),
        lambda x: torch.div(x * 3, CONSTANTS["row"], rounding_mode="floor"),
        lambda x: torch.vmap(lambda row: row * row * CONSTANTS["row"])(x),
        lambda x: torch.func.grad(lambda y: (y * y * CONSTANTS["row"]).sum())(x),
        lambda x: x.detach() * CONSTANTS["row"] + x * x.detach(),
        lambda x: x * x + x,
        lambda x: CONSTANTS["row"] * CONSTANTS["row"] + x,
        lambda x: x * 1j,
    ],
)
@pytest.mark.parametrize("order", [1, 2])
def test_other_operations_are_torchs_own(f: Callable[[Tensor], Tensor], order: int) -> None:
    own = derivatives(f, order)
    with ConstantOperands():
        made = derivatives(f, order)
    assert_same(made, own)


def test_outside_of_a_transform_nothing_changes() -> None:
    x = X.clone().requires_grad_()
    with ConstantOperands():
        (slope,) = torch.autograd.grad((x * CONSTANTS["row"]).sum(), x)
    assert torch.equal(slope, CONSTANTS["row"].expand_as(X))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("build", ["gpt2", "qwen2, tied", "qwen2, lora"])
def test_scores_of_a_model_have_the_derivatives_that_torch_gives_them(
    build: str, order: Literal[1, 2], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, params, v, rollouts = setting(build)
    made = engine.directional(policy, params, v, rollouts, order=order)
    several = engine.directional_of_many(policy, params, [v, v], rollouts)
    monkeypatch.setattr(constants, "_RULES", {})
    own = engine.directional(policy, params, v, rollouts, order=order)
    for field in engine.Directional._fields[: order + 1]:
        for name in ("logp", "entropy"):
            assert torch.equal(getattr(getattr(made, field), name), getattr(getattr(own, field), name))
    again = engine.directional_of_many(policy, params, [v, v], rollouts)
    assert all(torch.equal(a.tangents.logp, b.tangents.logp) for a, b in zip(several, again, strict=True))
