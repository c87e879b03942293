"""The numbers of nested results, each with its place, so that two results are compared one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
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


def near(place: str, expected: float, same: float) -> Any:
    """Return a number as pytest compares it, where results are the same to a relative error.

    A bar of a ratio is a spread of replicates that are 1 or so, each right to that error; the jackknife over a few
    prompts multiplies their differences by fewer than ten. The bar itself may be as small as one likes.
    """
    size = 10.0 if place.endswith("bar of ratio") else 1e-3
    return pytest.approx(expected, rel=same, abs=same * size)
