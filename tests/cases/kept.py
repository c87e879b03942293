"""Comparing what was kept with what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funcprobe.errors import Note


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal in type and to the bit, in the order of their keys."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(same(x, other[key]) for key, x in one.items())
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, Note):
        return (one.kind, str(one)) == (other.kind, str(other))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)  # which tells -0.0 from 0.0 and knows that nan is nan


def bits(x: Tensor) -> list[str]:
    return [repr(value) for value in x.flatten().tolist()]
