"""Lists of rows of different lengths as one flat array and the lengths: common to lists, parquet and padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from funcprobe.errors import InputError

#: A numpy array of any dtype.
Array = NDArray[Any]


class Ragged(NamedTuple):
    """B rows of different lengths, laid end to end."""

    values: Array  #: [sum of lengths], the rows one after the other
    lengths: Array  #: [B] int64


def ragged_from_lists(rows: Sequence[Any], what: str, dtype: type) -> Ragged:
    """Return the rows (lists, arrays or tensors) end to end, as int, bool or float; None in a float row becomes NaN.

    Raises:
        InputError: Naming the first row that is not one-dimensional or not of numbers of the expected kind.

    Example:
        >>> ragged_from_lists([[5, 6], [7]], "prompts", int).lengths
        array([2, 1])
    """
    if isinstance(rows, str | bytes) or not hasattr(rows, "__len__"):
        raise InputError(f"'{what}' is {type(rows).__name__}; expected a list with one row of numbers per sequence.")
    arrays = [_row(row, f"{what}, row {number}", dtype) for number, row in enumerate(rows)]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return Ragged(np.concatenate([*arrays, np.zeros(0, dtype)]), lengths)


def ragged_from_dense(dense: Array, mask: Array) -> Ragged:
    """Return the entries of `dense` [B, L] where `mask` is True, row by row, whichever side the padding is on."""
    return Ragged(dense[mask], mask.sum(axis=1, dtype=np.int64))


def pad(ragged: Ragged, width: int, dtype: Any) -> Array:
    """Return the rows as a right-padded [B, width] array, 0 in the padding.

    Example:
        >>> pad(Ragged(np.array([5, 6, 7]), np.array([2, 1])), 2, np.int64)
        array([[5, 6],
               [7, 0]])
    """
    dense = np.zeros((len(ragged.lengths), width), dtype=dtype)
    dense[columns(width) < ragged.lengths[:, None]] = ragged.values
    return dense


def columns(width: int) -> Array:
    """Return the column numbers 0..width-1 as [1, width], for comparison with per-row lengths."""
    return np.arange(width, dtype=np.int64)[None, :]


def to_array(value: Any, what: str) -> Array:
    """Return a tensor, array or nested list as a numpy array; floating tensors become float64 (numpy has no bfloat16).

    Raises:
        InputError: If the rows of a nested list have different lengths, or entries are no numbers.
    """
    if isinstance(value, Tensor):
        if value.is_meta or value.is_complex() or value.layout != torch.strided:
            raise InputError(f"'{what}' is a tensor without plain numbers (meta, complex or sparse); expected numbers.")
        tensor = value.detach().cpu()
        return np.asarray((tensor.double() if tensor.is_floating_point() else tensor).numpy())
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"'{what}' does not form an array ({error}); give rows of equal length.") from None
    if array.dtype == object:
        array = _objects_to_float(array, what)
    if array.dtype.kind not in "biuf":
        raise InputError(f"'{what}' holds {array.dtype} values; expected numbers.")
    return array


def as_dtype(array: Array, what: str, dtype: type) -> Array:
    """Return the numbers as int64, float64 or bool, where that loses nothing.

    Raises:
        InputError: If integers were wanted and these are none, or if a mask holds anything but 0 and 1.
    """
    if array.size and dtype is int and array.dtype.kind not in "iu":
        raise InputError(f"'{what}' holds {array.dtype} values; expected integers.")
    if dtype is int and array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"'{what}' holds {int(array.max())}, which is no 64-bit integer; expected smaller numbers.")
    if dtype is bool and not np.isin(array, (0, 1)).all():
        raise InputError(f"'{what}' holds values other than 0 and 1; expected a mask.")
    return array.astype(dtype)


def _row(row: Any, what: str, dtype: type) -> Array:
    if dtype is not float and isinstance(row, list | tuple):
        for position in [position for position, entry in enumerate(row) if entry is None][:1]:
            expected = (
                "float64 values; expected integers" if dtype is int else "values other than 0 and 1; expected a mask"
            )
            raise InputError(f"'{what}' holds {expected}, and position {position} is null.")
    array = to_array(row, what)
    if dtype is int and array.ndim == 1 and array.dtype.kind == "f" and array.size:
        listed = row if isinstance(row, list | tuple) else array.tolist()
        position, entry = next((at, x) for at, x in enumerate(listed) if isinstance(x, float) or abs(int(x)) >= 2**63)
        raise InputError(
            f"'{what}' holds {array.dtype} values; expected integers of 64 bits, and position {position} is {entry}."
        )
    if array.ndim != 1:
        raise InputError(f"'{what}' has {array.ndim} dimensions; expected a flat list with one number per token.")
    return as_dtype(array, what, dtype)


def _objects_to_float(array: Array, what: str) -> Array:
    # None becomes NaN, which validation then reports where it matters.
    if any(isinstance(entry, str | bytes | bool) for entry in array.flat):
        raise InputError(f"'{what}' holds entries that are no numbers; expected numbers.")
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"'{what}' holds entries that are no numbers; expected numbers.") from None
