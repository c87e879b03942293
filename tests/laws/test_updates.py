"""Laws of the update: what a step is as a value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from funcprobe import tree
from funcprobe.optimizers.factories import adamw, from_torch, sgd
from funcprobe.types import Optimizer, OptState, Params
from tests.cases.scored import law
from tests.cases.tables import CLOSED_FORM, OPTIMIZERS
from tests.cases.trees import assert_same, clone, gradients, leaves

every = pytest.mark.parametrize("name", OPTIMIZERS)
built_in = pytest.mark.parametrize("name", CLOSED_FORM)


def optimizer_of(name: str) -> Any:
    return OPTIMIZERS[name](leaves())


def trained(optimizer: Optimizer, dtype: torch.dtype, steps: int) -> tuple[Params, OptState, Params]:
    """Parameters and state after some steps, and the next gradient."""
    params = leaves(dtype)
    state = optimizer.init(params)
    for step in range(steps):
        params, _, state = optimizer.apply(params, state, gradients(params, step))
    return params, state, gradients(params, steps)


def in_float64(optimizer: Optimizer, params: Params, state: OptState, gradient: Params) -> Params:
    """The difference of the stored parameters, when everything is float64."""
    wide = {name: p.double() for name, p in params.items()}
    wide_state = {
        name: {key: v.double() if key != "step" else v for key, v in entries.items()} for name, entries in state.items()
    }
    after = optimizer.apply(wide, wide_state, {name: g.double() for name, g in gradient.items()}).params
    return tree.sub(after, wide)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_update_is_the_difference_in_float64(name: str, dtype: torch.dtype, steps: int) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, dtype, steps)
    update = optimizer.apply(params, state, gradient).delta
    assert list(update) == list(params)
    for leaf, wanted in in_float64(optimizer, params, state, gradient).items():
        assert update[leaf].dtype == dtype
        # The reference rounds θ + Δθ to 2^-53 of |θ| ≤ 3 a few times; a float32 update is rounded once, to 2^-24.
        kept = 2**-23 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(
            update[leaf].double(), wanted, rtol=kept, atol=2e-15, msg=lambda m, leaf=leaf: f"{leaf}: {m}"
        )


@built_in
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_update_is_affine_in_the_gradient(name: str, steps: int) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, torch.float32, steps)
    update = optimizer.apply(params, state, gradient).delta
    parts = optimizer.terms(params, state, gradient)
    assert list(parts) == list(params)
    for leaf, g in gradient.items():
        assert {x.dtype for x in parts[leaf]} == {torch.float64}
        assert {x.shape for x in parts[leaf]} == {g.shape}
        rebuilt = parts[leaf].momentum + parts[leaf].decay + parts[leaf].scale * g.double()
        # either sum is rounded to float32 once, at the end: they are the same number, or neighbours
        torch.testing.assert_close(rebuilt.float(), update[leaf], rtol=2**-23, atol=0)


@built_in
def test_the_offset_parts_vanish_with_what_they_stand_for(name: str) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, torch.float64, 2)
    zero = tree.zeros_like(params)
    for leaf, terms in optimizer.terms(zero, state, gradient).items():
        assert not bool(terms.decay.any()), f"{leaf}: weight decay acts on zero parameters"
    for leaf, terms in optimizer.terms(params, optimizer.init(params), gradient).items():
        assert not bool(terms.momentum.any()), f"{leaf}: there is no momentum before the first step"


def test_adamw_by_hand() -> None:
    theta, g, m, v, t = 2.0, -0.5, 0.3, 0.04, 4
    eta, b1, b2, eps, decay = 0.01, 0.9, 0.99, 1e-3, 0.1
    optimizer = adamw(eta, (b1, b2), eps, decay)
    as_leaf = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    state = {"w": {"step": torch.tensor(float(t)), "exp_avg": as_leaf(m), "exp_avg_sq": as_leaf(v)}}
    terms = optimizer.terms({"w": as_leaf(theta)}, state, {"w": as_leaf(g)})["w"]
    scale, momentum, weight_decay = (float(x) for x in terms)
    denom = math.sqrt((b2 * v + (1 - b2) * g * g) / (1 - b2**5)) + eps
    assert scale == pytest.approx(-eta * (1 - b1) / ((1 - b1**5) * denom), rel=1e-14)
    assert momentum == pytest.approx(-eta * b1 * m / ((1 - b1**5) * denom), rel=1e-14)
    assert weight_decay == pytest.approx(-eta * decay * theta, rel=1e-14)


@pytest.mark.parametrize("name", [*CLOSED_FORM, "rmsprop"])
@given(exponent=st.floats(-10, 0), factor=st.floats(1e-2, 1e2), seed=st.integers(0, 99))
@law
def test_the_update_is_proportional_to_the_learning_rate(name: str, exponent: float, factor: float, seed: int) -> None:
    optimizer, lr = optimizer_of(name), 10**exponent
    params, state, _ = trained(optimizer, torch.float32, 2)
    gradient = gradients(params, seed)
    small = optimizer.apply(params, state, gradient, lr).delta
    large = optimizer.apply(params, state, gradient, lr * factor).delta
    # A float32 update is rounded to 2^-24 = 6e-8. The lifted class loses 1e-16·|θ|/|Δθ| more, 1e-6 at lr 1e-10.
    tolerance = 1e-6 if name in CLOSED_FORM else 1e-5
    assert float(tree.norm(large)) == pytest.approx(factor * float(tree.norm(small)), rel=tolerance)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_moves_at_learning_rate_zero(name: str, dtype: torch.dtype) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, dtype, 2)
    found = optimizer.apply(params, state, gradient, 0.0)
    assert_same(found.params, params)
    assert not any(bool(u.any()) for u in found.delta.values())


@every
@pytest.mark.parametrize("steps", [0, 2])
def test_applying_is_pure(name: str, steps: int) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, torch.float32, steps)
    before, rng = (clone(params), clone(state), clone(gradient)), torch.get_rng_state()
    found = optimizer.apply(params, state, gradient)
    kept = tuple(clone(x) for x in found)
    assert_same(dict(enumerate((params, state, gradient))), dict(enumerate(before)))
    assert torch.equal(torch.get_rng_state(), rng)
    for leaf in (*params.values(), *gradient.values(), *(v for entries in state.values() for v in entries.values())):
        leaf.fill_(7.0)  # nothing that was returned shares storage with an argument
    assert_same(dict(enumerate(found)), dict(enumerate(kept)))
    again = tuple(clone(x) for x in before)
    for leaf in (*found.params.values(), *found.delta.values()):
        leaf.fill_(9.0)
    assert_same(dict(enumerate(before)), dict(enumerate(again)))


def test_leaves_that_require_grad_give_results_that_do_not() -> None:
    params = {name: p.requires_grad_() for name, p in leaves().items()}
    gradient = {name: g.requires_grad_() for name, g in gradients(params, 0).items()}
    for optimizer in (adamw(), sgd(0.1, 0.9), from_torch(torch.optim.RMSprop)):
        state = optimizer.init(params)
        for part in optimizer.apply(params, state, gradient):
            for leaf in part.values():
                for x in leaf.values() if isinstance(leaf, dict) else [leaf]:
                    assert not x.requires_grad
    assert all(p.grad is None for p in params.values())


@built_in
def test_the_update_is_differentiable_in_the_gradient(name: str) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, torch.float64, 2)
    weights = gradients(params, 77)
    along = gradients(params, 78)

    def total(g: Params) -> torch.Tensor:
        update = optimizer.delta(params, state, g)
        return sum(((weights[n] * update[n]).sum() for n in params), torch.zeros((), dtype=torch.float64))

    analytic = float(tree.dot(torch.func.grad(total)(gradient), along))
    # Central differences at h: truncation h²·f''' and rounding 1e-16/h, both about 1e-9 of the terms at h = 1e-5.
    h = 1e-5
    numeric = float(total(tree.axpy(h, along, gradient)) - total(tree.axpy(-h, along, gradient))) / (2 * h)
    assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-9)


class Float64Sizes(TorchDispatchMode):
    """Remembers the sizes of the float64 tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.seen.add(out.numel())
        return out


