"""NumPy numbers in a file of tensors, such as a learning rate that a scheduler computed with NumPy, read as data.

`torch.load(weights_only=True)` refuses them, because unpickling one calls NumPy. Here the two names that such a pickle
holds stand for functions of this file, which unpack the bytes of one number and call nothing else.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from typing import Any

import torch

#: struct's letter for NumPy's name of a dtype.
_FORMATS = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}


class StoredDtype:
    """A dtype as a pickle describes it: its name and its byte order.

    Raises:
        ValueError: If it is no dtype of numbers.
    """

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        if name not in _FORMATS:
            raise ValueError(f"NumPy numbers of dtype {name!r} are not read")
        self.format, self.order = _FORMATS[name], "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def stored_number(dtype: StoredDtype, content: bytes) -> float | int:
    r"""Return the number that these bytes are, as Python's own.

    Raises:
        ValueError: If they are too many or too few.

    Example:
        >>> stored_number(StoredDtype("f8"), b"\x00\x00\x00\x00\x00\x00\xe0?")
        0.5
    """
    if len(content) != struct.calcsize(dtype.order + dtype.format):
        raise ValueError(f"a NumPy number of {len(content)} bytes is damaged")
    number: float | int = struct.unpack(dtype.order + dtype.format, content)[0]
    return number


def numpy_numbers() -> AbstractContextManager[None]:
    """Let `torch.load(weights_only=True)` read NumPy numbers inside a block."""
    names = [f"numpy.{core}.multiarray.scalar" for core in ("_core", "core")]  # NumPy 2, and 1
    readable: list[Any] = [*((stored_number, name) for name in names), (StoredDtype, "numpy.dtype")]
    return torch.serialization.safe_globals(readable)
