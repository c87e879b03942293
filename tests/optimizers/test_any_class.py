"""Any other optimizer class is run itself, and steps as it does by itself, bit for bit."""

from typing import Any

import pytest
import torch

from funcprobe.errors import InputError
from funcprobe.optimizers.any_class import LiftedOptimizer
from funcprobe.optimizers.factories import from_torch
from tests.cases.live_optimizers import Counting, assert_parity, live
from tests.cases.trees import assert_same, gradients, leaves

#: Classes that are run themselves. Muon takes matrices only.
OTHERS = [
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.ASGD,
    torch.optim.Rprop,
    torch.optim.Adafactor,
]


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_other_class_is_lifted(cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    params = leaves(dtype)
    optimizer = from_torch(cls, lr=0.03)
    assert isinstance(optimizer, LiftedOptimizer)
    assert_parity(optimizer, *live(cls, params, {"lr": 0.03}), params)


def test_muon_is_lifted_on_matrices() -> None:
    params = {name: p for name, p in leaves().items() if p.dim() == 2}
    assert_parity(from_torch(torch.optim.Muon, lr=0.03), *live(torch.optim.Muon, params, {"lr": 0.03}), params)


def test_a_third_party_class_is_lifted_with_its_python_numbers() -> None:
    params = leaves()
    optimizer, (instance, own) = from_torch(Counting, lr=0.5), live(Counting, params, {"lr": 0.5})
    state = optimizer.init(params)
    for step in range(3):
        gradient = gradients(params, step)
        for name, p in own.items():
            p.grad = torch.empty_like(p).copy_(gradient[name])  # in the layout of its leaf, as autograd leaves it
        instance.step()
        params, _, state = optimizer.apply(params, state, gradient)
        assert_same(params, {name: p.detach() for name, p in own.items()})
    assert {k: v.dtype for k, v in state["head"].items()} == {
        "step": torch.int64,
        "total": torch.float64,
        "rows": torch.float32,
    }
    assert int(state["head"]["step"]) == 3


def test_a_class_that_draws_random_numbers_leaves_the_global_generator_alone() -> None:
    params, before = leaves(), torch.get_rng_state()
    optimizer = from_torch(Counting, lr=0.5, noise=1.0)
    found = optimizer.apply(params, optimizer.init(params), gradients(params, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(optimizer.apply(params, optimizer.init(params), gradients(params, 0)).params, found.params)


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_classes_that_need_more_than_a_gradient_are_refused(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(InputError, match=r"LBFGS evaluates the loss through a closure|SparseAdam takes sparse"):
        from_torch(cls, lr=0.1)


def test_what_is_no_optimizer_is_refused() -> None:
    class NoRate(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            torch.optim.Optimizer.__init__(self, params, {})

    with pytest.raises(InputError, match=r"takes a torch\.optim\.Optimizer class"):
        from_torch(torch.nn.Linear, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NoRate has no hyperparameter 'lr'"):
        from_torch(NoRate)
