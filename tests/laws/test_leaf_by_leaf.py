"""A step read leaf by leaf is the step: kept or computed at every reading, moments and gradient wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import InputError, NumericsError
from funcprobe.measurement.move import Move
from funcprobe.training.rule import Rule
from tests.cases import models
from tests.cases.probes import Case, prompted
from tests.cases.tables import OPTIMIZERS, observables
from tests.cases.trees import assert_same, gradients, leaves

E, U = prompted(8, 5, seed=1), prompted(8, 5, seed=2, first=40)
TWO = observables("entropy", "kl")

VERBS: dict[str, Callable[[fp.Update], Any]] = {
    "probe": lambda update: fp.probe(update, E, TWO, bars=None).outcome.readings,
    "path": lambda update: fp.probe(update, E, TWO, bars=None, method="path").outcome.readings,
    "reverse": lambda update: fp.probe(update, E, TWO, bars=None, mode="reverse").outcome.readings,
    "sweep": lambda update: [p.readings for p in fp.sweep(update, E, [1e-4, 1e-3], TWO, bars=None).points],
    "attribute": lambda update: fp.attribute(update, E, bars_of=(), bars=None).leaves,
    "compare": lambda update: {
        name: outcome.readings
        for name, outcome in fp.compare({"a": update, "b": update.at(1e-3)}, E, bars=None).outcomes.items()
    },
}


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "KEPT", 0)


def test_a_small_tree_is_computed_once_and_a_large_one_at_every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def compute(name: str) -> torch.Tensor:
        made.append(name)
        return torch.full((3,), float(len(name)))

    monkeypatch.setattr(tree, "KEPT", 12)  # one leaf of three float32 entries
    lazy = tree.Lazy(["a", "bb"], compute)
    assert list(lazy) == ["a", "bb"]
    assert len(lazy) == 2
    assert "a" in lazy
    assert made == []
    assert float(tree.norm(lazy)) == pytest.approx(15**0.5)
    assert_same(tree.scale(2.0, lazy), {"a": torch.full((3,), 2.0), "bb": torch.full((3,), 4.0)})
    # norm reads both sides of a product: b twice there, and once in scale
    assert made == ["a", "bb", "bb", "bb"]
    with pytest.raises(KeyError):
        lazy["c"]


@pytest.mark.parametrize("bound", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leaves_read_one_by_one_are_those_of_the_step(name: str, bound: float | None, nothing_kept: None) -> None:
    optimizer, params = OPTIMIZERS[name](leaves()), leaves()
    state = optimizer.apply(params, optimizer.init(params), gradients(params, 1)).opt_state
    rule, gradient = Rule(optimizer, bound), gradients(params, 2)
    whole, read = rule.apply(params, state, gradient, lr=1e-2), rule.lazily(params, state, gradient, lr=1e-2)
    assert_same(dict(read.delta), whole.delta)
    assert_same(dict(read.after), whole.params)
    assert read.info == whole.info


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_depends_on_what_is_kept(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(models.qwen2())
    kept = VERBS[verb](case.update(1e-3, batch=U))
    monkeypatch.setattr(tree, "KEPT", 0)
    assert repr(VERBS[verb](case.update(1e-3, batch=U))) == repr(kept)


def test_a_leaf_that_leaves_the_range_is_named() -> None:
    params = {"fine": torch.ones(3), "wide": torch.full((2,), 6e4, dtype=torch.float16)}
    delta = {"fine": torch.ones(3), "wide": torch.full((2,), 1e4)}
    after = {name: (p + delta[name]).to(p.dtype) for name, p in params.items()}
    with pytest.raises(NumericsError, match=r"stepped parameter is not finite at 'wide' \(float16\)"):
        Move.of(params, after, delta)
    with pytest.raises(NumericsError, match=r"step Δθ is not finite at 'fine' \(float32\)"):
        Move.of(params, after, {**delta, "fine": torch.tensor([1.0, torch.nan, 1.0])})


def test_a_float64_step_may_be_larger_than_its_square_is() -> None:
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    delta = {"w": torch.tensor([1e200, 0.0], dtype=torch.float64)}
    assert Move.of(params, delta, delta).size.norm == float("inf")  # and it is finite all the same: nothing is refused


def test_an_offloaded_gradient_is_the_gradient() -> None:
    case = Case(models.qwen2())
    cut: Any = {"policy": case.policy, "objective": fp.grpo(), "optimizer": fp.adamw(1e-3), "microbatch": 3}
    steps = [fp.make_step(**cut, offload=where) for where in (None, "cpu")]
    (one, info), (other, same) = (step.gradient(case.params, U) for step in steps)
    assert_same(dict(other), dict(one))
    assert same == info
    with pytest.raises(InputError, match="offload is 'disk'; expected 'cpu', or None"):
        fp.make_step(**cut, offload="disk")
