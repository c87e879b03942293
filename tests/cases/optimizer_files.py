"""Optimizers of every class after some steps, their files, and what a step from a file must give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from funcprobe.checkpoints.saved_optimizer import load_optimizer
from tests.cases.trees import assert_same_state, random_like


def step(optimizer: torch.optim.Optimizer, own: dict[str, Any], seed: int) -> None:
    for name, g in random_like({n: p.detach() for n, p in own.items()}, seed).items():
        own[name].grad = g
    optimizer.step()


def plain(own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in own.items()}


def loaded(saved: dict[str, Any], own: dict[str, nn.Parameter], folder: Path) -> Any:
    torch.save(saved, folder / "optimizer.pt")
    return load_optimizer(folder / "optimizer.pt", plain(own))


def resumed(optimizer: torch.optim.Optimizer, saved: dict[str, Any], own: dict[str, nn.Parameter]) -> Any:
    """A step as a run takes it that loads the file: torch's own reading of it."""
    mine = copy.deepcopy(own)
    where = {id(p): mine[n] for n, p in own.items()}
    groups = [{**g, "params": [where[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    again = type(optimizer)(groups, **({} if isinstance(optimizer, Adafactor) else {"lr": 0.01}))
    again.load_state_dict(copy.deepcopy(saved))
    step(again, mine, 4)
    return plain(mine), {n: {k: v for k, v in again.state[p].items() if v is not None} for n, p in mine.items()}


def assert_followed(found: Any, state: Any, own: dict[str, nn.Parameter], reference: Any) -> None:
    params = plain(own)
    after = found.apply(params, state, random_like(params, 4))
    for n, p in reference[0].items():
        assert torch.equal(after.params[n], p), n
    wanted = {
        n: {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in entries.items()}
        for n, entries in reference[1].items()
    }
    assert_same_state(after.opt_state, wanted)
