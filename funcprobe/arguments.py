"""One table of the arguments that public functions share: a wrong one is named, with its kind and the right one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from funcprobe.errors import InputError
from funcprobe.tree import Lazy
from funcprobe.types import Rollouts

P = ParamSpec("P")
R = TypeVar("R")


class _Kind(NamedTuple):
    """A kind of argument: its words, and whether a value is of it."""

    words: str
    holds: Callable[[Any], bool]


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _is_tree(value: Any, *, holes: bool = False) -> bool:
    if not isinstance(value, Mapping):
        return False
    leaves = () if isinstance(value, Lazy) else value.values()  # of a tree that is computed, names alone
    return all(isinstance(x, Tensor) or (holes and x is None) for x in leaves) and all(
        isinstance(n, str) for n in value
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, int | float) and not isinstance(value, bool)


_ROLLOUTS = _Kind("Rollouts, such as read_rollouts returns", lambda value: isinstance(value, Rollouts))
_PARAMS = _Kind("a dict of tensors by name, as from_module returns beside the policy", _is_tree)
_OPTIMIZER = _Kind("an optimizer of funcprobe, such as adamw(...) or from_torch(...)", _has("init", "apply"))

#: Name of a parameter -> its kind, wherever a public function has one of that name.
KINDS: Mapping[str, _Kind] = {
    "update": _Kind("an Update, such as Update.from_step(...)", _has("need", "policy", "params")),
    "evaluation": _ROLLOUTS,
    "fit": _ROLLOUTS,
    "rollouts": _ROLLOUTS,
    "batch": _ROLLOUTS,
    "opt_state": _Kind(
        "the state of an optimizer by name, such as optimizer.init(params)",
        lambda value: isinstance(value, Mapping) and all(isinstance(x, Mapping) for x in value.values()),
    ),
    "policy": _Kind("a Policy, such as from_module(module)[0]", _has("names", "vocab_size", "device")),
    "params": _PARAMS,
    "delta": _PARAMS,
    "gradient": _Kind(f"{_PARAMS.words}, or None for a leaf", functools.partial(_is_tree, holes=True)),
    "optimizer": _OPTIMIZER,
    "step": _Kind("a step, such as make_step(...) returns", lambda value: callable(value) and hasattr(value, "policy")),
    "objective": _Kind("an objective, such as grpo()", callable),
    "module": _Kind("a torch.nn.Module", lambda value: isinstance(value, nn.Module)),
    "generator": _Kind("a torch.Generator", lambda value: isinstance(value, torch.Generator)),
    "storage": _Kind(
        "a dict of dtypes by name",
        lambda value: isinstance(value, Mapping) and all(isinstance(x, torch.dtype) for x in value.values()),
    ),
    "lr": _Kind("a learning rate, which is a number", _is_number),
    "lr_max": _Kind("a learning rate, which is a number", _is_number),
}


#: The annotation of a parameter that has a name of the table and is another thing: `step` of a file of rollouts.
_LABEL = "int | None"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that refuses arguments which are not of the kind that their names have in the table.

    Raises:
        InputError: When it is called with one, naming the argument, its kind and the right one.

    Example:
        >>> checked(lambda rollouts: rollouts)(3)
        Traceback (most recent call last):
            ...
        funcprobe.errors.InputError: rollouts is an int; expected Rollouts, such as read_rollouts returns.
    """
    signature = inspect.signature(function)
    kinds = {name: KINDS[name] for name, p in signature.parameters.items() if name in KINDS and p.annotation != _LABEL}

    @functools.wraps(function)
    def called(*arguments: P.args, **options: P.kwargs) -> R:
        given = signature.bind_partial(*arguments, **options).arguments
        for name, kind in kinds.items():
            if name in given and given[name] is not signature.parameters[name].default and not kind.holds(given[name]):
                raise InputError(f"{name} is {_told(given[name], kind)}; expected {kind.words}.", quantity=name)
        return function(*arguments, **options)

    return called


def _told(value: object, kind: _Kind) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    if kind.words.startswith("a dict") and isinstance(value, Mapping):
        wrong = next((k for k, x in value.items() if not isinstance(k, str) or not isinstance(x, Tensor)), None)
        return f"{article} {name} with {wrong!r:.60}: {type(value.get(wrong)).__name__}"
    return f"{article} {name}"
