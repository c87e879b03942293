"""A module's parts as functions of the policy's leaves: bound by name, in the module's own arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from funcprobe.types import Params


@dataclass
class Skeleton:
    """The copy of a module that a policy runs."""

    module: nn.Module  #: see `copying.structural_copy`; in eval mode
    leaves: dict[int, str]  #: id of every trainable leaf -> its name
    device: torch.device  #: where the leaves are
    autocast: torch.dtype | None = None  #: under which the original runs by a forward that the copy does not have
    stateful: tuple[nn.Module, ...] = ()  #: parts that write to themselves in forward

    def remember(self, parts: Collection[str]) -> None:
        """Hold the named parts to the state that they have now: every call begins with it."""
        self.stateful = tuple(self.module.get_submodule(name) for name in sorted(parts))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run in the arithmetic of the original; attributes that parts write to themselves are gone afterwards."""
        kept = [(part, dict(part.__dict__), dict(part._buffers)) for part in self.stateful]
        low = self.autocast
        # without the cache: it would keep casts of one transform's tensors for another one's
        cast = nullcontext() if low is None else torch.autocast(self.device.type, low, cache_enabled=False)
        for part, _, buffers in kept:
            part._buffers = {n: b if b is None else b.clone() for n, b in buffers.items()}
        try:
            with cast:
                yield
        finally:
            for part, attributes, buffers in kept:
                part.__dict__.clear()
                part.__dict__.update(attributes)
                part._buffers = buffers


class Bound:
    """A submodule as a function of the policy's leaves, whatever their names are inside it (tied ones included)."""

    def __init__(self, skeleton: Skeleton, module: nn.Module) -> None:
        self.skeleton, self.module = skeleton, module
        named = module.named_parameters(remove_duplicate=False)
        self.aliases = {local: skeleton.leaves[id(p)] for local, p in named if id(p) in skeleton.leaves}

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the submodule."""
        local = {name: params[canonical] for name, canonical in self.aliases.items()}
        with self.skeleton.running():
            return functional_call(self.module, local, args, kwargs, tie_weights=False)
