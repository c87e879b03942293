"""Which optimizer wrote a state: a class of torch.optim, or transformers' Adafactor; a refusal by name for any other.

A state_dict names no class, so it is told from its entries. `adamw_torch_fused`, the default of transformers.Trainer,
is torch.optim.AdamW with `fused=True`: the ordinary layout, and the flag is kept, since it decides the last bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from funcprobe.checkpoints.optimizer_fit import fitting
from funcprobe.checkpoints.optimizer_state import FRESH, check_layout
from funcprobe.errors import CheckpointError, FuncprobeWarning
from funcprobe.optimizers.groups import check_lr

_UNKNOWN = "an optimizer that is not known here"
_SUPPORTED = (
    "Supported are the classes of torch.optim (for transformers: optim='adamw_torch' or 'adamw_torch_fused') and "
    f"transformers' Adafactor. {FRESH}."
)


def optimizer_class(state_dict: Mapping[str, Any], what: str = "optimizer.pt") -> type[torch.optim.Optimizer]:
    """Return the class that wrote a state_dict: the only one that its options and the keys of its state fit.

    Adam and AdamW are told apart by `decoupled_weight_decay`. Older torch versions do not store it: where weight decay
    is in use the answer is then AdamW, which is what transformers.Trainer uses, with a warning.

    Raises:
        CheckpointError: If it was bitsandbytes (8-bit, or paged and 32-bit), apex or DeepSpeed fused Adam, or any other
            optimizer, naming it or listing the keys that were found; or if several classes could have written it.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0, "dampening": 0, "nesterov": False, "weight_decay": 0, "params": [0]}
        >>> optimizer_class({"state": {}, "param_groups": [group]}).__name__
        'SGD'
    """
    check_layout(state_dict, what)
    entries = state_dict["state"].values()
    state = {str(key) for entry in entries for key, value in entry.items() if value is not None}
    options = {str(key) for group in state_dict["param_groups"] for key in group}
    if name := _foreign(state, options):
        raise CheckpointError(f"{what} was written by {name}, whose state is not read. {_SUPPORTED}")
    found = fitting(state_dict["param_groups"], state)
    if not found:
        kind = "an Adafactor that is neither torch's nor transformers'" if "exp_avg_sq_row" in state else _UNKNOWN
        raise CheckpointError(
            f"{what} was written by {kind}: its state holds {sorted(state)} and its groups {sorted(options)}. "
            f"{_SUPPORTED}"
        )
    if not state_dict["state"] and found != [torch.optim.SGD]:
        raise CheckpointError(
            f"{what} holds no state for any parameter: it was saved before the first step. {FRESH}, or use a later "
            "checkpoint."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{what} could be of {' or '.join(cls.__name__ for cls in found)}, whose options and state have these "
            f"names too, and it names no class, so it is not read. {FRESH}."
        )
    return _adam_class(state_dict["param_groups"], what) if found == [torch.optim.Adam] else found[0]


def with_lr(state_dict: Mapping[str, Any], lr: float | None, what: str = "optimizer.pt") -> list[dict[str, Any]]:
    """Return the param_groups with `lr` in every group, or as saved where `lr` is None.

    Raises:
        CheckpointError: If `lr` is None and the saved one is 0, or there is none.
        InputError: If `lr` is negative or not finite.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    if lr is None:
        if any(group["lr"] is None for group in groups):
            raise CheckpointError(
                f"{what} holds no learning rate: its optimizer makes one from the step (relative_step), which is not "
                "read. Train with a learning rate of your own (for Adafactor relative_step=False)."
            )
        if all(float(group["lr"]) == 0 for group in groups if group["params"]):
            raise CheckpointError(
                f"The learning rate saved in {what} is 0. It belongs to the step after the checkpoint and is 0 at the "
                "end of a linear schedule, so the update would be 0 too; set lr to the rate that the step is to "
                "have."
            )
        _warn_unmoved(groups, what)
        return groups
    return [{**group, "lr": check_lr(lr)} for group in groups]


def bitsandbytes_optimizer(state_keys: set[str]) -> str | None:
    """Return the kind of bitsandbytes optimizer that keeps state under these keys, or None.

    Example:
        >>> bitsandbytes_optimizer({"step", "state1", "qmap1"})
        'an 8-bit bitsandbytes optimizer'
    """
    if any(key.startswith(("qmap", "absmax")) for key in state_keys):
        return "an 8-bit bitsandbytes optimizer"
    return "a paged or 32-bit bitsandbytes optimizer" if state_keys & {"state1", "state2"} else None


def _foreign(state: set[str], options: set[str]) -> str | None:
    """Return the name of an optimizer whose state is known and not read."""
    if name := bitsandbytes_optimizer(state):
        return name
    if options & {"bias_correction", "adam_w_mode"}:
        return "a fused Adam of apex or DeepSpeed"
    if "correct_bias" in options:
        return "the AdamW of older transformers releases (which adds eps elsewhere)"
    return None


def _warn_unmoved(groups: list[dict[str, Any]], what: str) -> None:
    """Say how many leaves a learning rate of 0 leaves where they are, while others move."""
    unmoved = sum(len(group["params"]) for group in groups if float(group["lr"]) == 0)
    if unmoved:
        total = sum(len(group["params"]) for group in groups)
        warnings.warn(
            f"{what} holds a learning rate of 0 for {unmoved} of {total} leaves, which will not move; set lr to give "
            "every leaf the same rate.",
            FuncprobeWarning,
            stacklevel=5,
        )


def _adam_class(param_groups: list[Mapping[str, Any]], what: str) -> type[torch.optim.Optimizer]:
    flags = {group.get("decoupled_weight_decay") for group in param_groups if group["params"]}
    if None in flags:
        if any(group["weight_decay"] != 0 for group in param_groups if group["params"]):
            warnings.warn(
                f"{what} does not say whether its weight decay is Adam's or AdamW's (older torch versions do not store "
                "it); it is read as AdamW, which is what transformers.Trainer uses.",
                FuncprobeWarning,
                stacklevel=4,
            )
        return torch.optim.AdamW
    return torch.optim.AdamW if flags == {True} else torch.optim.Adam
