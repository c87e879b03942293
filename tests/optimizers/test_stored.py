"""Laws of a step that is stored in a narrower dtype: torch's own step there, and an update that nothing rounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.measurement.move import Move
from funcprobe.objectives.losses import grpo
from funcprobe.optimizers.factories import adam, adamw, from_torch, sgd
from funcprobe.optimizers.groups import Group
from funcprobe.optimizers.stored import is_stored, storage_name, stored
from funcprobe.training.response import offsets_of, respond
from funcprobe.training.step import make_step
from funcprobe.types import Optimizer, OptState, Params
from tests.cases.scored import law
from tests.cases.trees import gradients, leaves

#: A policy of which no model is run here.
NOBODY: Any = SimpleNamespace(names=(), vocab_size=0, device="cpu")

# eps is a number of float16 where a moment may vanish in it: torch divides by it there
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 1e-3, "amsgrad": True, "eps": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4}),
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-3, "fused": True, "eps": 1e-4}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 1e-3, "foreach": True, "eps": 1e-4}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "eps": 1e-3, "momentum": 0.5}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-3, "eps": 1e-4}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
}
every = pytest.mark.parametrize("name", list(KINDS))
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def at(dtype: torch.dtype) -> Params:
    """Float32 leaves whose values are numbers of a narrower dtype."""
    return {name: p.to(dtype).float() for name, p in leaves(torch.float32).items()}


def advanced(optimizer: Optimizer, params: Params, steps: int) -> tuple[Params, OptState]:
    state = optimizer.init(params)
    for step in range(steps):
        params, _, state = optimizer.apply(params, state, gradients(params, step))
    return params, state


@every
@narrow
def test_parameters_and_state_are_those_of_the_run_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    cls, options = KINDS[name]
    params = at(dtype)
    live = {n: torch.nn.Parameter(p.to(dtype)) for n, p in params.items()}
    theirs: torch.optim.Optimizer = cls(list(live.values()), **options)  # type: ignore[call-arg]
    ours = stored(from_torch(cls, **options), dict.fromkeys(params, dtype))
    state = ours.init(params)
    for step in range(4):
        gradient = gradients(params, step)
        for n, p in live.items():
            p.grad = gradient[n].to(dtype)
        theirs.step()
        params, _, state = ours.apply(params, state, gradient)
        for n, p in live.items():
            assert params[n].dtype == torch.float32
            assert torch.equal(params[n], p.float()), (n, step)
            for key, value in theirs.state[p].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(state[n][key].double(), value.double()), (n, key, step)


@every
@narrow
@pytest.mark.parametrize("steps", [0, 2])
def test_the_update_is_float64_arithmetic_on_what_is_held(name: str, dtype: torch.dtype, steps: int) -> None:
    cls, options = KINDS[name]
    if name == "adafactor":  # its default epsilon is the dtype's own, and the run's dtype is the narrow one
        exact = from_torch(cls, **options, eps=(torch.finfo(dtype).eps, 1e-3))
    else:
        exact = from_torch(cls, **options)
    ours = stored(from_torch(cls, **options), dict.fromkeys(leaves(torch.float32), dtype))
    params, state = at(dtype), ours.init(at(dtype))
    if name != "adafactor":
        params, state = advanced(ours, params, steps)
    gradient = tree.scale(1e-3 if name == "adafactor" else 1.0, gradients(params, 7))  # small enough for its epsilon
    update = ours.apply(params, state, gradient).delta
    wide = {
        n: {k: v.double() if k not in ("step", "mu_product") else v for k, v in entries.items()}
        for n, entries in state.items()
    }
    double = {n: p.double() for n, p in params.items()}
    after = exact.apply(double, wide, {n: g.double() for n, g in gradient.items()}).params
    for n, wanted in tree.sub(after, double).items():
        assert update[n].dtype == torch.float32
        # θ + Δθ is rounded to 2^-53 of |θ| ≤ 3 a few times in the reference; the update once, to 2^-24 of itself
        torch.testing.assert_close(update[n].double(), wanted, rtol=2**-23, atol=2e-15, msg=lambda m, n=n: f"{n}: {m}")


@every
def test_storage_in_the_dtype_of_the_arithmetic_changes_nothing(name: str) -> None:
    cls, options = KINDS[name]
    plain = from_torch(cls, **options)
    params, state = advanced(plain, leaves(torch.float32), 2)
    gradient = gradients(params, 5)
    wanted = plain.apply(params, state, gradient)
    found = stored(plain, dict.fromkeys(params, torch.float32)).apply(params, state, gradient)
    for n in params:
        assert torch.equal(found.params[n], wanted.params[n])
        assert torch.equal(found.delta[n], wanted.delta[n])
    assert stored(plain, {}) is plain


@law
@given(exponent=st.integers(-14, 2), spread=st.floats(0.1, 8.0), seed=st.integers(0, 99))
def test_what_does_not_move_is_counted_as_by_hand(exponent: int, spread: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    params = {"w": (spread * torch.randn(200, generator=g)).bfloat16().float()}
    gradient = {"w": torch.randn(200, generator=g)}
    lr = 2.0**exponent
    taken = stored(sgd(lr), {"w": torch.bfloat16}).apply(params, {"w": {}}, gradient)
    size = Move.of(params, taken.params, taken.delta).size
    stuck = sum(
        torch.tensor(p).bfloat16().add(torch.tensor(x).bfloat16(), alpha=-lr).item() == p
        for p, x in zip(params["w"].tolist(), gradient["w"].tolist(), strict=True)
    )
    assert size.unmoved == stuck / 200
    off = torch.tensor(
        [
            a - p + lr * x
            for a, p, x in zip(*(v["w"].double().tolist() for v in (taken.params, params, gradient)), strict=True)
        ],
        dtype=torch.float64,
    )
    length = lr * float(gradient["w"].double().norm())
    # the update is kept in float32, off by 2^-24 of itself
    assert size.rounding_ratio == pytest.approx(float(off.norm()) / length, rel=1e-6, abs=1e-6)


def test_leaves_may_be_stored_in_different_dtypes() -> None:
    params = {"low": torch.ones(3), "high": torch.ones(3)}
    optimizer = stored(
        adamw(groups=[Group(("low",), {"lr": 1e-5}), Group(("high",), {"lr": 1e-4})], weight_decay=0.0),
        {"low": torch.bfloat16},
    )
    taken = optimizer.apply(params, optimizer.init(params), {n: torch.ones(3) for n in params})
    assert torch.equal(taken.params["low"], params["low"])  # half a unit in the last place of 1 is 2^-9
    assert bool((taken.params["high"] < 1).all())
    assert all(bool((u < 0).all()) for u in taken.delta.values())
    assert storage_name(optimizer, params) == "bfloat16, float32"
    assert is_stored(optimizer)


def test_moments_that_the_storage_does_not_hold_are_rounded_before_the_step() -> None:
    params = {"w": torch.ones(2)}
    state = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.full((2,), 1 / 3), "exp_avg_sq": torch.full((2,), 0.7)}}
    low = {"w": {k: v if k == "step" else v.bfloat16().float() for k, v in state["w"].items()}}
    optimizer, gradient = stored(adam(1e-2), {"w": torch.bfloat16}), {"w": torch.tensor([0.1, -0.2])}
    assert torch.equal(
        optimizer.apply(params, state, gradient).delta["w"], adam(1e-2).apply(params, low, gradient).delta["w"]
    )


@pytest.mark.parametrize("optimizer", [adamw(1e-3, weight_decay=0.1), sgd(1e-2, momentum=0.9)])
def test_parts_of_the_step_sum_to_the_exact_update(optimizer: Any) -> None:
    held = stored(optimizer, dict.fromkeys(leaves(torch.float32), torch.bfloat16))
    params, state = advanced(held, at(torch.bfloat16), 2)
    gradient, covector = gradients(params, 3), gradients(params, 4)
    step = make_step(NOBODY, grpo(), held, max_grad_norm=0.5)
    update = step.apply(params, state, gradient).delta
    response = respond(step.rule, params, state, gradient, covector)
    parts = float(tree.dot(response.direction, gradient)) + sum(sum(of.values()) for of in response.offsets.values())
    whole = float(tree.dot(covector, update))
    size = float(tree.norm(covector)) * float(tree.norm(update))
    assert parts == pytest.approx(whole, abs=1e-6 * size)  # u and Δθ are kept in float32, 6e-8 of each entry
    for what, of in offsets_of(step.rule, params, state, gradient).items():
        wanted = sum(response.offsets[what].values())
        assert float(tree.dot(covector, of)) == pytest.approx(wanted, abs=1e-6 * size)


def test_the_derivative_of_a_lifted_step_is_that_of_the_exact_update() -> None:
    held = stored(from_torch(torch.optim.RMSprop, lr=1e-3), dict.fromkeys(leaves(torch.float32), torch.bfloat16))
    params, state = advanced(held, at(torch.bfloat16), 2)
    gradient, covector = gradients(params, 3), gradients(params, 4)
    found = held.vjp(params, state, gradient, covector)  # type: ignore[attr-defined]
    wanted = from_torch(torch.optim.RMSprop, lr=1e-3).vjp(params, state, gradient, covector)
    assert all(torch.equal(found[n], wanted[n]) for n in params)


class _Own:
    lr = 0.1

    def init(self, params: Params) -> OptState:
        return {n: {} for n in params}

    def apply(self, *arguments: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("optimizer", "storage", "message"),
    [
        (_Own(), {"w": torch.bfloat16}, "A _Own cannot be told how its result is stored"),
        (sgd(0.1), {"w": torch.int8}, "storage dtype torch.int8 is none that weights can be stepped in"),
    ],
)
def test_what_cannot_be_stored_is_refused(optimizer: Any, storage: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stored(optimizer, storage)
