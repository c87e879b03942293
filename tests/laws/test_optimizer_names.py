"""Every class of torch.optim in a file that has names, under the prefixes that wrappers leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from funcprobe.checkpoints import from_training, load_checkpoint
from funcprobe.errors import CheckpointError
from tests.cases.optimizer_files import assert_followed, loaded, plain, resumed, step
from tests.cases.trainer_runs import qwen2, train
from tests.cases.trees import assert_same_state, random_like


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(6, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 6, bias=False)


def named(cls: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A state that goes by names, as torch gathers it for FSDP."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    torch.manual_seed(0)
    model = Wrapped()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = cls([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=0.01)  # type: ignore[call-arg]
    for seed in (2, 3):
        step(optimizer, dict(model.named_parameters()), seed)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return model, optimizer, saved


def renamed(saved: dict[str, Any], rename: Any) -> dict[str, Any]:
    groups = [{**g, "params": [rename(n) for n in g["params"]]} for g in saved["param_groups"]]
    return {"state": {rename(n): entry for n, entry in saved["state"].items()}, "param_groups": groups}


PREFIXES: dict[str, Any] = {
    "none": lambda n: n,
    "ddp": lambda n: f"module.{n}",
    "compiled ddp": lambda n: f"module._orig_mod.{n}",
    "fsdp": lambda n: "_fsdp_wrapped_module." + n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."),
    "checkpointed": lambda n: n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "all": lambda n: f"module._orig_mod._fsdp_wrapped_module.{n}".replace("s.0.", "s.0._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_state_that_goes_by_names(cls: type[torch.optim.Optimizer], prefix: str, tmp_path: Path) -> None:
    model, optimizer, saved = named(cls)
    own = dict(model.named_parameters())
    found, state = loaded(renamed(saved, PREFIXES[prefix]), own, tmp_path)
    assert_followed(found, state, own, resumed(optimizer, optimizer.state_dict(), own))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_numbers_with_names_beside_them(prefix: str, tmp_path: Path) -> None:
    model, _, _ = named(torch.optim.AdamW)
    own = dict(model.named_parameters())
    order = list(own)[::-1]  # an order that shapes alone would not allow
    optimizer = torch.optim.AdamW([(PREFIXES[prefix](n), own[n]) for n in order], lr=0.01)
    step(optimizer, own, 2)
    saved = optimizer.state_dict()
    assert "param_names" in saved["param_groups"][0]
    found, state = loaded(saved, own, tmp_path)
    after = found.apply(plain(own), state, random_like(plain(own), 4)).params
    step(optimizer, own, 4)
    assert all(torch.equal(after[n], p.detach()) for n, p in own.items())


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, _, saved = named(torch.optim.AdamW)
    own = dict(model.named_parameters())
    odd = renamed(saved, lambda n: n.replace("head", "score"))
    with pytest.raises(CheckpointError, match=r"goes by names, and 'score.weight' is no .*'head.weight' has no entry"):
        loaded(odd, own, tmp_path)
    saved["state"]["head.weight"]["exp_avg"] = torch.zeros(2, 2)
    saved["state"]["head.weight"]["exp_avg_sq"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"The state of 'head.weight' in optimizer.pt has shape \(2, 2\)"):
        loaded(saved, own, tmp_path)


def test_a_module_of_that_name_is_no_wrapper(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 3)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    own = dict(model.named_parameters())
    step(optimizer, own, 2)
    saved = optimizer.state_dict()
    names = dict(enumerate(own))
    by_name = renamed(saved, names.__getitem__)
    found, state = loaded(by_name, own, tmp_path)
    assert_followed(found, state, own, resumed(optimizer, saved, own))


@pytest.mark.parametrize("optim", ["adafactor", "rmsprop", "adagrad"])
def test_a_trainer_folder_of_another_optimizer(optim: str, tmp_path: Path) -> None:
    run_ = train(qwen2(tie_word_embeddings=True), tmp_path, optim=optim)
    live, saved = from_training(run_.model, run_.wrapped), load_checkpoint(run_.folder, lr=1e-3)
    assert saved.optimizer is not None
    assert type(saved.optimizer) is type(live.optimizer)
    assert saved.optimizer.cls is type(run_.optimizer)  # type: ignore[attr-defined]
    gradient = random_like(live.params)
    one = live.optimizer.apply(live.params, live.opt_state, gradient, lr=1e-3)  # type: ignore[union-attr]
    two = saved.optimizer.apply(saved.params, saved.opt_state or {}, gradient)
    assert all(torch.equal(one.params[n], two.params[n]) for n in saved.params)
    assert_same_state(two.opt_state, one.opt_state)
