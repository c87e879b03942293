"""Implementation flags of a stored optimizer (`capturable`, `fused`, `foreach`), on a device that may not have them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from funcprobe.errors import FuncprobeWarning, listed

#: Flags that choose a kernel and depend on the device, and the value that leaves the choice to torch.
_FLAGS: dict[str, bool | None] = {"capturable": False, "fused": None, "foreach": None}


def runnable(
    cls: type[torch.optim.Optimizer],
    param_groups: Sequence[Mapping[str, Any]],
    devices: Iterable[torch.device],
    what: str = "optimizer.pt",
) -> list[dict[str, Any]]:
    """Return the groups without the implementation flags that a device does not have, and warn of those once.

    A run on a GPU may have saved `capturable=True`, which is refused on a CPU. Another kernel of the same class takes
    the same step, up to rounding.
    """
    places = list(dict.fromkeys(devices))
    lost: dict[str, torch.device] = {}
    for flag in (flag for flag in _FLAGS if any(group.get(flag) for group in param_groups)):
        for place in (place for place in places if not _runs(cls, flag, place)):
            lost[flag] = place
    if lost:
        place = next(iter(lost.values()))
        warnings.warn(
            f"{what} holds {cls.__name__} with {listed(f'{flag}=True' for flag in lost)}, which a {place.type} device "
            "does not have; its ordinary kernel is used, so the last bits of the step may differ.",
            FuncprobeWarning,
            stacklevel=4,
        )
    return [{k: _FLAGS[k] if k in lost and value else value for k, value in group.items()} for group in param_groups]


def _runs(cls: type[torch.optim.Optimizer], flag: str, device: torch.device) -> bool:
    """Return whether the class steps under this flag there; found out by a step of one entry."""
    if device.type == "meta":  # nothing is stepped there: it stands for a device that is still to come
        return True
    leaf = torch.zeros(1, 1, device=device)
    leaf.grad = torch.zeros_like(leaf)
    options: dict[str, Any] = {flag: True}
    try:
        cls([leaf], **options).step()
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError):
        return False
    return True
