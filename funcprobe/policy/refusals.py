"""Modules whose copy could not be the module, told by looking; and how many positions a model has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from funcprobe.errors import InputError
from funcprobe.policy.split import causal_config

#: Kinds of rotary embedding whose frequencies follow the longest sequence that they see.
_BY_LENGTH = ("dynamic", "longrope")


def refuse_what_cannot_be_copied(module: nn.Module, device: object = None) -> None:
    """Check the reasons against a copy that can be seen without running the module.

    Raises:
        InputError: If it is scripted, sharded, offloaded, an encoder-decoder, made in inference mode, or has a gradient
            that depends on how a batch is cut; or if autocast is on around the call.
    """
    if sharding := sharding_of(module):
        raise InputError(
            f"The model is sharded by {sharding}, so a process sees a part of its parameters; load it whole in every "
            "process, and shard(policy, params) shares it out again."
        )
    refuse_autocast(next((p.device for p in module.parameters()), torch.device("cpu")))
    if torch.get_default_device().type == "meta" and device is None:
        raise InputError(
            "torch.device('meta') is set around this call, so nothing that it makes has numbers; leave it."
        )
    for name, part in module.named_modules():
        called = f"The module '{name}' ({type(part).__name__})" if name else f"The module {type(part).__name__}"
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(
                f"{called} is scripted (torch.jit), and a scripted module keeps its parameters to itself; pass the "
                "module that it was scripted from."
            )
        if getattr(part, "scale_grad_by_freq", False) and any(p.requires_grad for p in part.parameters(False)):
            raise InputError(
                f"{called} divides its gradient by how often a token stands in the batch (scale_grad_by_freq), so it "
                "depends on how the batch is cut and is no derivative; set scale_grad_by_freq=False."
            )
        if bool(getattr(getattr(part, "config", None), "is_encoder_decoder", False)):
            raise InputError(
                f"{called} is an encoder-decoder; a policy is a causal language model, which continues its prompt."
            )
    for name, p in module.named_parameters():
        if p.is_inference():
            raise InputError(
                f"The parameter '{name}' was made in inference mode, where nothing can be differentiated; load the "
                "module outside torch.inference_mode, or clone its parameters."
            )
        if p.device.type == "meta" and device is None:
            raise InputError(
                f"The parameter '{name}' is on the meta device and holds no numbers: the model is offloaded, or was "
                "never filled; load it whole onto one device."
            )


def sharding_of(model: nn.Module) -> str | None:
    """Return the name of the library that holds parts of a model's parameters elsewhere; None where all are whole."""
    parameters = list(model.parameters())
    if any("FullyShardedDataParallel" in type(part).__name__ for part in model.modules()):
        return "FSDP"
    if any(hasattr(p, "device_mesh") for p in parameters):
        return "FSDP2 or tensor parallelism (its parameters are DTensors)"
    # ZeRO 3 leaves a number of its own on every parameter, whose tensor is empty between passes
    if type(model).__name__ == "DeepSpeedEngine" or any(hasattr(p, "ds_id") for p in parameters):
        return "DeepSpeed"
    return None


def refuse_autocast(device: torch.device) -> None:
    """Check that no autocast around the call changes the result of a forward pass.

    Raises:
        InputError: If it is on.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        low = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        raise InputError(
            f"torch.autocast ({low}) is on around this call, so a float32 model would be measured in {low}; leave it. "
            "Where the run uses it, it belongs to the module (accelerate's prepare, or inside forward) and is kept."
        )


def positions_of(module: nn.Module) -> int | None:
    """Return the longest sequence that a model has positions for; None where it does not say, or has no end."""
    config = causal_config(module)
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        return None
    scaled = [_reach(scaling) for scaling in _scalings(config)]
    return None if None in scaled else max([found, *(reach for reach in scaled if reach is not None)])


def ids_below(module: nn.Module) -> int:
    """Return a bound on trial ids, from 2 to 64: at most the input embedding's size, or, unnamed, the least table's."""
    own = next((size for part in module.modules() if (size := _vocabulary(part)) is not None), None)
    # a table that is not the ids' may be of positions, or shorter
    sizes = (
        [part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)] if own is None else [own]
    )
    return max(2, min([*sizes, 64]))


def _vocabulary(part: nn.Module) -> int | None:
    """Return the size of the table that a part says it reads ids by; None where it says nothing."""
    if not hasattr(type(part), "get_input_embeddings"):
        return None
    try:
        table = part.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # a vision tower, which reads none
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def rows_share_frequencies(module: nn.Module) -> set[str]:
    """Return the names of rotary embeddings whose frequencies follow the longest row of a batch."""
    found = set()
    for name, part in module.named_modules():
        kinds = getattr(part, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind in _BY_LENGTH for kind in kinds):
            found.add(name)
    return found


def _scalings(config: Any) -> list[dict[str, Any]]:
    """Return the rope parameters that extend a context, those of every kind of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, dict):
        return []
    every = [given, *(x for x in given.values() if isinstance(x, dict))]
    return [x for x in every if x.get("rope_type", x.get("type", "default")) not in ("default", None)]


def _reach(scaling: dict[str, Any]) -> int | None:
    """Return how far a scaling extends the positions; None for one that grows with the sequence."""
    if scaling.get("rope_type", scaling.get("type")) == "dynamic":
        return None
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    return int(original * factor) if original and factor else 0
