"""The numbers of nested results, each with its place, so that two results are compared one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def numbers(found: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of nested results, with its place."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from numbers(value, f"{where}/{key}")
    elif isinstance(found, torch.Tensor):
        yield from ((f"{where}[{k}]", float(x)) for k, x in enumerate(found.flatten()))
    elif isinstance(found, (list, tuple)):
        yield from ((f"{where}[{k}]", float(x)) for k, x in enumerate(found))
    else:
        yield where, float(found)
