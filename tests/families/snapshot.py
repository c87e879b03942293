"""All that a module is, so that a change of any of it can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Snapshot(NamedTuple):
    """Every submodule's attributes, hooks and flags, and every tensor's entries; and torch's global generator."""

    found: Mapping[str, Any]
    values: Mapping[str, Tensor]
    generator: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """Look at a module."""
        found = dict(_attributes(module))
        values = {name: x.detach().clone() for name, x in found.items() if isinstance(x, Tensor)}
        return cls(found, values, torch.random.get_rng_state())

    def differences(self, module: nn.Module) -> list[str]:
        """Return the names of what is no longer as it was."""
        now = dict(_attributes(module))
        changed = sorted(now.keys() ^ self.found.keys())
        changed += [name for name in now.keys() & self.found.keys() if not _same(now[name], self.found[name])]
        for name, was in self.values.items():
            if not torch.equal(self.found[name].detach().view(-1).view(torch.uint8), was.view(-1).view(torch.uint8)):
                changed.append(f"entries of {name}")
        if not torch.equal(self.generator, torch.random.get_rng_state()):
            changed.append("torch's global generator")
        return changed


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules(remove_duplicate=False):
        for name, value in vars(part).items():
            here = f"{path or 'the module'}.{name}"
            yield here, value
            if isinstance(value, dict):
                yield from ((f"{here}[{key}]", inner) for key, inner in value.items())
                for key, inner in value.items():
                    if isinstance(inner, Tensor):
                        yield (
                            f"{here}[{key}], flags",
                            (inner.requires_grad, inner.grad is None, inner.dtype, inner.shape),
                        )
            if hasattr(value, "to_dict"):
                yield f"{here}, as text", repr(sorted(vars(value).items(), key=lambda item: item[0]))


def _same(now: Any, was: Any) -> bool:
    """Return whether a thing is the one that it was; plain values are compared, all else must be the same object."""
    plain = (bool, int, float, str, tuple, torch.dtype, torch.Size, type(None))
    return now == was if isinstance(now, plain) and type(now) is type(was) else now is was
