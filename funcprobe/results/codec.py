"""A typed codec: values that are made of dataclasses, NamedTuples, mappings, tuples and tensors, as strict JSON.

It walks the type hints, so that no class has a reader and a writer of its own. What is encoded is decoded to an equal
value of the same types: tuples stay tuples, keys stay numbers, a note keeps its kind, and numbers that are not finite
are written as words. Tensors go beside the JSON, or into it (`Inline`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from funcprobe.errors import Note

#: Metadata of a dataclass field that is not kept: a loaded value has its default there.
NOT_KEPT = {"kept": False}

#: Types that one JSON value, or a note's two, stand for.
_SCALARS = (float, str, int, bool, Note, Literal)

#: Numbers that are not finite, as JSON holds them.
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class DamagedError(ValueError):
    """Plain values that no value of the type was encoded to; the message names the field and its fault."""


class Arrays(Protocol):
    """Where tensors are kept."""

    def put(self, name: str, x: Tensor) -> Any:
        """Keep a tensor, and return its place in JSON."""
        ...

    def get(self, plain: Any) -> Tensor:
        """Return the tensor that JSON holds this in the place of."""
        ...


class Inline:
    """Tensors as lists within the JSON, for few and small ones."""

    def put(self, name: str, x: Tensor) -> Any:
        """Return dtype, shape and numbers of a tensor."""
        numbers = [_encoded_number(value) for value in x.detach().cpu().flatten().tolist()]
        return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "numbers": numbers}

    def get(self, plain: Any) -> Tensor:
        """Return the tensor.

        Raises:
            DamagedError: If there is none.
        """
        try:
            numbers = [_WORDS[value] if isinstance(value, str) else value for value in plain["numbers"]]
            return torch.tensor(numbers, dtype=getattr(torch, plain["dtype"])).reshape(plain["shape"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DamagedError(f"no tensor ({error})") from error


def encode(value: Any, hint: Any, arrays: Arrays, at: str = "") -> Any:
    """Return a value of a type as JSON-safe values; `at` is its place, after which arrays are named.

    Raises:
        TypeError: If the value is of a type that cannot be kept.
    """
    kind, arguments = _shape(hint)
    if kind is Any:
        return _encoded_json(value, at)
    if value is None:
        return None
    if kind is Tensor:
        return arrays.put(at, value)
    if kind is float:
        return _encoded_number(value)
    if kind is Note:
        return {"kind": value.kind if isinstance(value, Note) else "", "text": str(value)}
    if kind in (str, int, bool):
        return kind(value)
    if kind is Literal:
        return value
    if kind is tuple:
        each = _each(arguments, len(value))
        return [encode(x, of, arrays, _under(at, k)) for k, (x, of) in enumerate(zip(value, each, strict=True))]
    if kind is dict:
        of_key, of_value = arguments
        found = [(key, encode(x, of_value, arrays, _under(at, key))) for key, x in value.items()]
        return dict(found) if of_key is str else [[encode(key, of_key, arrays, at), x] for key, x in found]
    fields = _fields(kind)
    return {name: encode(getattr(value, name), of, arrays, _under(at, name)) for name, of in fields.items()}


def decode(plain: Any, hint: Any, arrays: Arrays, at: str = "") -> Any:
    """Return the value that was encoded.

    Raises:
        DamagedError: If no value of the type is encoded so.
    """
    kind, arguments = _shape(hint)
    if kind is Any:
        return _decoded_json(plain)
    if plain is None:
        if _is_optional(hint):
            return None
        raise DamagedError(f"{at or 'it'} is null")
    if kind is Tensor:
        return _tensor(plain, arrays, at)
    if kind in _SCALARS:
        return _scalar(plain, kind, arguments, at)
    if kind is tuple:
        each = _each(arguments, len(_of_type(plain, list, at)))
        if len(each) != len(plain):
            raise DamagedError(f"{at} holds {len(plain)} values instead of {len(each)}")
        return tuple(decode(x, of, arrays, _under(at, k)) for k, (x, of) in enumerate(zip(plain, each, strict=True)))
    if kind is dict:
        return _mapping(plain, arguments, arrays, at)
    fields = _fields(kind)
    values = _values(plain, fields, at)
    found = {
        name: decode(x, of, arrays, _under(at, name)) for (name, of), x in zip(fields.items(), values, strict=True)
    }
    return kind(**found)


def _scalar(plain: Any, kind: Any, arguments: tuple[Any, ...], at: str) -> Any:
    """Return a number, a text, a flag, a note or one of some words.

    Raises:
        DamagedError: If it is none.
    """
    if kind is float:
        return _number(plain, at)
    if kind is Note:
        return Note(*(_of_type(x, str, at) for x in _values(plain, ("kind", "text"), at)))
    if kind is Literal:
        if plain not in arguments:
            raise DamagedError(f"{at} is {plain!r}, none of {', '.join(map(str, arguments))}")
        return plain
    return _of_type(plain, kind, at)


def _mapping(plain: Any, arguments: tuple[Any, ...], arrays: Arrays, at: str) -> dict[Any, Any]:
    of_key, of_value = arguments
    if of_key is str:
        items: Iterable[Any] = _of_type(plain, dict, at).items()
    else:
        items = [_of_type(item, list, at) for item in _of_type(plain, list, at)]
        if any(len(item) != 2 for item in items):
            raise DamagedError(f"{at} holds something else than pairs of key and value")
    return {decode(key, of_key, arrays, at): decode(x, of_value, arrays, _under(at, key)) for key, x in items}


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass or a NamedTuple that are kept, with their hints.

    Raises:
        TypeError: If it is neither.
    """
    if dataclasses.is_dataclass(kind):
        names = [f.name for f in dataclasses.fields(kind) if f.metadata.get("kept", True)]
    elif hasattr(kind, "_fields"):
        names = list(kind._fields)
    else:
        raise TypeError(f"A value of type {kind} cannot be kept; expected dataclasses, NamedTuples and plain values.")
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