@built_in
@pytest.mark.parametrize("steps", [0, 2])
def test_chunks_change_no_bit_and_bound_the_float64_temporaries(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = optimizer_of(name)
    params, state, gradient = trained(optimizer, torch.float32, steps)
    weights, along = gradients(params, 77), gradients(params, 78)

    def results() -> dict[str, Params]:
        update = lambda g: optimizer.delta(params, state, g)  # noqa: E731
        value, pull = torch.func.vjp(update, gradient)
        pushed = torch.func.jvp(update, (gradient,), (along,))[1]
        return {"plain": update(gradient), "value": value, "pulled": pull(weights)[0], "pushed": pushed}

    whole = results()
    monkeypatch.setattr(tree, "PIECE", 4)  # leaves of 35, 24, 3 and 1 entries
    assert_same(results(), whole)
    with Float64Sizes() as sizes:
        optimizer.delta(params, state, gradient)
    assert max(sizes.seen) == 4


def test_a_leaf_without_entries_is_stepped() -> None:
    params = {"none": torch.ones(0, 2)}
    optimizer = adamw()
    assert_same(optimizer.delta(params, optimizer.init(params), params), params)


def test_adafactor_keeps_the_epsilon_of_the_stored_dtype() -> None:
    # Its default epsilon is finfo(dtype).eps. With a gradient far below it the two dtypes would step differently.
    params = {"w": torch.ones(3, 2)}
    gradient = {"w": torch.full((3, 2), 1e-9)}
    optimizer = from_torch(torch.optim.Adafactor, lr=0.1)
    found = optimizer.apply(params, optimizer.init(params), gradient)
    moved = found.params["w"].double() - params["w"].double()
    # The subtraction rounds at 2^-24 of θ = 1.
    torch.testing.assert_close(found.delta["w"].double(), moved, rtol=0.0, atol=2**-24)
