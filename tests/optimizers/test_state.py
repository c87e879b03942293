from __future__ import annotations

from typing import Any

import pytest
import torch

from funcprobe.errors import InputError
from funcprobe.optimizers.factories import adamw, from_param_groups, from_torch, sgd
from funcprobe.optimizers.groups import Group
from funcprobe.optimizers.state import state_from_torch, state_to_torch
from tests.cases.tables import TORCH_CLASSES
from tests.cases.trees import assert_same, clone, gradients, leaves

#: One of each kind of state: none, a momentum, moments with a step, a tensor a row and a column.
CLASSES = [
    (torch.optim.SGD, {}),
    *(TORCH_CLASSES[name] for name in ("SGD", "Adam fused", "AdamW", "AdamW fused", "RMSprop", "Adafactor")),
]
NAMES = [["head", "gain"], [], ["layer.2.bias", "layer.10.weight"]]
IDS = dict(enumerate(name for names in NAMES for name in names))


def step(instance: torch.optim.Optimizer, own: dict[str, torch.nn.Parameter], seed: int) -> dict[str, torch.Tensor]:
    gradient = gradients({name: p.detach() for name, p in own.items()}, seed)
    for name, p in own.items():
        p.grad = gradient[name].clone()
    instance.step()
    return gradient


def build(cls: type[torch.optim.Optimizer], options: dict[str, Any], seed: int = 0) -> Any:
    own = {name: torch.nn.Parameter(p.clone()) for name, p in leaves(seed=seed).items()}
    dicts = [{"params": [own[n] for n in names], "lr": 0.01 * (i + 1)} for i, names in enumerate(NAMES)]
    return cls(dicts, **options), own


@pytest.mark.parametrize(("cls", "options"), CLASSES)
def test_a_live_state_goes_on_purely_and_comes_back(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    instance, own = build(cls, options)
    for seed in range(3):
        step(instance, own, seed)
    stored = instance.state_dict()
    optimizer = from_param_groups(cls, stored["param_groups"], NAMES)
    state = state_from_torch(stored, IDS)
    params = {name: p.detach().clone() for name, p in own.items()}
    assert list(state) == list(IDS.values())

    returned = state_to_torch(optimizer, state)  # back to torch: the same state_dict
    assert returned["state"].keys() == stored["state"].keys()
    for i, entries in stored["state"].items():
        assert_same(returned["state"][i], entries)
    assert [g["params"] for g in returned["param_groups"]] == [[0, 1], [], [2, 3]]
    for mine, theirs in zip(returned["param_groups"], stored["param_groups"], strict=True):
        assert mine == {k: v for k, v in theirs.items() if k in mine}

    second, others = build(cls, options, seed=9)  # and a new torch optimizer that goes on from it
    second.load_state_dict(returned)
    for name, p in others.items():
        p.data.copy_(params[name])
    for seed in range(3, 6):
        gradient = step(instance, own, seed)
        step(second, others, seed)
        params, _, state = optimizer.apply(params, state, gradient)
        assert_same(params, {name: p.detach() for name, p in own.items()})
        assert_same({name: p.detach() for name, p in others.items()}, params)


def test_the_state_is_a_copy_of_the_live_one() -> None:
    instance, own = build(torch.optim.AdamW, {})
    step(instance, own, 0)
    state = state_from_torch(instance.state_dict(), IDS)
    kept = clone(state)
    step(instance, own, 1)
    assert_same(state, kept)
    back = state_to_torch(from_param_groups("AdamW", instance.param_groups, NAMES), state)
    back["state"][0]["exp_avg"].fill_(5.0)
    assert_same(state, kept)


def test_a_parameter_that_never_stepped_starts_afresh() -> None:
    instance, own = build(torch.optim.AdamW, {})
    own["gain"].requires_grad_(False)
    gradient = gradients({n: p.detach() for n, p in own.items()}, 0)
    for name, p in own.items():
        p.grad = gradient[name].clone() if name != "gain" else None
    instance.step()
    state = state_from_torch(instance.state_dict(), IDS)
    assert state["gain"] == {}
    params = {name: p.detach().clone() for name, p in own.items()}
    optimizer = from_param_groups("AdamW", instance.param_groups, NAMES)
    found = optimizer.apply(params, state, gradient)
    assert {n: float(s["step"]) for n, s in found.opt_state.items()} == {
        "layer.10.weight": 2.0,
        "layer.2.bias": 2.0,
        "head": 2.0,
        "gain": 1.0,
    }
    assert sorted(state_to_torch(optimizer, state)["state"]) == [0, 2, 3]


def test_a_group_without_names_takes_the_order_it_is_given() -> None:
    params = leaves()
    optimizer = adamw()
    state = optimizer.init(params)
    order = list(reversed(params))
    found = state_to_torch(optimizer, state, order)
    assert [found["state"][i]["exp_avg"].shape for i in range(4)] == [params[n].shape for n in order]
    instance = torch.optim.AdamW([torch.nn.Parameter(params[n].clone()) for n in order])
    instance.load_state_dict(found)
    assert state_to_torch(sgd(0.1), sgd(0.1).init(params))["state"] == {}


def test_the_state_is_moved_to_the_dtype_of_the_parameters_as_torch_does() -> None:
    narrow = leaves()
    optimizer = adamw()
    state = optimizer.apply(narrow, optimizer.init(narrow), gradients(narrow, 0)).opt_state
    wide = {name: p.double() for name, p in narrow.items()}
    own = [torch.nn.Parameter(p.clone()) for p in wide.values()]
    instance = torch.optim.AdamW(own)
    instance.load_state_dict(state_to_torch(optimizer, state))
    gradient = gradients(wide, 1)
    for p, g in zip(own, gradient.values(), strict=True):
        p.grad = g.clone()
    instance.step()
    found = optimizer.apply(wide, state, gradient).params
    assert_same(found, {name: p.detach() for name, p in zip(wide, own, strict=True)})


def test_states_that_cannot_be_read_are_refused() -> None:
    stored = {"state": {0: {"step": torch.tensor(1.0)}, 5: {"step": torch.tensor(1.0)}}}
    with pytest.raises(InputError, match="entry for parameter id 5, and names are known for 1 ids only"):
        state_from_torch(stored, {0: "a"})
    with pytest.raises(InputError, match="'history' of 'a' is a list; only numbers are read"):
        state_from_torch({"state": {0: {"history": [1, 2]}}}, {0: "a"})
    assert state_from_torch({"state": {0: {"buffer": None, "k": 3}}}, {0: "a"}) == {"a": {"k": torch.tensor(3)}}
    with pytest.raises(InputError, match="no entry for 'b', which a group of it names"):
        state_to_torch(from_torch(torch.optim.SGD, lr=0.1, groups=[Group(("a", "b"))]), {"a": {}})
