"""The state of bitsandbytes' Adam and AdamW (8-bit, paged, 32-bit) as the state of torch.optim.AdamW.

An 8-bit moment is a code a number, a map of 256 values, and the largest size in every block of 256 numbers (2048 in old
versions): `moment = qmap[code] · absmax[block]`, in float32. Leaves of fewer than 4096 numbers, and all of a 32-bit
optimizer, are float32 already. Both classes decay weights apart from the gradient, as AdamW does.
Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprobe.checkpoints.saved_state import SavedState
from funcprobe.errors import CheckpointError, FuncprobeWarning, Note

#: Where newer versions keep the tensors of a parameter, so that FSDP does not gather them.
_WRAPPED = "__bnb_optimizer_quant_state__"

#: Numbers in a block, by version.
_BLOCKS = (256, 2048)

#: Entry here -> the suffix of its tensors there.
_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}

#: What else torch.optim.AdamW has in its groups.
_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def without_quantisation(saved: SavedState) -> SavedState:
    """Return a state of bitsandbytes' Adam or AdamW as torch.optim.AdamW's, with a note; any other as it is.

    A step from it is AdamW's, in float32, from the moments as they were saved; a bitsandbytes run takes the same one up
    to rounding, and rounds the new moments to 8 bits after it, which is not done here.
    """
    state: dict[Any, Mapping[str, Any]] = {i: _flat(entries) for i, entries in saved.described["state"].items()}
    groups = saved.described["param_groups"]
    if not _is_adam(list(state.values()), groups):
        flat = {**saved.described, "state": state}
        return saved._replace(described=flat, read=lambda i: _flat(saved.read(i)))
    quantised = sum("qmap1" in entries for entries in state.values())
    text = (
        f"{saved.what} was written by bitsandbytes: {quantised} of {len(state)} leaves have moments of 8 bits, read as "
        "qmap[code] · absmax[block] in float32. The step is AdamW's from them; the run's own is the same up to "
        "rounding, and rounds its new moments to 8 bits again."
    )
    warnings.warn(FuncprobeWarning(Note("quantised", text)), stacklevel=4)
    described = {
        "state": {i: _described(entries) for i, entries in state.items()},
        "param_groups": [_adamw(group) for group in groups],
    }
    return SavedState(saved.what, described, lambda i: _plain(_flat(saved.read(i)), i, saved.what))


def _flat(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = entries.get(_WRAPPED)
    return {**{k: v for k, v in entries.items() if k != _WRAPPED}, **inner} if isinstance(inner, Mapping) else entries


def _is_adam(state: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether states and groups are those of Adam or AdamW, and of no other optimizer of bitsandbytes.

    LAMB keeps a norm beside its moments, AdEMAMix has an alpha, and all others have one moment.
    """
    known = {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
    held = [entries for entries in state if entries]
    return (
        bool(held)
        and all({"step", "state1", "state2"} <= set(entries) <= known for entries in held)
        and all(isinstance(entries[f"state{n}"], Tensor) for entries in held for n in "12")
        and all({"lr", "betas", "eps", "weight_decay"} <= set(group) for group in groups)
        and not any(group.get("alpha") or group.get("t_alpha") for group in groups)
    )


def _adamw(group: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in group.items() if k not in ("alpha", "t_alpha", "t_beta3")}
    return {**_ADAMW, **own, "betas": tuple(group["betas"])}


def _described(entries: Mapping[str, Any]) -> dict[str, Any]:
    moments = {
        key: torch.empty(entries[f"state{n}"].shape, dtype=torch.float32, device="meta") for key, n in _MOMENTS.items()
    }
    return {"step": entries["step"], **moments} if entries else {}


def _plain(entries: Mapping[str, Any], i: Any, what: str) -> dict[str, Any]:
    """Return the state of a parameter with its moments in float32.

    Raises:
        CheckpointError: If codes, map and sizes do not belong together.
    """
    if not entries:
        return {}
    found = {"step": entries["step"]}
    for key, n in _MOMENTS.items():
        codes, qmap, absmax = (entries.get(f"{name}{n}") for name in ("state", "qmap", "absmax"))
        found[key] = codes if qmap is None and absmax is None else _dequantised(codes, qmap, absmax)
        if found[key] is None:
            raise CheckpointError(
                f"state{n} of parameter {i} in {what} does not fit its qmap{n} and absmax{n}: expected codes of 8 "
                "bits, 256 values, and one size for every block of 256 or 2048 numbers; the file is damaged."
            )
    return found


def _dequantised(codes: Any, qmap: Any, absmax: Any) -> Tensor | None:
    """Return `qmap[code] · absmax[block]` in float32, in the shape of the codes; None where they do not fit."""
    if not all(isinstance(x, Tensor) for x in (codes, qmap, absmax)):
        return None
    if codes.dtype != torch.uint8 or qmap.shape != (256,) or not (qmap.is_floating_point() and absmax.dim() == 1):
        return None
    size = next((size for size in _BLOCKS if -(-codes.numel() // size) == absmax.numel()), None)
    if size is None:
        return None
    scale = absmax.float().repeat_interleave(size)[: codes.numel()]
    return (qmap.float()[codes.reshape(-1).int()] * scale).reshape(codes.shape)
