"""What is written is the Trainer's layout, and reading it back gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from funcprobe.checkpoints import from_training, load_checkpoint, save_checkpoint
from funcprobe.errors import CheckpointError, InputError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import adam, adamw, sgd
from funcprobe.optimizers.groups import Group
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import Run, gpt2, lora, qwen2
from tests.cases.trees import assert_same_state, random_like


def advanced(optimizer: PureOptimizer, params: dict[str, torch.Tensor], steps: int = 2) -> tuple[Any, Any]:
    """Return parameters and state after some pure steps along random gradients."""
    state = optimizer.init(params)
    for seed in range(steps):
        params, _, state = optimizer.apply(params, state, random_like(params, seed))
    return params, state


def trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", ["full_qwen2", "full_gpt2", "adapter"])
def test_the_file_is_the_trainers(runs: dict[str, Run], which: str, tmp_path: Path) -> None:
    run = runs[which]
    live = from_training(run.model, run.optimizer)
    with third_party():
        save_checkpoint(tmp_path / "c", run.model, live.params, live.optimizer, live.opt_state, global_step=3)
    ours, theirs = (torch.load(f / "optimizer.pt", weights_only=True) for f in (tmp_path / "c", run.folder))
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    for mine, group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert mine == {key: value for key, value in group.items() if key != "initial_lr"}
    assert_same_state(ours["state"], theirs["state"])
    names = {p.name for p in run.folder.iterdir()}
    assert {p.name for p in (tmp_path / "c").iterdir()} == names - {
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    }
    keys = [set(json.loads((f / "trainer_state.json").read_text())) for f in (tmp_path / "c", run.folder)]
    assert keys[0] == keys[1]
    assert json.loads((tmp_path / "c" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize(
    "optimizer",
    [
        adamw(1e-3),
        adamw(1e-3, fused=True, amsgrad=True),
        adam(1e-3, weight_decay=0.1),
        sgd(0.1, momentum=0.9),
        sgd(0.1),
    ],
    ids=["adamw", "fused", "adam", "momentum", "sgd"],
)
@pytest.mark.parametrize("make", [gpt2, qwen2], ids=["gpt2", "qwen2"])
def test_a_round_trip_keeps_every_bit(make: Any, optimizer: PureOptimizer, tokenizer: Any, tmp_path: Path) -> None:
    module = make()
    params, state = advanced(optimizer, trainable(module))
    folder = save_checkpoint(tmp_path / "a" / "c", module, params, optimizer, state, tokenizer)
    found = load_checkpoint(folder)
    assert list(found.params) == list(params)
    assert all(torch.equal(found.params[n], params[n]) for n in params)
    assert_same_state(found.opt_state, state)
    gradient = random_like(params, 9)
    one, two = optimizer.apply(params, state, gradient), found.optimizer.apply(found.params, found.opt_state, gradient)
    assert all(torch.equal(one.params[n], two.params[n]) for n in params)
    assert found.tokenizer("w3")["input_ids"] == [3]
    assert not list(folder.parent.glob(".*")), "nothing half-written is left beside it"


def test_a_round_trip_of_an_adapter(adapter: Run, tmp_path: Path) -> None:
    module = lora(load_base(adapter), modules_to_save=["lm_head"])
    optimizer = adamw(1e-3)
    params, state = advanced(optimizer, trainable(module))
    found = load_checkpoint(save_checkpoint(tmp_path / "c", module, params, optimizer, state))
    assert all(torch.equal(found.params[n], params[n]) for n in params)
    assert_same_state(found.opt_state, state)


def load_base(run: Run) -> nn.Module:
    from transformers import Qwen2ForCausalLM

    with third_party():
        return Qwen2ForCausalLM.from_pretrained(run.base)


def test_groups_of_the_optimizers_own_survive(tmp_path: Path) -> None:
    module = gpt2()
    params = trainable(module)
    slow = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_attn.bias"]
    groups = [Group([n for n in params if n not in slow], {"lr": 1e-3}), Group(slow, {"lr": 1e-4})]
    optimizer = adamw(1e-2, groups=groups)
    params, state = advanced(optimizer, params)
    folder = save(tmp_path, module, params, optimizer, state)
    written = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
    assert [(g["lr"], len(g["params"])) for g in written] == [(1e-3, 9), (1e-4, 1), (1e-3, 16), (1e-4, 2)]
    found = load_checkpoint(folder)
    assert_same_state(found.opt_state, state)
    assert {n for g in found.optimizer.groups if g.hyperparameters["lr"] == 1e-4 for n in g.names} == set(slow)


def save(tmp_path: Path, *values: Any) -> Path:
    return save_checkpoint(tmp_path / "c", *values)


def test_module_and_params_are_left_alone(tmp_path: Path) -> None:
    module = gpt2().train()
    original = trainable(module)
    optimizer = adamw(1e-3)
    params, state = advanced(optimizer, trainable(module))
    copies = {n: p.clone() for n, p in params.items()}
    save(tmp_path, module, params, optimizer, state)
    assert module.training
    assert all(torch.equal(p, original[n]) for n, p in module.named_parameters())
    assert all(torch.equal(params[n], copies[n]) for n in params)


def test_groups_that_loading_could_not_tell_apart(tmp_path: Path) -> None:
    twins = [Group(["a", "c"]), Group(["b"], {"lr": 1e-4})]
    leaves = {n: torch.ones(2, 2) for n in "abc"}
    optimizer = adamw(1e-2, groups=twins)
    leaves, state = advanced(optimizer, leaves)
    with pytest.raises(CheckpointError, match="ambiguous"):
        save_checkpoint(tmp_path / "d", Saver(leaves), leaves, optimizer, state)
    assert not (tmp_path / "d").exists()


class Saver(nn.Module):
    """The least that can save itself."""

    def __init__(self, leaves: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            setattr(self, name, nn.Parameter(leaf.clone()))

    def save_pretrained(self, folder: str) -> None:
        raise OSError("the disk is full")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    leaves = {"a": torch.ones(2)}
    optimizer = adamw(1e-2)
    leaves, state = advanced(optimizer, leaves)
    with pytest.raises(OSError, match="disk is full"):
        save(tmp_path, Saver(leaves), leaves, optimizer, state)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").touch()
    module, optimizer = gpt2(), adamw(1e-3)
    params = trainable(module)
    with pytest.raises(CheckpointError, match="exists and is not empty; give a new folder"):
        save(tmp_path, module, params, optimizer, optimizer.init(params))


def test_params_of_another_module(tmp_path: Path) -> None:
    params, optimizer = trainable(qwen2()), adamw(1e-3)
    with pytest.raises(InputError, match="do not have the same leaves"):
        save(tmp_path, gpt2(), params, optimizer, optimizer.init(params))


def test_a_module_that_cannot_save_itself(tmp_path: Path) -> None:
    module, optimizer = nn.Linear(2, 2), adamw(1e-3)
    with pytest.raises(CheckpointError, match="A Linear cannot save itself"):
        save(tmp_path, module, trainable(module), optimizer, optimizer.init(trainable(module)))
