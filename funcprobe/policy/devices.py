"""Devices by name, tried before anything is put on them."""

from __future__ import annotations

import torch

from funcprobe.errors import ConfigError


def device_of(name: str) -> str:
    """Return the device of that name, where `auto` is CUDA if torch sees it.

    Raises:
        ConfigError: If torch does not know the name, or sees no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=torch.device(name)).item()  # `meta` is a device, and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise ConfigError(f"device: found '{name}', which cannot be used here ({reason}); try auto or cpu.") from None
    return name
