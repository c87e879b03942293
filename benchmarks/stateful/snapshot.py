"""What is kept of a live (module, optimizer) pair, and how it is put back: the price of probing by mutation.

Put back means the same tensor objects with the same bits. Whatever the step creates (moments of a fresh optimizer) is
removed again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .updates import trainable


class Snapshot:
    """Deep copies of the trainable parameters and of the whole optimizer, on a device of the caller's choice.

    On "cpu" it costs the module's device no memory; on the module's own device it costs no transfer.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
        """Copy the pair as it is now."""
        self.optimizer = optimizer
        self.parameters = {name: _Kept(p, device) for name, p in trainable(module).items()}
        self.state = {
            p: {key: _Kept(value, device) for key, value in entries.items()} for p, entries in optimizer.state.items()
        }
        self.groups = [
            {key: _Kept(value, device) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    @property
    def before(self) -> dict[str, Tensor]:
        """The values of the trainable parameters, by name."""
        return {name: kept.copy for name, kept in self.parameters.items()}

    def restore(self) -> None:
        """Put parameters, state and groups back, in place; it may be called more than once."""
        for kept in self.parameters.values():
            kept.put_back()
        live = self.optimizer.state
        for created in [p for p in live if p not in self.state]:
            del live[created]
        for p, entries in self.state.items():
            _refill(live[p], entries)
        for group, options in zip(self.optimizer.param_groups, self.groups, strict=True):
            _refill(group, options, leave="params")


@contextmanager
def undisturbed(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Evaluate without dropout and from empty gradients for a block; modes, `.grad` and generators come back after it.

    The caller's gradients are set aside, not copied: backward passes inside make tensors of their own.
    """
    modes = [(part, part.training) for part in module.modules()]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    leaves = list({id(p): p for p in [*module.parameters(), *held]}.values())
    gradients = [(p, p.grad) for p in leaves]
    accelerators = sorted({p.device.index for p in leaves if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=accelerators):
        try:
            module.eval()
            clear_gradients(module, optimizer)
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for p, gradient in gradients:
                p.grad = gradient


def clear_gradients(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Empty every `.grad` that a step or a dot product would read, and let its memory go."""
    module.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)


class _Kept:
    """One value with a copy of it; tensors are put back in place, so that who else holds them sees no change."""

    def __init__(self, value: Any, device: torch.device | str) -> None:
        self.value = value
        if isinstance(value, Tensor):  # step counts are scalars, and stay where they are
            self.copy = value.detach().to(device if value.ndim else value.device, copy=True)
        else:
            self.copy = copy.deepcopy(value)

    def put_back(self) -> Any:
        if not isinstance(self.value, Tensor):
            return copy.deepcopy(self.copy)
        with torch.no_grad():
            return self.value.copy_(self.copy)


def _refill(live: dict[str, Any], kept: dict[str, _Kept], leave: str | None = None) -> None:
    """Make a dictionary hold exactly what was kept, and what it holds under `leave`."""
    for created in [key for key in live if key not in kept and key != leave]:
        del live[created]
    for key, value in kept.items():
        live[key] = value.put_back()
