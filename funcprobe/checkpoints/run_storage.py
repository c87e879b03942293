"""The dtypes in which a run keeps its weights and moments, read off its saved files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe.checkpoints.saved_state import StateOnDisk
from funcprobe.errors import CheckpointError, FuncprobeWarning
from funcprobe.optimizers.stored import as_held, is_moment
from funcprobe.types import OptState, Params


class _Decision(NamedTuple):
    """The storage dtype decided for one leaf, and the reason where a user has to know it."""

    dtype: torch.dtype
    reason: str | None = None


def storage_of_run(
    params: Params, weights: Mapping[str, torch.dtype], moments: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Return the dtype in which the run keeps each leaf, where that is narrower than the one it is computed in.

    torch.optim keeps moments in the dtype of the parameters it steps, so weights and moments of one dtype are a run in
    it. Where they differ it is told from which of the two was rounded on saving, and said in a warning:

    * weights low, moments wide: the run stepped wide weights (masters) and saved a cast of them: kept wide;
    * weights wide, moments low: a run in the low dtype that was saved wide, if the weights are numbers of the low
      dtype, and otherwise a run in the wide one whose moments were cast on saving.

    Args:
        params: The leaves, in the dtype that they are computed in.
        weights: The dtype of each leaf in the weights' file; missing where it is not known.
        moments: The dtype of each leaf's moments in the optimizer's file; missing where it has none.
    """
    decided = {name: _decide(leaf, weights.get(name), moments.get(name)) for name, leaf in params.items()}
    reasons: dict[str, list[str]] = {}
    for name, decision in decided.items():
        if decision.reason is not None:
            reasons.setdefault(decision.reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        warnings.warn(f"{reason} (so it is for '{names[0]}'{more}).", FuncprobeWarning, stacklevel=4)
    return {name: d.dtype for name, d in decided.items() if is_narrower(d.dtype, params[name].dtype)}


def storage_asked_for(params: Params, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return `dtype` for every leaf that is computed in another one.

    Raises:
        CheckpointError: If a leaf's dtype does not hold every number of it.
    """
    for name, leaf in params.items():
        if leaf.dtype != dtype and not is_narrower(dtype, leaf.dtype):
            raise CheckpointError(
                f"storage is {_word(dtype)}, and '{name}' is computed in {_word(leaf.dtype)}, which does not hold it; "
                "load with dtype='float32', or leave storage out."
            )
    return {name: dtype for name, leaf in params.items() if leaf.dtype != dtype}


def at_storage(
    params: Params, opt_state: OptState | None, storage: Mapping[str, torch.dtype]
) -> tuple[Params, OptState | None]:
    """Return parameters and moments rounded to the storage dtype, with a warning where that changes a weight.

    A state that is left on disk stays as it is there.
    """
    if not storage:
        return params, opt_state
    on_disk = isinstance(opt_state, StateOnDisk)  # rounded a piece at a time, by the step that reads it
    held, state = as_held(params, {} if on_disk or opt_state is None else opt_state, storage)
    if moved := [name for name in params if held[name].data_ptr() != params[name].data_ptr()]:
        warnings.warn(
            f"The weights are no numbers of the storage dtype ({_word(storage[moved[0]])}) at '{moved[0]}' and "
            f"{len(moved) - 1} other leaves; they are rounded to it, so this is the step of another model than the "
            "file's.",
            FuncprobeWarning,
            stacklevel=3,
        )
    return held, opt_state if on_disk or opt_state is None else state


def moment_dtypes(opt_state: Mapping[str, Mapping[str, Any]], params: Params) -> dict[str, torch.dtype]:
    """Return for every leaf the widest dtype among its moments; a leaf without any is left out."""
    moments: dict[str, torch.dtype] = {}
    for name, entries in opt_state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and is_moment(key, value, params[name]):
                moments[name] = torch.promote_types(moments.get(name, value.dtype), value.dtype)
    return moments


def is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Return whether one dtype's numbers are all numbers of another, wider one.

    Example:
        >>> is_narrower(torch.bfloat16, torch.float32), is_narrower(torch.bfloat16, torch.float16)
        (True, False)
    """
    return dtype != than and torch.promote_types(dtype, than) == than


def _decide(leaf: Tensor, weight: torch.dtype | None, moment: torch.dtype | None) -> _Decision:
    weight = leaf.dtype if weight is None else weight
    if moment is None or moment == weight:
        return _Decision(weight)
    if is_narrower(weight, moment):
        reason = None
        if is_narrower(weight, leaf.dtype):  # otherwise nothing could be done about it
            reason = (
                f"The weights are saved in {_word(weight)} and the optimizer's moments in {_word(moment)}, which is "
                f"wider: the run is taken to have stepped {_word(moment)} weights, of which the file holds a rounded "
                f"copy, and its step is stored in {_word(moment)}; set storage to {_word(weight)} if it stepped the "
                f"{_word(weight)} weights themselves"
            )
        return _Decision(moment, reason)
    if not is_narrower(moment, weight):
        return _Decision(weight)
    if _holds(leaf, moment):
        why = f"the weights are numbers of {_word(moment)} all the same, so the run's step is stored in that"
        return _Decision(moment, f"The weights are saved in {_word(weight)}, the moments in {_word(moment)}: {why}")
    why = f"the weights are no numbers of {_word(moment)}, so the moments are taken to have been rounded on saving"
    return _Decision(weight, f"The weights are saved in {_word(weight)}, the moments in {_word(moment)}: {why}")


def _holds(leaf: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(leaf.detach().to(dtype).to(leaf.dtype), leaf.detach())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
