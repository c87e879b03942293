"""Buffers over a module's trainable leaves, keyed by name or by `id(parameter)`: one into the other, nothing lost.

Names are those of `named_parameters()`, without what a wrapper puts in front of them. A name finds its leaf as it
stands or, failing that, without the prefixes of DDP (`module.`), torch.compile (`_orig_mod.`) and PEFT
(`base_model.model.`) and without PEFT's name of the default adapter (`lora_A.default.weight` is `lora_A.weight` in
an adapter's file).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprobe import tree
from funcprobe.checkpoints.live import unwrapped
from funcprobe.errors import InputError
from funcprobe.types import Params

#: What the stateful system hands around: leaves by name, or by `id(parameter)`.
Buffer = Mapping[str, Tensor] | Mapping[int, Tensor]

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")
_ADAPTER = re.compile(r"(lora_\w+|modules_to_save)\.default(?=\.|$)")

log = logging.getLogger(__name__)


def leaves(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable leaves by name, as `from_training` names them: those of the module inside any wrapper."""
    return {name: p for name, p in unwrapped(module).named_parameters() if p.requires_grad}


def canonical(name: str) -> str:
    """Return a leaf's name without the prefixes that wrappers and adapters add to it.

    Example:
        >>> canonical("module.base_model.model.h.0.lora_A.default.weight")
        'h.0.lora_A.weight'
    """
    return _ADAPTER.sub(r"\1", _PREFIX.sub("", name))


def by_name(buffer: Buffer, module: nn.Module, *, strict: bool = True, logger: logging.Logger = log) -> Params:
    """Return a buffer, keyed by names, ids or both, keyed by names in the module's order.

    It has to hold every leaf and nothing else. With `strict=False` what is unknown is left out and what is missing
    stays missing; both are counted, and the logger is told.

    Raises:
        InputError: If nothing matches, a leaf is given twice or in another shape, or, where strict, if anything is
            unknown or missing.
    """
    known = leaves(module)
    found, unknown = _matched(buffer, known)
    missing = [name for name in known if name not in found]
    if not found:
        firsts = (
            f" (the first is {next(iter(buffer))!r}, the module's first '{next(iter(known), None)}')" if buffer else ""
        )
        raise InputError(
            f"None of the {len(buffer)} entries of the buffer is a trainable parameter of the module{firsts}; a buffer "
            "that matches nothing would be a step of 0. Pass the buffer that was made from this module."
        )
    if unknown or missing:
        counted = _counted("unknown", unknown), _counted("missing", missing)
        if strict:
            raise InputError(
                f"The buffer does not hold the module's trainable leaves: {', '.join(counted)}. Pass all of them and "
                "nothing else, or strict=False."
            )
        logger.warning("buffer: %s (ignored), %s (taken as 0)", *counted)
    ordered = {name: found[name] for name in known if name in found}
    tree.same_keys({name: known[name].detach() for name in ordered}, ordered, what="module and the buffer")
    return ordered


def by_id(buffer: Buffer, module: nn.Module, *, strict: bool = True, logger: logging.Logger = log) -> dict[int, Tensor]:
    """Return the buffer keyed by `id(parameter)`, in the module's order; see `by_name`."""
    known = leaves(module)
    return {id(known[n]): x for n, x in by_name(buffer, module, strict=strict, logger=logger).items()}


def _matched(buffer: Buffer, known: Mapping[str, nn.Parameter]) -> tuple[Params, list[str]]:
    """Return the entries that match a leaf, by its name, and the keys of those that do not.

    Raises:
        InputError: If a leaf is given twice, or a name could stand for two.
    """
    fits: dict[Any, list[str]] = {id(p): [name] for name, p in known.items()}
    for name in known:
        fits.setdefault(canonical(name), []).append(name)
    found: Params = {}
    unknown: list[str] = []
    for key, value in buffer.items():
        names = [str(key)] if key in known else fits.get(canonical(key) if isinstance(key, str) else key, [])
        if not names:
            unknown.append(str(key))
            continue
        if len(names) > 1:
            raise InputError(f"The name '{key}' fits {' as well as '.join(names)}; use the names of the module.")
        if names[0] in found:
            raise InputError(f"The buffer holds '{names[0]}' twice, the second time as {key!r}; give every leaf once.")
        found[names[0]] = torch.as_tensor(value).detach()
    return found, unknown


def _counted(what: str, names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")
