"""Calm lines about configurations: the value found, the value expected, the key that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from funcprobe.errors import ConfigError
from funcprobe.visible_text import shortened

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

#: Errors of one file that are told at most.
MOST = 8

#: An integer that stayed text, because it has more than 64 bits.
_LONG = re.compile(r"[-+]?[0-9]{19,}")

#: Keys that hold keys.
_INNER = ("objective", "observable")

#: What the same thing is called elsewhere.
ALSO_CALLED = {
    "learning_rate": "lr",
    "model": "checkpoint",
    "model_name_or_path": "checkpoint",
    "loss": "objective.name",
    "loss_type": "objective.name",
    "eval": "evaluation",
    "output_dir": "output",
    "batch_size": "microbatch",
    "per_device_train_batch_size": "microbatch",
    "torch_dtype": "dtype",
    "overwrite": "force",
    "update": "batch",
}


def explain(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[str]:
    """Return one line for every error of pydantic: "lr: found 'abc', expected a number ≥ 0, or none"."""
    lines: dict[str, str] = {}
    for found in error.errors(include_url=False)[:MOST]:
        place = _place(model, found["loc"])
        name = ".".join((*prefix, *place))
        if found["type"] == "extra_forbidden":
            lines[name] = unknown_key(name, _keys_beside(model, place, prefix))
        elif found["type"] == "value_error":
            lines[name or "config"] = ": ".join(filter(None, [name, str(found["ctx"]["error"]).rstrip(".")]))
        elif found["type"] == "missing":
            lines[name] = f"{name}: missing, expected {_expected(model, place)}"
        elif name not in lines:
            lines[name] = f"{name}: found {show(found['input'])}, expected {_expected(model, place)}"
            if isinstance(found["input"], str) and _LONG.fullmatch(found["input"]):
                lines[name] += " (an integer has at most 64 bits)"
            if isinstance(found["input"], bool):
                lines[name] += " (yes, no, on and off are true and false in YAML; quotes make them words)"
    return list(lines.values())


def check_known(name: str, model: type[BaseModel], *, option: bool = False, own: Iterable[str] = ()) -> None:
    """Check that a dotted key exists.

    Raises:
        ConfigError: If it does not; the message names the nearest key and all of them.
    """
    outer, dot, inner = name.partition(".")
    keys = _nested(model, outer) if dot else None
    if dot and keys is not None and inner not in keys:
        raise ConfigError(f"{unknown_key(name, [f'{outer}.{key}' for key in keys], option)}.")
    if outer not in model.model_fields or (dot and keys is None):
        raise ConfigError(f"{unknown_key(name, [*own, *model.model_fields], option)}.")
    if option and not dot and name in _INNER and name not in own:
        inner = ", ".join(f"--{name}.{key}" for key in (_nested(model, name) or {}))
        raise ConfigError(f"--{name} has keys of its own: give {inner} and the like.")


def unknown_key(name: str, keys: Iterable[str], option: bool = False) -> str:
    """Return the line about a key that does not exist.

    Example:
        >>> unknown_key("top_n", ["lr", "top_k"])
        "unknown key 'top_n', did you mean 'top_k'? The keys are lr, top_k"
    """
    keys, name = list(keys), shortened(name, 60)
    near = ALSO_CALLED.get(name) or next(
        iter(difflib.get_close_matches(name.replace("-", "_"), [k.replace("-", "_") for k in keys], n=1, cutoff=0.4)),
        None,
    )
    dashes, kind = ("--", "option") if option else ("", "key")
    meant = "." if near is None else f", did you mean '{dashes}{near}'?"
    return f"unknown {kind} '{dashes}{name}'{meant} The keys are {', '.join(keys)}"


def show(value: Any) -> str:
    """Return a value as a person would write it in the file."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    text = repr(value[:100] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the part of a location that is keys; pydantic appends the names of union members."""
    first = str(loc[0]) if loc else None
    if first is None:
        return ()
    inside = _nested(model, first)
    return (first, str(loc[1])) if inside is not None and len(loc) > 1 else (first,)


def _nested(model: type[BaseModel], name: str) -> dict[str, Any] | None:
    """Return the fields of a field that is itself a model."""
    field = model.model_fields.get(name)
    return getattr(field.annotation, "model_fields", None) if field is not None else None


def _keys_beside(model: type[BaseModel], place: tuple[str, ...], prefix: tuple[str, ...]) -> list[str]:
    keys = (_nested(model, place[0]) or {}) if len(place) > 1 else model.model_fields
    return [".".join((*prefix, *place[:-1], key)) for key in keys]


def _expected(model: type[BaseModel], place: tuple[str, ...]) -> str:
    fields: Any = model.model_fields
    field = fields[place[0]]
    if len(place) > 1:
        field = (_nested(model, place[0]) or {})[place[1]]
    extra = field.json_schema_extra
    return str(extra["expected"]) if isinstance(extra, dict) else "something else"
