"""Which classes could have written an optimizer state: told from the options of its groups and the keys of its state.

The options are held against the arguments of a class, the keys against those that a step of it under these options
really leaves. Nothing is listed by hand, so a class that torch adds is known with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funcprobe.errors import InputError
from funcprobe.optimizers.any_class import refuse
from funcprobe.optimizers.groups import IMPLEMENTATION, NOTES

Class = type[torch.optim.Optimizer]


def fitting(param_groups: Sequence[Mapping[str, Any]], state_keys: set[str]) -> list[Class]:
    """Return the classes of torch.optim, and transformers' Adafactor, that a state could be of.

    AdamW is left out where Adam stands: they differ in one option, which is read elsewhere. Options beyond those of a
    class are let pass if no class has them and the group bears torch's own flag `foreach`, or the class's own names:
    copies of torch's classes made elsewhere, with options of their own, are other optimizers.
    """
    options = {str(key) for group in param_groups for key in group} - NOTES - {"params"}
    every = [cls for cls in _classes(options) if cls is not torch.optim.AdamW]
    known = set().union(*(_options(cls) for cls in every))
    return [
        cls
        for cls in every
        if _required(cls) <= options
        and not (options - _options(cls)) & known
        and (options <= _options(cls) or "foreach" in options or "foreach" not in _options(cls))
        and state_keys <= _written(cls, param_groups)
    ]


def _classes(options: set[str]) -> list[Class]:
    """Return the optimizer classes that are looked at; transformers is imported only where no other class fits."""
    found = [cls for cls in vars(torch.optim).values() if _steps(cls)]
    if {"scale_parameter", "relative_step", "clip_threshold"} <= options:
        from transformers.optimization import Adafactor

        found.append(Adafactor)
    return found


def _steps(cls: Any) -> bool:
    if cls is torch.optim.Optimizer:
        return False
    try:
        refuse(cls)
    except InputError:
        return False
    return True


def _options(cls: Class) -> frozenset[str]:
    """Return the options that a group of the class bears."""
    make: Any = cls  # the base class asks for defaults, which these have themselves
    made: dict[str, Any] = make([torch.zeros(1, 1, requires_grad=True)]).param_groups[0]
    return frozenset(made) - NOTES - {"params"}


def _required(cls: Class) -> set[str]:
    """Return the options that every group of the class must bear, whatever version wrote it."""
    later = IMPLEMENTATION if cls in (torch.optim.Adam, torch.optim.SGD) else IMPLEMENTATION - {"foreach"}
    return {key for key in inspect.signature(cls).parameters if key != "params"} - later


def _written(cls: Class, param_groups: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that a step under the options of these groups leaves: of a matrix, and of a vector if it may be.

    A class that refuses the options leaves none.
    """
    make: Any = cls
    keys: set[str] = set()
    for group in param_groups:
        taken = {k: v for k, v in group.items() if k in _options(cls) and k not in IMPLEMENTATION}
        taken |= {} if taken.get("lr") is None else {"lr": 1.0}
        for shape in ((2, 2), (2,)):
            leaf = torch.zeros(shape)
            leaf.grad = torch.zeros_like(leaf)
            try:
                instance = make([{"params": [leaf], **taken}])
                instance.step()
            except (TypeError, ValueError, RuntimeError):
                continue
            keys |= {str(key) for key, value in instance.state[leaf].items() if value is not None}
    return keys
