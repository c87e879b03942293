"""Group ids: whatever names a prompt becomes an int64 number, and a name that stands for two prompts is reported."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from funcprobe.data.ragged import Array
from funcprobe.errors import InputError

_LEAST, _LARGEST = -(2**63), 2**63 - 1


def group_names(given: Any, rows: int) -> list[Hashable]:
    """Return the group ids of B rows as they were given: one for all rows, or B of them, in any container.

    Raises:
        InputError: If there is another number of them, or one is missing, a float or a bool, or cannot be a key.

    Example:
        >>> group_names(np.array([3, 3, 4]), 3), group_names("a", 2)
        ([3, 3, 4], ['a', 'a'])
    """
    plain = given.detach().cpu() if isinstance(given, Tensor) else given
    single = isinstance(given, str | bytes | tuple) and len(given) != rows
    names = [given] if single else plain.tolist() if hasattr(plain, "tolist") else given
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        names = [names]
        single = True
    if single or getattr(given, "shape", None) == ():
        names = list(names) * rows
    if len(names) != rows:
        raise InputError(f"'group_ids' has shape ({len(names)},); expected one id, or {rows} ids, one per row.")
    names = [name.item() if isinstance(name, Tensor | np.generic) and name.ndim == 0 else name for name in names]
    for row, name in enumerate(names):
        _check(row, name)
    return names


def as_numbers(names: Sequence[Hashable]) -> Array:
    """Return the names as int64 numbers [B]: themselves if all are such integers, else by first appearance.

    Example:
        >>> as_numbers([7, -1, 7]).tolist(), as_numbers(["b", "a", "b"]).tolist()
        ([7, -1, 7], [0, 1, 0])
    """
    plain = all(isinstance(name, int) and _LEAST <= name <= _LARGEST for name in names)
    return np.array(names, dtype=np.int64) if plain else numbered(names)


def numbered(keys: Sequence[Hashable]) -> Array:
    """Return a number [B] for every key, equal for equal ones, from 0 by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def two_prompts(names: Sequence[Hashable], prompts: Sequence[Hashable]) -> str | None:
    """Return a warning where one group id carries two prompts, naming the id and both rows; None elsewhere.

    Example:
        >>> two_prompts([5, 5], ["p", "q"])[:52]
        'The group id 5 carries two prompts, those of rows 0 '
    """
    first: dict[Hashable, int] = {}
    for row, name in enumerate(names):
        other = first.setdefault(name, row)
        if prompts[row] != prompts[other]:
            return (
                f"The group id {name!r} carries two prompts, those of rows {other} and {row}: they share a baseline "
                "and count as one prompt in error bars; give every prompt an id of its own, or none at all."
            )
    return None


def _check(row: int, name: Any) -> None:
    if name is None:
        raise InputError(f"Row {row}: group_ids is None; every row needs an id, or leave group_ids out.")
    if isinstance(name, float | bool):
        kind = np.asarray(name).dtype
        raise InputError(
            f"'group_ids' holds {kind} values; expected integers, text or other keys, and row {row} has {name!r}."
        )
    try:
        hash(name)
    except TypeError:
        raise InputError(
            f"Row {row}: group_ids is a {type(name).__name__}, which cannot be a key; expected an integer, text or "
            "another hashable value, one per row."
        ) from None
