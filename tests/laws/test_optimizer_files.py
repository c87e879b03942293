"""Every class of torch.optim, and transformers' Adafactor, in a file: recognised, mapped, stepped to the same bits."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from funcprobe.checkpoints import from_training, optimizer_flags
from funcprobe.checkpoints.numpy_numbers import numpy_numbers
from funcprobe.checkpoints.optimizer_kind import optimizer_class
from funcprobe.checkpoints.saved_optimizer import load_optimizer
from funcprobe.errors import CheckpointError, FuncprobeWarning, InputError
from funcprobe.optimizers.any_class import LiftedOptimizer
from funcprobe.optimizers.closed_form import PureOptimizer
from tests.cases.optimizer_files import assert_followed, loaded, plain, resumed, step
from tests.cases.trees import random_like

FIXED = {"lr": 0.01, "relative_step": False, "scale_parameter": False}


#: Classes with options that decide which state they keep.
CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    (torch.optim.RAdam, {}),
    (torch.optim.RAdam, {"decoupled_weight_decay": True}),
    (torch.optim.Adamax, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Muon, {}),
    (Adafactor, FIXED),
    (Adafactor, {**FIXED, "beta1": 0.9, "scale_parameter": True}),
]


cases = pytest.mark.parametrize(("cls", "options"), CASES)


MATRICES = {"embed": (6, 4), "up": (4, 5), "head": (5, 6)}


def leaves(cls: type) -> dict[str, nn.Parameter]:
    """Matrices, with vectors among them where the class takes those."""
    shapes: dict[str, tuple[int, ...]] = dict(MATRICES)
    if cls is not torch.optim.Muon:
        shapes = {"embed": (6, 4), "norm": (4,), "up": (4, 5), "bias": (5,), "head": (5, 6)}
    return {n: nn.Parameter(v) for n, v in random_like({n: torch.empty(s) for n, s in shapes.items()}, 1).items()}


def run(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> tuple[dict[str, nn.Parameter], Any]:
    """The leaves and the optimizer after two steps, matrices in one group and vectors in another."""
    own = leaves(cls)
    split = [[p for p in own.values() if (p.dim() == 2) == matrix] for matrix in (True, False)]
    groups = [{"params": part} for part in split if part]
    if cls is not torch.optim.Rprop:
        groups[0]["weight_decay"] = 0.1  # type: ignore[assignment]
    optimizer = cls(groups, **{"lr": 0.01, **options})
    for seed in (2, 3):
        step(optimizer, own, seed)
    return own, optimizer


@cases
def test_a_file_is_read_as_torch_reads_it(cls: type[torch.optim.Optimizer], options: Any, tmp_path: Path) -> None:
    own, optimizer = run(cls, options)
    saved = optimizer.state_dict()
    assert optimizer_class(saved) is cls
    found, state = loaded(saved, own, tmp_path)
    assert isinstance(found, PureOptimizer | LiftedOptimizer)
    assert found.cls is cls
    assert_followed(found, state, own, resumed(optimizer, saved, own))


def test_what_several_classes_could_have_written_is_refused() -> None:
    saved = run(torch.optim.RAdam, {})[1].state_dict()
    for group in saved["param_groups"]:
        del group["decoupled_weight_decay"]
    assert optimizer_class(saved) is torch.optim.RAdam
    saved["state"] = {i: {"step": entry["step"]} for i, entry in saved["state"].items()}
    with pytest.raises(
        CheckpointError, match=r"could be of (Adamax or RAdam|RAdam or Adamax), whose options and state"
    ):
        optimizer_class(saved)


@pytest.mark.parametrize("cls", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adafactor])
def test_a_file_from_before_the_first_step_is_refused(cls: type[torch.optim.Optimizer]) -> None:
    saved = cls(list(leaves(cls).values()), lr=0.1).state_dict()  # type: ignore[call-arg]
    with pytest.raises(CheckpointError, match="saved before the first step"):
        optimizer_class(saved)


def test_a_rate_made_from_the_step_is_refused(tmp_path: Path) -> None:
    own = leaves(Adafactor)
    optimizer = Adafactor(list(own.values()))
    step(optimizer, own, 2)
    with pytest.raises(CheckpointError, match=r"holds no learning rate: .*relative_step=False"):
        loaded(optimizer.state_dict(), own, tmp_path)
    with pytest.raises(InputError, match="relative_step"):
        load_optimizer(tmp_path / "optimizer.pt", plain(own), lr=1e-3)


def flagged(saved: dict[str, Any], **flags: Any) -> dict[str, Any]:
    return {**saved, "param_groups": [{**g, **flags} for g in saved["param_groups"]]}


CAPTURABLE = [case for case in CASES if "capturable" in case[0]([nn.Parameter(torch.zeros(1, 1))]).param_groups[0]]


@pytest.mark.parametrize(("cls", "options"), CAPTURABLE)
def test_a_flag_of_another_device_falls_back_with_a_word(
    cls: type[torch.optim.Optimizer], options: Any, tmp_path: Path
) -> None:
    own, optimizer = run(cls, options)
    saved = optimizer.state_dict()
    with pytest.warns(
        FuncprobeWarning, match=rf"{cls.__name__} with capturable=True, which a cpu device does not"
    ) as w:
        found, state = loaded(flagged(saved, capturable=True), own, tmp_path)
    assert len(w) == 1
    assert_followed(found, state, own, resumed(optimizer, saved, own))


def test_every_flag_that_is_lost_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, optimizer = run(torch.optim.AdamW, {})
    saved = optimizer.state_dict()
    monkeypatch.setattr(optimizer_flags, "_runs", lambda cls, flag, device: False)
    with pytest.warns(FuncprobeWarning, match="with capturable=True, fused=True, which a cpu device"):
        found, state = loaded(flagged(saved, fused=True, capturable=True), own, tmp_path)
    assert_followed(found, state, own, resumed(optimizer, saved, own))


@pytest.mark.parametrize("flag", ["fused", "foreach", "differentiable"])
def test_a_flag_that_the_device_has_stays(flag: str, tmp_path: Path) -> None:
    own, optimizer = run(torch.optim.AdamW, {flag: True} if flag != "differentiable" else {})
    saved = flagged(optimizer.state_dict(), **{flag: True})
    found, _ = loaded(saved, own, tmp_path)
    assert all(group.hyperparameters[flag] is True for group in found.groups)


def test_a_live_flag_of_another_device_falls_back_too() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for group in optimizer.param_groups:
        group["capturable"] = True
    with pytest.warns(FuncprobeWarning, match="The optimizer holds AdamW with capturable=True"):
        found = from_training(model, optimizer)
    assert found.optimizer is not None
    found.optimizer.apply(found.params, found.optimizer.init(found.params), random_like(found.params))


COUNTED = [case for case in CASES if case[0] not in (torch.optim.SGD, torch.optim.Muon, Adafactor)]


@pytest.mark.parametrize("kind", ["int", "int64", "numpy"])
@pytest.mark.parametrize(("cls", "options"), COUNTED)
def test_a_step_count_of_another_type(
    cls: type[torch.optim.Optimizer], options: Any, kind: str, tmp_path: Path
) -> None:
    own, optimizer = run(cls, options)
    saved = optimizer.state_dict()
    changed = copy.deepcopy(saved)
    for entry in changed["state"].values():
        entry["step"] = {"int": int, "int64": lambda x: x.long(), "numpy": lambda x: np.int64(int(x))}[kind](
            entry["step"]
        )
    found, state = loaded(changed, own, tmp_path)
    assert_followed(found, state, own, resumed(optimizer, saved, own))


def test_numbers_of_numpy_in_a_file(tmp_path: Path) -> None:
    own, optimizer = run(torch.optim.AdamW, {})
    saved = optimizer.state_dict()
    changed = flagged(saved, lr=np.float64(0.01), eps=np.float64(1e-8), betas=(np.float64(0.9), np.float64(0.999)))
    found, state = loaded(changed, own, tmp_path)
    assert type(found.lr) is float
    assert_followed(found, state, own, resumed(optimizer, saved, own))


def reread(value: Any) -> Any:
    file = io.BytesIO()
    torch.save({"value": value}, file)
    file.seek(0)
    with numpy_numbers():
        return torch.load(file, weights_only=True)["value"]


@pytest.mark.parametrize(
    "dtype", ["f8", "f4", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", ">f8", ">i4"]
)
def test_numpy_numbers_are_read_as_they_are(dtype: str) -> None:
    for number in (0, 1, 3.25, 100):
        value = np.array(number).astype(dtype)[()]
        assert reread(value) == value.item()
        assert type(reread(value)) is type(value.item())


@pytest.mark.parametrize("value", [np.ones(2), np.complex64(1), np.array("x")[()], np.datetime64("2020-01-01")])
def test_other_things_of_numpy_are_not(value: Any, tmp_path: Path) -> None:
    own, optimizer = run(torch.optim.AdamW, {})
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors and containers"):
        loaded(flagged(optimizer.state_dict(), note=value), own, tmp_path)


@pytest.mark.parametrize("lr", [np.float32(0.01), np.float64(0.01), np.array(0.01), torch.tensor(0.01)])
def test_a_live_learning_rate_of_another_type(lr: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for group in optimizer.param_groups:
        group["lr"] = lr
    found = from_training(model, optimizer).optimizer
    assert found is not None
    assert type(found.lr) is float
    assert all(type(group.hyperparameters["lr"]) is float for group in found.groups)  # type: ignore[attr-defined]
    assert found.lr == float(lr)


@pytest.mark.parametrize("extra", [{"lr_scale": 0.5}, {"layer": 3, "name": "decayed"}, {"anything": "else"}])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Muon])
def test_keys_that_a_class_does_not_read_are_named_and_left_out(cls: Any, extra: Any, tmp_path: Path) -> None:
    own, optimizer = run(cls, {"momentum": 0.5} if cls is torch.optim.SGD else {})
    saved = optimizer.state_dict()
    with pytest.warns(
        FuncprobeWarning, match=f"groups hold {', '.join(extra)}, which torch.optim.{cls.__name__} does not"
    ):
        found, state = loaded(flagged(saved, **extra), own, tmp_path)
    assert not any(key in group.hyperparameters for group in found.groups for key in extra)
    assert_followed(found, state, own, resumed(optimizer, saved, own))


def test_keys_of_schedulers_are_no_matter(tmp_path: Path) -> None:
    own, optimizer = run(torch.optim.SGD, {"momentum": 0.9})
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    optimizer.step()
    loaded(optimizer.state_dict(), own, tmp_path)  # warns of nothing: warnings are errors here


class Scaled(torch.optim.SGD):
    """A class from elsewhere, whose step reads a key of its groups that its constructor does not take."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * group.get("scale", 1.0) * p.grad)


def test_a_class_from_elsewhere_keeps_its_keys() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    optimizer = Scaled([{"params": list(model.parameters()), "scale": 0.25}], lr=0.1)
    found = from_training(model, optimizer)
    assert found.optimizer is not None
    gradient = random_like(found.params)
    after = found.optimizer.apply(found.params, found.opt_state or {}, gradient).params
    for n, p in model.named_parameters():
        p.grad = gradient[n].clone()
    optimizer.step()
    assert all(torch.equal(after[n], p.detach()) for n, p in model.named_parameters())
