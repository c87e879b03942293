"""A step is a function of values: strides of parameter, gradient and moments change no bit of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import from_torch
from funcprobe.types import OptState, Params
from tests.cases.tables import TORCH_CLASSES
from tests.cases.trees import assert_same, clone

KINDS = ("transposed", "sliced", "offset", "expanded", "overlapping", "channels_last")
CASES = [(name, kind) for name in TORCH_CLASSES for kind in KINDS if (name, kind) != ("Muon", "channels_last")]
cases = pytest.mark.parametrize(("name", "kind"), CASES)


def shape_of(kind: str) -> tuple[int, ...]:
    return (2, 3, 4, 5) if kind == "channels_last" else (4, 6)


def strange(kind: str, shape: tuple[int, ...], seed: int, moment: str = "") -> Tensor:
    """Random numbers of a shape, in a memory layout that is not the contiguous one; those of a moment are positive."""
    g = torch.Generator().manual_seed(seed)

    size = 1e-6 if moment == "grad_avg" else 1.0  # its square is subtracted from the second moment

    def draw(*shape: int) -> Tensor:
        return size * (0.5 + torch.rand(shape, generator=g)) if moment else torch.randn(shape, generator=g)

    if kind == "transposed":
        return draw(*shape[::-1]).permute(*reversed(range(len(shape))))
    if kind == "sliced":
        return draw(2 * shape[0], *shape[1:])[::2]
    if kind == "offset":
        return draw(math.prod(shape) + 3)[3:].view(shape)
    if kind == "expanded":
        return draw(1, *shape[1:]).expand(shape)
    if kind == "overlapping":
        return draw(sum(shape)).as_strided(shape, (1,) * len(shape))
    return draw(*shape).to(memory_format=torch.channels_last)


def straight(x: Any) -> Any:
    return (
        {k: straight(v) for k, v in x.items()}
        if isinstance(x, dict)
        else x.clone(memory_format=torch.contiguous_format)
    )


def warm(name: str, kind: str) -> tuple[Any, Params, OptState, Params]:
    """An optimizer with contiguous parameters, a state of two real steps, and the next gradient."""
    cls, options = TORCH_CLASSES[name]
    optimizer, shape = from_torch(cls, lr=0.03, **options), shape_of(kind)
    params = {"w": straight(strange(kind, shape, 0)), "v": straight(strange(kind, shape, 1))}
    state = optimizer.init(params)
    for seed in (2, 3):
        gradient = {"w": straight(strange(kind, shape, seed)), "v": straight(strange(kind, shape, 10 + seed))}
        params, _, state = optimizer.apply(params, state, gradient)
    return optimizer, params, state, {"w": straight(strange(kind, shape, 4)), "v": straight(strange(kind, shape, 14))}


def moments(state: OptState, shape: tuple[int, ...]) -> list[str]:
    return [key for key, value in state["w"].items() if value.dim() == len(shape) and 1 not in value.shape]


def variants(name: str, kind: str) -> list[tuple[str, Any, Params, OptState, Params]]:
    """The warm case with one of its tensors in the other layout: parameter, gradient, each moment, all of them."""
    optimizer, params, state, gradient = warm(name, kind)
    shape = shape_of(kind)
    keys = moments(state, shape)
    laid = {key: strange(kind, shape, 20 + i, key) for i, key in enumerate(keys)}
    p, g = {**params, "w": strange(kind, shape, 30)}, {**gradient, "w": strange(kind, shape, 31)}
    one = [(key, optimizer, params, {**state, "w": {**state["w"], key: laid[key]}}, gradient) for key in keys]
    every = ("all", optimizer, p, {**state, "w": {**state["w"], **laid}}, g)
    return [("parameter", optimizer, p, state, gradient), ("gradient", optimizer, params, state, g), *one, every]


def by_torch(optimizer: Any, params: Params, state: OptState, gradient: Params) -> tuple[Params, OptState]:
    """One step of the class itself on contiguous copies."""
    own = {n: torch.nn.Parameter(p) for n, p in straight(params).items()}
    (group,) = optimizer.groups
    instance = optimizer.cls([{"params": list(own.values()), **group.hyperparameters}], lr=0.03)
    for n, p in own.items():
        p.grad = straight(gradient)[n]
        instance.state[p] = straight(state[n])
    instance.step()
    return {n: p.detach() for n, p in own.items()}, {n: dict(instance.state[p]) for n, p in own.items()}


@cases
def test_strides_change_no_bit(name: str, kind: str) -> None:
    for what, optimizer, params, state, gradient in variants(name, kind):
        before = clone(params), clone(state), clone(gradient)
        strides = [x.stride() for x in (*params.values(), *gradient.values(), *state["w"].values())]
        found = optimizer.apply(params, state, gradient)
        after, state_after = by_torch(optimizer, params, state, gradient)
        assert_same(found.params, after, what)
        assert_same(found.opt_state, state_after, what)
        plain = optimizer.apply(straight(params), straight(state), straight(gradient))
        assert_same(found.delta, plain.delta, what)
        assert_same(dict(enumerate((params, state, gradient))), dict(enumerate(before)), what)
        assert strides == [x.stride() for x in (*params.values(), *gradient.values(), *state["w"].values())]


@cases
def test_strides_change_no_bit_of_the_derivative(name: str, kind: str) -> None:
    for what, optimizer, params, state, gradient in variants(name, kind):
        covector = {n: strange(kind, shape_of(kind), 40 + i).double() for i, n in enumerate(params)}
        found = optimizer.vjp(params, state, gradient, covector)
        plain = optimizer.vjp(straight(params), straight(state), straight(gradient), straight(covector))
        assert_same(found, plain, what)
        if isinstance(optimizer, PureOptimizer):
            one = optimizer.terms(params, state, gradient)
            two = optimizer.terms(straight(params), straight(state), straight(gradient))
            for n in params:
                assert_same(one[n]._asdict(), two[n]._asdict(), f"{what} {n}")


@pytest.mark.parametrize("name", ["AdamW fused", "SGD", "Adafactor"])
def test_a_stepped_parameter_keeps_a_dense_layout_and_shares_no_storage(name: str) -> None:
    for kind in KINDS:
        optimizer, params, state, gradient = warm(name, kind)
        leaf = strange(kind, shape_of(kind), 30)
        found = optimizer.apply({**params, "w": leaf}, state, gradient).params["w"]
        if kind in ("transposed", "channels_last", "offset"):
            assert found.stride() == leaf.stride()
        assert math.prod(found.shape) == found.untyped_storage().nbytes() // 4  # every entry once, and no other
        assert found.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
