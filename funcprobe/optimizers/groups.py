"""Parameter groups of a pure optimizer: which leaves take which hyperparameters."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcprobe.errors import FuncprobeWarning, InputError, listed
from funcprobe.optimizers.unreached import check_reached
from funcprobe.tree import Lazy, same_keys
from funcprobe.types import Gradients, Params

#: Options that choose an implementation or a variant, which torch added to its classes one by one.
IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"})

#: Keys that older torch versions do not store, and that torch itself fills in when it loads such a file; every other
#: hyperparameter has to be found in a stored group.
_FILLED_BY_TORCH = IMPLEMENTATION | {"amsgrad", "nesterov"}

#: Keys of a group that are no options: what the class and torch's schedulers keep there for themselves.
NOTES = frozenset({"param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})


@dataclass(frozen=True)
class Group:
    """Leaves that share their hyperparameters, as a `param_group` of torch.optim, addressed by name.

    Example:
        >>> Group(("head.bias",), {"weight_decay": 0.0}).names
        ('head.bias',)
    """

    names: tuple[str, ...] | None = None  #: the leaves; None stands for every leaf there is
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)  #: what differs from the optimizer's own

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InputError(f"A group takes a sequence of names, and was given the single string '{self.names}'.")
        object.__setattr__(self, "names", None if self.names is None else tuple(self.names))
        object.__setattr__(self, "hyperparameters", dict(self.hyperparameters))


def build_groups(
    cls: type[torch.optim.Optimizer], common: Mapping[str, Any], groups: Sequence[Group] | None
) -> tuple[Group, ...]:
    """Return groups with complete hyperparameters: a group's own first, then the common ones, then the class's.

    Raises:
        InputError: If an option is unknown or out of range, or if a leaf is named twice.
    """
    listed = [Group()] if groups is None else list(groups)
    named = [group.names for group in listed]
    if not listed or (len(listed) > 1 and None in named):
        raise InputError("An optimizer takes one group without names (every leaf), or several that name their leaves.")
    every = [name for names in named if names is not None for name in names]
    if twice := sorted({name for name in every if every.count(name) > 1} if len(every) != len(set(every)) else ()):
        raise InputError(f"The leaf '{twice[0]}' is in two groups; name every leaf once.")
    return tuple(Group(group.names, complete(cls, {**common, **group.hyperparameters})) for group in listed)


def complete(cls: type[torch.optim.Optimizer], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters as the class itself completes and checks them.

    Raises:
        InputError: If the class refuses them, with the reason it gives.
    """
    given = {key: _plain(value) for key, value in hyperparameters.items()}
    if "lr" in given:
        check_lr(given["lr"])
    try:
        group = cls([torch.zeros(1, 1, requires_grad=True)], **given).param_groups[0]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"torch.optim.{cls.__name__} does not take these hyperparameters: {error}.") from error
    return {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}


def stored_groups(
    cls: type[torch.optim.Optimizer], param_groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]
) -> list[Group]:
    """Return the groups of a live or saved torch optimizer; hyperparameters come from it, never from defaults.

    Keys that a class of torch.optim does not read (`lr_scale`, a layer's number) are left out, with a warning.

    Raises:
        InputError: If there are not as many lists of names as groups, or a group lacks a hyperparameter.
    """
    if len(param_groups) != len(names):
        raise InputError(f"There are {len(param_groups)} param_groups and {len(names)} lists of names; give one each.")
    options = [key for key in inspect.signature(cls).parameters if key != "params"]
    groups = []
    for index, (stored, mine) in enumerate(zip(param_groups, names, strict=True)):
        if missing := [key for key in options if key not in stored and key not in _FILLED_BY_TORCH]:
            raise InputError(
                f"param_groups[{index}] has no '{missing[0]}', which {cls.__name__} needs; it has {sorted(stored)}."
            )
        groups.append(Group(tuple(mine), {key: stored[key] for key in options if key in stored}))
    if cls.__module__.startswith("torch.optim") and (left := _unread(cls, param_groups)):
        warnings.warn(
            f"The optimizer's groups hold {listed(left)}, which torch.optim.{cls.__name__} does not read; left out.",
            FuncprobeWarning,
            stacklevel=4,
        )
    return groups


def keys_of_its_own(
    cls: type[torch.optim.Optimizer], groups: Sequence[Group], param_groups: Sequence[Mapping[str, Any]]
) -> tuple[Group, ...]:
    """Return complete groups with the further keys of stored ones, which a class from elsewhere may read."""
    if cls.__module__.startswith("torch.optim"):
        return tuple(groups)
    return tuple(
        Group(
            group.names, {**{k: v for k, v in stored.items() if k not in ("params", *NOTES)}, **group.hyperparameters}
        )
        for group, stored in zip(groups, param_groups, strict=True)
    )


def _unread(cls: type[torch.optim.Optimizer], param_groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of stored groups that neither the class nor torch's schedulers put there."""
    make: Any = cls  # the base class asks for defaults, which these have themselves
    own = {"params", *NOTES, *make([torch.zeros(1, 1, requires_grad=True)]).param_groups[0]}
    return sorted({str(key) for group in param_groups for key in group if key not in own})


def check_lr(lr: Any) -> float:
    """Return a learning rate as a float.

    Raises:
        InputError: If it is not a finite number at or above 0.
    """
    try:
        value = float(lr)
    except (TypeError, ValueError) as error:
        raise InputError(f"The learning rate is {lr!r}; it must be a number.") from error
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"The learning rate is {value}; it must be finite and not negative.")
    return value


def assignments(
    groups: Sequence[Group], params: Iterable[str], lr: float | None
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield (leaf names, hyperparameters) for every group, with `lr` in place of every group's own where given.

    Raises:
        InputError: If the groups leave out a leaf or name one that is not there.
    """
    present = list(params)
    named = {name for group in groups for name in (present if group.names is None else group.names)}
    if unexpected := sorted(named.difference(present)):
        raise InputError(f"The optimizer's groups name '{unexpected[0]}', which is not among the parameters.")
    if missing := [name for name in present if name not in named]:
        raise InputError(
            f"No group of the optimizer names the parameter '{missing[0]}' ({len(missing)} such); put it in a group "
            "with the hyperparameters it is trained with."
        )
    override = {} if lr is None else {"lr": check_lr(lr)}
    for group in groups:
        yield list(present if group.names is None else group.names), {**group.hyperparameters, **override}


def check_gradient(params: Params, gradient: Gradients) -> None:
    """Check that a gradient fits the parameters, and that both are floating point; None fits any leaf, but not all.

    Raises:
        InputError: If names or shapes differ, no leaf has a gradient, or a leaf is not real floating point.
    """
    lazy = isinstance(gradient, Lazy)
    stand_in = gradient if lazy else {n: params.get(n) if g is None else g for n, g in gradient.items()}
    same_keys(params, stand_in, what="parameters and the gradient")  # type: ignore[arg-type]
    check_reached(gradient)
    for name, p in params.items():
        if not p.is_floating_point():
            raise InputError(f"The parameter '{name}' is {p.dtype}; only real floating-point leaves can be stepped.")


def _plain(value: Any) -> Any:
    """Return a hyperparameter that is a tensor or of NumPy (a learning rate, say) as a number; sequences likewise."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (np.generic, np.ndarray)) and value.size == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return value
