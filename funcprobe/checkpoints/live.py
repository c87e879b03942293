"""A live (model, optimizer) pair in somebody's training loop, read by parameter identity and left untouched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from funcprobe.checkpoints.checkpoint import Checkpoint
from funcprobe.checkpoints.optimizer_flags import runnable
from funcprobe.checkpoints.optimizer_kind import bitsandbytes_optimizer
from funcprobe.checkpoints.optimizer_state import state_by_name
from funcprobe.errors import CheckpointError
from funcprobe.measurement.update import Update
from funcprobe.optimizers.factories import from_param_groups
from funcprobe.policy.module import from_module
from funcprobe.policy.refusals import sharding_of
from funcprobe.types import Optimizer, OptState, Params


@dataclass(frozen=True)
class LivePair(Checkpoint):
    """A checkpoint that shares storage with a model in training."""

    leaves: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)  #: the module's own, with their .grad
    module: nn.Module | None = field(default=None, repr=False)  #: the live module, unwrapped

    def update_from_grad(self, *, lr: float | None = None, max_grad_norm: float | None = None) -> Update:
        """Return the update that the optimizer is about to make of `.grad`, as it stands now.

        Between `backward()` (and clipping) and `optimizer.step()` this is that very step. A gradient that a scaler has
        multiplied has to be unscaled first. `.grad` is not copied: use the update before the trainer's own step.

        Args:
            lr: Learning rate; None takes the optimizer's.
            max_grad_norm: The global norm to which the gradients are still to be clipped; None where they were.

        Raises:
            CheckpointError: If there is no optimizer.
            InputError: If no leaf has a gradient, or a number is out of range.
        """
        optimizer, state = self._steps()
        gradient = {name: None if p.grad is None else p.grad.detach() for name, p in self.leaves.items()}
        moved = {name: g if g is None else g.to(self.params[name].device) for name, g in gradient.items()}
        return Update.from_gradient(self.policy, optimizer, self.params, state, moved, lr, max_grad_norm)

    def again(self, optimizer: torch.optim.Optimizer) -> LivePair:
        """Return the pair as it is at this moment, with the same policy: learning rates and moments are read anew.

        The copy of the module has proved itself once; this is what a training loop calls at every step.

        Raises:
            CheckpointError: If the optimizer is not that of the module, or one that is not read.
        """
        assert self.module is not None
        device = self.policy.device
        params = {name: p.detach().to(device) for name, p in self.leaves.items()}
        elsewhere = any(p.device != device for p in self.leaves.values())
        pure, state = _read(_inner(optimizer), self.module, params, device if elsewhere else None)
        return replace(self, params=params, optimizer=pure, opt_state=state)


def from_training(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, device: str | torch.device | None = None
) -> LivePair:
    """Return the checkpoint that a live pair is at this moment, for asking *before* a step is applied.

    `from_training(model, optimizer).update(objective, batch)` is the step on a batch, and `.update_from_grad()` the one
    that the optimizer is about to take.

    Names come from parameter identity and hyperparameters from `optimizer.param_groups`, so there is nothing to guess.
    A DDP or compiled wrapper round the model, and accelerate's round the optimizer, are looked through. Optimizers
    other than SGD, Adam and AdamW are lifted (`from_torch`). Leaves that have not stepped yet have an empty state.

    `params` and `opt_state` share storage with the pair: use them before the trainer's own step, or clone them. With a
    `device` other than the model's, policy, `params` and `opt_state` are copies there. The module, its flags, hooks and
    `.grad`, the optimizer and the global generators are left as they are.

    Raises:
        CheckpointError: If the optimizer misses trainable leaves or holds tensors that are not in the model, if either
            is sharded, or if the optimizer is one of bitsandbytes, apex, DeepSpeed or torchao.
    """
    module = unwrapped(model)
    policy, params = from_module(module, device=device)
    own = dict(module.named_parameters())
    leaves = {name: own[name] for name in params}
    if optimizer is None:
        return LivePair(policy, params, leaves=leaves, module=module)
    pure, state = _read(_inner(optimizer), module, params, device)
    return LivePair(policy, params, pure, state, leaves=leaves, module=module)


def _read(
    optimizer: torch.optim.Optimizer, module: nn.Module, params: Params, device: str | torch.device | None
) -> tuple[Optimizer, OptState]:
    names = {id(p): name for name, p in module.named_parameters()}
    _check_cover(optimizer, names, params)
    held = [[p for p in group["params"] if names[id(p)] in params] for group in optimizer.param_groups]
    # .get, because `optimizer.state` is a defaultdict and indexing it would insert
    entries = {id(p): optimizer.state.get(p, {}) for group in held for p in group}
    _check_package(type(optimizer), {key for entry in entries.values() for key in entry})
    listed = [[names[id(p)] for p in group] for group in held]
    state = state_by_name(entries, {i: names[i] for i in entries})
    devices = [p.device for p in params.values()]
    groups = runnable(type(optimizer), optimizer.param_groups, devices, "The optimizer")
    pure = from_param_groups(type(optimizer), groups, listed)
    ordered = {name: state[name] for name in params}
    return pure, ordered if device is None else _beside(ordered, params, groups, listed)


def _beside(
    state: OptState, params: Params, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]
) -> OptState:
    """Return the state on the devices of its leaves; `step` follows where a fused or capturable kernel wants it."""
    follows = {
        name
        for group, mine in zip(groups, names, strict=True)
        if group.get("fused") or group.get("capturable")
        for name in mine
    }
    return {
        name: {
            key: value.to(params[name].device) if key != "step" or name in follows else value
            for key, value in entries.items()
        }
        for name, entries in state.items()
    }


def _check_cover(optimizer: torch.optim.Optimizer, names: Mapping[int, str], params: Params) -> None:
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    if foreign := [p for i, p in held.items() if i not in names]:
        listed = ", ".join(str(tuple(p.shape)) for p in foreign[:4])
        raise CheckpointError(
            f"The optimizer holds {len(foreign)} tensors that are not parameters of the model (shapes {listed}): it "
            "was built on another model, or keeps sharded or master copies, which are not read. Pass the pair that "
            "belongs together, unsharded."
        )
    if missing := [name for name in params if name not in {names[i] for i in held}]:
        listed = ", ".join(f"'{name}'" for name in missing[:4])
        raise CheckpointError(
            f"The optimizer misses {len(missing)} trainable parameters of the model: {listed}. Add them to a group, or "
            "call requires_grad_(False) on what the step is not to move."
        )


def _check_package(cls: type[torch.optim.Optimizer], state_keys: set[str]) -> None:
    package = cls.__module__.partition(".")[0]
    kind = bitsandbytes_optimizer(state_keys)
    if kind or package in ("bitsandbytes", "apex", "deepspeed", "torchao"):
        raise CheckpointError(
            f"The optimizer {cls.__name__} is {kind or f'one of {package}'}, whose quantised, fused or sharded state "
            "is not read. Train with a class of torch.optim (for transformers: optim='adamw_torch' or "
            "'adamw_torch_fused')."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel and torch.compile.

    Raises:
        CheckpointError: If it is sharded.
    """
    while True:
        if sharding := sharding_of(model):
            raise CheckpointError(
                f"The model is sharded by {sharding}, which is not run from here; save a checkpoint of it, and give "
                "load_checkpoint(folder).shard(), which shares the leaves out over the same processes."
            )
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Look through accelerate's wrapper, which keeps the real optimizer in `.optimizer`.

    Raises:
        CheckpointError: If it is no torch optimizer.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CheckpointError(f"The optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    return optimizer
