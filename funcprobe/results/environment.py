"""Where a number was made: versions, device, threads, precision."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from funcprobe import tree
from funcprobe.types import Json, Params

_PACKAGES = ("funcprobe", "torch", "optree", "numpy", "arviz-stats", "transformers", "peft")


def describe_environment(
    device: torch.device | str = "cpu", params: Params | None = None, storage: str | None = None
) -> Json:
    """Return the versions, the device and the precision that a result was made with, as JSON-safe values.

    `dtype` is what was computed in; `storage` what the step leaves its parameters in, by default the same.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.machine() or "cpu")
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in (params or {}).values()})
    return {
        "python": platform.python_version(),
        "packages": {package: found for package in _PACKAGES if (found := _version(package)) is not None},
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(dtypes),
        "storage": ", ".join(dtypes) if storage is None else storage,
        "parameters": tree.size(params or {}),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
