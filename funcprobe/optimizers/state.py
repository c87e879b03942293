"""Optimizer state to and from torch.optim's state_dict, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.optimizers.groups import Group
from funcprobe.types import OptState


class HasGroups(Protocol):
    """An optimizer of this package: a class of torch.optim and its groups."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the groups with their complete hyperparameters."""
        ...


def state_from_torch(state_dict: Mapping[str, Any], names_of_ids: Mapping[int, str]) -> OptState:
    """Return the state in a torch.optim state_dict, keyed by name and copied, so that the live optimizer may step on.

    A parameter that never stepped has no state there and an empty one here.

    Raises:
        InputError: If the file holds state for an id that has no name, or state that is not numeric.
    """
    state = state_dict["state"]
    if nameless := [key for key in state if key not in names_of_ids]:
        raise InputError(
            f"The optimizer state has an entry for parameter id {nameless[0]}, and names are known for "
            f"{len(names_of_ids)} ids only; the state belongs to another set of trainable parameters."
        )
    return {
        name: {key: as_tensor(name, key, value) for key, value in state.get(i, {}).items() if value is not None}
        for i, name in names_of_ids.items()
    }


def state_to_torch(optimizer: HasGroups, opt_state: OptState, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a state_dict that `load_state_dict` of the torch class takes, ids counted group by group.

    Args:
        optimizer: Gives the groups, their order and their hyperparameters.
        opt_state: The state by name.
        names: The order of the leaves of a group without names (`named_parameters()` order); the state's by default.

    Raises:
        InputError: If a group names a leaf that has no entry in the state.
    """
    order = list(opt_state if names is None else names)
    state: dict[int, dict[str, Tensor]] = {}
    param_groups, count = [], 0
    for group in optimizer.groups:
        mine = order if group.names is None else list(group.names)
        if missing := [name for name in mine if name not in opt_state]:
            raise InputError(f"The optimizer state has no entry for '{missing[0]}', which a group of it names.")
        ids = range(count, count + len(mine))
        copies = {i: {k: v.clone() for k, v in opt_state[n].items()} for i, n in zip(ids, mine, strict=True)}
        state |= {i: entries for i, entries in copies.items() if entries}
        param_groups.append({**group.hyperparameters, "params": list(ids)})
        count += len(mine)
    return {"state": state, "param_groups": param_groups}


def check_state(name: str, leaf: Tensor, opt_state: OptState, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return the state of one leaf after checking its entries and their shapes against the expected ones.

    Raises:
        InputError: If the leaf has no entry, an entry is missing or unknown, or one has another shape than the leaf.
    """
    if name not in opt_state:
        raise InputError(f"The optimizer state has no entry for '{name}'; take it from `init` or from the checkpoint.")
    state = opt_state[name]
    if keys is None or not state:
        return state
    if set(state) != set(keys):
        raise InputError(
            f"The optimizer state of '{name}' holds {sorted(state)}, and this optimizer keeps {sorted(keys)}",
            hint="it was written by another optimizer, or with other options",
            kind="optimizer state",
            quantity=name,
            found=sorted(state),
            expected=sorted(keys),
        )
    for key, value in state.items():
        if key != "step" and value.shape != leaf.shape:
            raise InputError(
                f"The optimizer state '{key}' of '{name}' has shape {tuple(value.shape)} and the parameter "
                f"{tuple(leaf.shape)}; they do not belong together."
            )
    return state


def as_tensor(name: str, key: str, value: Any) -> Tensor:
    """Return one entry of a torch optimizer's state as a tensor of its own; a Python int becomes an int64 scalar.

    Raises:
        InputError: If the entry is neither a tensor nor a number.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    raise InputError(f"The optimizer state '{key}' of '{name}' is a {type(value).__name__}; only numbers are read.")
