"""Which optimizer wrote a state, told from its keys; what is not read is refused by its name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from funcprobe.checkpoints.optimizer_kind import optimizer_class, with_lr
from funcprobe.errors import CheckpointError, FuncprobeWarning, InputError


def stepped(cls: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = cls([p], **{"lr": 0.1, **options})  # type: ignore[arg-type]
    p.grad = torch.ones(2, 2)
    optimizer.step()
    return optimizer.state_dict()


def adam_like(state: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """An AdamW state_dict with other state keys, or group options added (None removes one)."""
    saved = stepped(torch.optim.AdamW)
    group = {**saved["param_groups"][0], **options}
    saved["param_groups"] = [{key: value for key, value in group.items() if value is not None or key not in options}]
    if state is not None:
        saved["state"] = {0: state}
    return saved


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_the_class_is_told_from_the_keys(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    assert optimizer_class(stepped(cls, **options)) is cls


def test_an_old_state_with_decay_is_read_as_adamw_with_a_warning() -> None:
    with pytest.warns(FuncprobeWarning, match="read as AdamW, which is what transformers.Trainer uses"):
        assert optimizer_class(adam_like(decoupled_weight_decay=None)) is torch.optim.AdamW


def test_an_old_state_without_decay_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer_class(adam_like(decoupled_weight_decay=None, weight_decay=0.0)) is torch.optim.AdamW


ZEROS = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (adam_like({"step": 1, "state1": ZEROS, "qmap1": ZEROS, "absmax1": ZEROS}), "an 8-bit bitsandbytes optimizer"),
        (adam_like({"step": 1, "state1": ZEROS, "state2": ZEROS}), "a paged or 32-bit bitsandbytes optimizer"),
        (adam_like({"exp_avg_sq_row": ZEROS, "exp_avg_sq_col": ZEROS, "RMS": 0.0}), "Adafactor"),
        (adam_like(bias_correction=True), "a fused Adam of apex or DeepSpeed"),
        (adam_like(adam_w_mode=True), "a fused Adam of apex or DeepSpeed"),
        (adam_like(correct_bias=True), "the AdamW of older transformers releases"),
        (adam_like({"exp_avg": ZEROS, "second_life": ZEROS}), r"state holds \['exp_avg', 'second_life'\]"),
        (adam_like(amsgrad=None, foreach=None), "not known here: its state holds"),  # Lamb and others look like this
        (adam_like(final_lr=0.1, gamma=1e-3, foreach=None), "not known here: .*'final_lr'"),
        (adam_like(momentum_decay=4e-3), "not known here: .*'momentum_decay'"),  # of another class
        (adam_like({"exp_avg_sq_row": ZEROS, "exp_avg_sq_col": ZEROS}), "neither torch's nor transformers'"),
        (torch.optim.AdamW([torch.nn.Parameter(ZEROS)]).state_dict(), "saved before the first step"),
    ],
)
def test_what_is_not_read_is_refused_by_name(saved: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        optimizer_class(saved)


def test_saved_lr_zero_is_explained() -> None:
    with pytest.raises(CheckpointError, match=r"saved in optimizer.pt is 0. It belongs .*; set lr to the rate"):
        with_lr(stepped(torch.optim.AdamW, lr=0.0), None)


def test_an_lr_is_given_to_every_group() -> None:
    saved = {"param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.0, "params": [1]}]}
    assert [g["lr"] for g in with_lr(saved, 3e-6)] == [3e-6, 3e-6]
    assert [g["lr"] for g in saved["param_groups"]] == [0.1, 0.0]


def test_a_group_saved_at_lr_zero_beside_others_is_warned_of() -> None:
    groups = [{"lr": 0.1, "params": [0]}, {"lr": 0.0, "params": [1, 2]}, {"lr": 0.0, "params": []}]
    with pytest.warns(FuncprobeWarning, match="learning rate of 0 for 2 of 3 leaves, which will not move; set lr"):
        found = with_lr({"param_groups": groups}, None)
    assert [g["lr"] for g in found] == [0.1, 0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_lr({"param_groups": groups}, 1e-3)  # moves every leaf
        with_lr({"param_groups": [groups[0], groups[2]]}, None)  # the group at 0 has no leaf


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_an_lr_out_of_range(lr: float) -> None:
    with pytest.raises(InputError, match="learning rate"):
        with_lr(stepped(torch.optim.AdamW), lr)
