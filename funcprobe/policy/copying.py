"""A copy of a module's structure that shares its tensors: a policy runs it, so that the module itself is left alone.

Modules, their registries and whatever they hold are copied one by one; tensors are shared. So a module that keeps an
activation of its last pass, a lock or a file copies as well as any other, which `copy.deepcopy` refuses.
"""

from __future__ import annotations

import copy
import functools
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

#: Names under which the libraries leave an instance's own way of running in its `__dict__`.
_OWN_FORWARD = ("forward", "_old_forward", "_original_forward")


def structural_copy(
    module: nn.Module, replaced: Mapping[int, Tensor] | None = None, *, instance_forwards: bool = True
) -> nn.Module:
    """Return a copy whose modules are new objects over the same tensors, or over `replaced[id(tensor)]`.

    References between modules, tied parameters and bound methods lead into the copy. A compiled module is copied as the
    one that was compiled. Without `instance_forwards` a `forward` that was set on an instance is left out, and its
    class's runs: a closure over the original, as TRL's fused head and accelerate set one, would run the original.
    """
    tensors: dict[int, Tensor] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    copies: dict[int, Any] = {**tensors, **(replaced or {})}
    parts = list(module.modules())
    for part in parts:
        inner = uncompiled(part)
        if inner is part:
            copies[id(part)] = part.__class__.__new__(part.__class__)
    for part in parts:
        copies.setdefault(id(part), copies.get(id(uncompiled(part))))
    left_out = () if instance_forwards else _OWN_FORWARD
    for part in parts:
        if uncompiled(part) is part:
            copies[id(part)].__dict__ = {
                name: None if name == "_compiled_call_impl" else _copied(value, copies)
                for name, value in part.__dict__.items()
                if name not in left_out
            }
    made: nn.Module = copies[id(module)]
    return made


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, or the module itself."""
    while isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
        module = inner
    return module


def own_forwards(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name of the submodule, its forward) for every forward that was set on an instance."""
    for name, part in module.named_modules():
        if "forward" in part.__dict__ and uncompiled(part) is part:
            yield name, part.__dict__["forward"]


def without_training_hooks(skeleton: nn.Module) -> nn.Module:
    """Return the copy in eval mode, without the hook that checkpointing puts on embeddings.

    That hook calls `requires_grad_` on activations, which function transforms refuse and nothing here needs; in eval
    mode transformers does not checkpoint.
    """
    for part in skeleton.modules():
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del part._forward_hooks[key]
    return skeleton.eval()


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Return the copy's stand-in for a value; a value that cannot be copied is shared."""
    if id(value) in copies:
        return copies[id(value)]
    again = functools.partial(_copied, copies=copies)
    if value is None or isinstance(value, _SHARED):
        return value
    if isinstance(value, MethodType):
        return MethodType(value.__func__, again(value.__self__)) if id(value.__self__) in copies else value
    if isinstance(value, functools.partial):
        return functools.partial(again(value.func), *map(again, value.args), **_each(value.keywords, again))
    if type(value) in (list, tuple):
        return type(value)(again(x) for x in value)
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        made = copy.copy(value)
        made.update(_each(value, again))
        return made
    made_on_the_way: dict[int, Any] = {}
    try:
        made = copy.deepcopy(value, ChainMap(made_on_the_way, copies))  # type: ignore[arg-type]
    except Exception:  # a lock, a process group, an activation in somebody's container
        return value
    copies |= made_on_the_way
    return made


_SHARED = (bool, int, float, complex, str, bytes, FunctionType, type, Tensor, torch.dtype, torch.device)


def _each(mapping: Mapping[Any, Any], again: Callable[[Any], Any]) -> dict[Any, Any]:
    return {key: again(x) for key, x in mapping.items()}