@functools.cache
def _shape(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type in a hint, None set aside, and its arguments."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [arm for arm in get_args(hint) if arm is not types.NoneType]  # of unions only "or None" is known
    origin = get_origin(hint)
    if origin in (dict, Mapping):
        return dict, get_args(hint)
    return (hint, ()) if origin is None else (origin, get_args(hint))


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint)


def _each(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return arguments[:1] * count if len(arguments) == 2 and arguments[1] is ... else arguments


def _under(at: str, name: Any) -> str:
    return f"{at}.{name}" if at else str(name)


def _encoded_number(value: float) -> Any:
    if isinstance(value, int):
        return value
    if math.isfinite(value):
        return float(value)
    return next(word for word, number in _WORDS.items() if repr(number) == repr(float(value)))


def _encoded_json(value: Any, at: str) -> Any:
    """Return plain values, in which a number that is not finite stands as {"number": ...}.

    Raises:
        TypeError: If something is not plain, or could be mistaken for such a number.
    """
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and value.keys() != {"number"}:
        return {key: _encoded_json(x, _under(at, key)) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded_json(x, at) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else {"number": _encoded_number(value)}
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{at} is {value!r}, which cannot be kept; expected text, numbers, lists and dicts of those.")


def _decoded_json(plain: Any) -> Any:
    if isinstance(plain, dict):
        if plain.keys() == {"number"}:
            return _number(plain["number"], "number")
        return {key: _decoded_json(x) for key, x in plain.items()}
    return [_decoded_json(x) for x in plain] if isinstance(plain, list) else plain


def _tensor(plain: Any, arrays: Arrays, at: str) -> Tensor:
    try:
        return arrays.get(plain)
    except DamagedError as error:
        raise DamagedError(f"{at} is {error}") from error


def _number(plain: Any, at: str) -> float:
    if isinstance(plain, str) and plain in _WORDS:
        return _WORDS[plain]
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise DamagedError(f"{at} is {plain!r} instead of a number")
    return plain


def _of_type(plain: Any, kind: Callable[..., Any], at: str) -> Any:
    if type(plain) is not kind:
        raise DamagedError(f"{at or 'it'} is of type {type(plain).__name__} instead of {kind.__name__}")
    return plain


def _values(plain: Any, names: Iterable[str], at: str) -> list[Any]:
    """Return the fields of an object, which has these and no others.

    Raises:
        DamagedError: If it has not.
    """
    found, names = _of_type(plain, dict, at), list(names)
    if missing := [name for name in names if name not in found]:
        raise DamagedError(f"{_under(at, missing[0])} is missing")
    if unknown := [name for name in found if name not in names]:
        raise DamagedError(f"{_under(at, unknown[0])} is unknown")
    return [found[name] for name in names]
