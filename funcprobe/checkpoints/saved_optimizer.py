"""The optimizer of a saved state, and its state by the names of the model's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from funcprobe.checkpoints.bitsandbytes_state import without_quantisation
from funcprobe.checkpoints.optimizer_flags import runnable
from funcprobe.checkpoints.optimizer_kind import optimizer_class, with_lr
from funcprobe.checkpoints.optimizer_state import (
    as_loaded,
    counted_beside,
    map_ids_to_names,
    named_entries,
    names_of_groups,
)
from funcprobe.checkpoints.run_storage import moment_dtypes
from funcprobe.checkpoints.saved_state import SavedState, StateOnDisk, state_of_file
from funcprobe.errors import FuncprobeWarning
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import from_param_groups
from funcprobe.types import Optimizer, OptState, Params


def load_optimizer(path: str | Path, params: Params, lr: float | None = None) -> tuple[Optimizer, OptState]:
    """Return the optimizer in an `optimizer.pt` and its state by name, for leaves in `named_parameters()` order.

    Raises:
        CheckpointError: If the file is missing, needs unpickling, is another optimizer's, fits no mapping or several,
            or if `lr` is None and the saved one is 0.
        InputError: If `lr` is negative or not finite.
    """
    found, state, _ = read_optimizer(state_of_file(Path(path)), params, lr)
    return found, state


def read_optimizer(
    saved: SavedState, params: Params, lr: float | None = None, *, on_disk: bool = False
) -> tuple[Optimizer, OptState, dict[str, torch.dtype]]:
    """Return the optimizer, its state by name, and the dtype that each leaf's moments are saved in.

    With `on_disk` the moments of an optimizer that takes them in pieces stay where they are, as they were saved, once
    all of them have been looked at.

    Raises:
        CheckpointError: If the state is another optimizer's, is damaged, fits no mapping or several, or if `lr` is None
            and the saved one is 0.
        InputError: If `lr` is negative or not finite.
    """
    saved = without_quantisation(saved)
    described, what = saved.described, saved.what
    cls = optimizer_class(described, what)
    groups = runnable(cls, with_lr(described, lr, what), (p.device for p in params.values()), what)
    names = map_ids_to_names({name: tuple(p.shape) for name, p in params.items()}, described, what)
    _warn_never_stepped([names[i] for i in names if not described["state"].get(i)], cls, what)
    found = from_param_groups(cls, groups, names_of_groups(groups, names))
    stays = on_disk and isinstance(found, PureOptimizer)
    state = _left(saved, params, names) if stays else _read(saved, params, groups, names)
    return found, state, moment_dtypes({names[i]: described["state"].get(i, {}) for i in names}, params)


def _read(saved: SavedState, params: Params, groups: Sequence[Mapping[str, Any]], names: Mapping[Any, str]) -> OptState:
    """Return the state in memory, beside the parameters, a leaf at a time."""
    beside, ids = counted_beside(groups, names), {name: i for i, name in names.items()}
    return {
        name: as_loaded(named_entries(name, saved.entries(ids[name])), leaf, beside[name])
        for name, leaf in params.items()
    }


def _left(saved: SavedState, params: Params, names: Mapping[Any, str]) -> OptState:
    """Return the state where it is, after a look at every leaf of it."""
    ids = {name: i for i, name in names.items()}
    for name in params:
        saved.entries(ids[name])
    return StateOnDisk({name: ids[name] for name in params}, lambda name: named_entries(name, saved.read(ids[name])))


def _warn_never_stepped(names: list[str], cls: type[torch.optim.Optimizer], what: str) -> None:
    if names and issubclass(cls, torch.optim.Adam):
        warnings.warn(
            f"{what} holds no state for '{names[0]}' and {len(names) - 1} others, which never received a gradient. "
            "Their step starts from zero moments, as the run's would.",
            FuncprobeWarning,
            stacklevel=4,
        )
