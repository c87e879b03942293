"""A checkpoint folder, as policy, parameters, optimizer and optimizer state.

Read are `config.json` with `model.safetensors` (or shards and index), or `adapter_config.json` with
`adapter_model.safetensors` over a base model; the tokenizer; `generation_config.json`; and `optimizer.pt`, which
accelerate calls `optimizer.bin`. Shards of FSDP, verl and SkyRL, and folders of torch.distributed.checkpoint, stand in
for weights and optimizer state (see `places`). Nothing is run: what is pickled goes through `weights_only=True`, which
admits tensors and plain containers alone, or through a reader of one table.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from funcprobe.checkpoints.adapters import adapter_dtypes, cached_model, load_adapter
from funcprobe.checkpoints.checkpoint import Checkpoint
from funcprobe.checkpoints.generation import end_tokens
from funcprobe.checkpoints.models import load_full, load_tokenizer
from funcprobe.checkpoints.places import Place, place_of, refuse_missing_optimizer, refuse_missing_weights
from funcprobe.checkpoints.run_storage import at_storage, storage_asked_for, storage_of_run
from funcprobe.checkpoints.saved_optimizer import read_optimizer
from funcprobe.checkpoints.weights import dtypes_of_leaves, header
from funcprobe.data.paths import path_of
from funcprobe.errors import CheckpointError, FuncprobeWarning, Note
from funcprobe.optimizers.factories import adamw
from funcprobe.optimizers.stored import stored
from funcprobe.policy.module import from_module
from funcprobe.training.step import check_offload
from funcprobe.types import Optimizer, OptState, Params


def load_checkpoint(
    folder: str | Path,
    base_model: str | Path | nn.Module | None = None,
    optimizer: Literal["auto", "fresh"] | None = "auto",
    lr: float | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    storage: str | torch.dtype | None = "auto",
    offload: Literal["cpu"] | None = None,
) -> Checkpoint:
    """Return the checkpoint in a folder, with the optimizer's state mapped to parameter names or a refusal.

    The framework is recognised from the folder, and said in a warning where the files are not transformers' own: FSDP
    through accelerate, torch.distributed.checkpoint (prime-rl, AReaL, torchtitan), verl, SkyRL. DeepSpeed and Megatron
    are refused with the command of theirs that writes a folder which is read.

    The model is in eval mode, without key-value cache, in `dtype` ("auto": as stored). Trainable are all parameters of
    a full model, and the adapter's of a PEFT folder. The optimizer's moments take the dtype and device of their
    parameters, as `torch.optim.Optimizer.load_state_dict` does; `step` stays as it is.

    `dtype` is what scores, gradients and Δθ are computed in, `storage` what the step leaves parameters and moments in.
    A bfloat16 run measured in float32 takes its own step: most entries do not move at a small learning rate, and a
    probe shows both θ′ as stored and θ + Δθ. The optimizer is then a `stored` one; a wrapper's name in the weights'
    keys (torch.compile, DDP, checkpointing, FSDP, peft) is left out, with a warning, and nothing is written.

    Args:
        folder: The checkpoint, such as `outputs/checkpoint-500`.
        base_model: The base of an adapter: a folder, a model in the local cache, or a module, which is left untouched
            and shares its frozen weights. By default what `adapter_config.json` names: a path relative to
            the working directory, `folder` or its parent (refused where several hold a model), or a cached model. For
            shards without a config.json: the model that the run started from, of which configuration and tokenizer
            are used.
        optimizer: "auto" reads the saved state, and never does without it. "fresh" is AdamW (weight decay 0, as TRL's
            default) with an empty state at `lr`. None reads no optimizer.
        lr: The learning rate of the step; overrides the saved one in every group.
        dtype: What the weights are loaded as; float32 holds bfloat16 and float16 files exactly.
        device: Where the policy, its parameters and the moments go.
        storage: The dtype that the run keeps weights and moments in. "auto" reads it leaf by leaf from the headers of
            the files, and warns where weights and moments differ in it; a dtype sets it for every leaf, and rounds
            weights that are none of its numbers, with a warning; None stores what is computed.
        offload: "cpu" leaves the moments on disk, where the files must stay as they are (mapped into memory, or read a
            leaf at a time from shards), and has every gradient kept in the machine's memory: the step takes both from
            there, a piece of a leaf at a time. For a model that would not fit its device otherwise, stepped by SGD,
            Adam or AdamW; any other optimizer has its state read as ever.

    Raises:
        CheckpointError: If the folder, the weights, the adapter or the optimizer state cannot be read faithfully, a
            weight is not finite, or `dtype` does not hold what `storage` asks for.
        InputError: If `lr` is negative or not finite, or `offload` is something else.
        MissingExtraError: If transformers, or for an adapter peft, is not installed.
    """
    check_offload(offload)
    place, kept = _place(folder, base_model), _storage_dtype(storage)
    _check_request(place, optimizer, lr)
    module, base, weights = _model(place, base_model, torch_dtype(dtype), device)
    policy, params = from_module(module)
    found, state, moments = _optimizer(place, params, optimizer, lr, offload)
    if kept == "auto":
        keeps = storage_of_run(params, weights, moments)
    else:
        keeps = {} if kept is None else storage_asked_for(params, kept)
    params, state = at_storage(params, state, keeps)
    assert place.home is not None  # _place has seen to it
    tokenizer = load_tokenizer(place.home, base)
    found = None if found is None else stored(found, keeps)
    return Checkpoint(
        policy, params, found, state, tokenizer, keeps, end_tokens(place.home, module, tokenizer), offload
    )


def _model(
    place: Place, base_model: str | Path | nn.Module | None, dtype: torch.dtype | str, device: str | torch.device
) -> tuple[nn.Module, Path | None, dict[str, torch.dtype]]:
    """Return the model, the folder of its base if it is an adapter, and the dtype in the file of every leaf."""
    assert place.home is not None
    if _is_adapter(place):
        module, base = load_adapter(place.home, base_model, dtype, device)
        return module, base, adapter_dtypes(place.home, module)
    shards = place.sharded_weights()
    module = load_full(place.home, dtype, device, shards)
    leaves = [name for name, leaf in module.named_parameters() if leaf.requires_grad]
    return module, None, dtypes_of_leaves(leaves, header(place.home) if shards is None else shards.stored)


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Return the floating-point dtype of that name; "auto" stays as it is.

    Raises:
        CheckpointError: If there is no such dtype.

    Example:
        >>> torch_dtype("bfloat16")
        torch.bfloat16
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype is {dtype!r}; use 'float32', 'bfloat16', 'float16', 'float64' or 'auto'.")
    return found


def _storage_dtype(storage: str | torch.dtype | None) -> torch.dtype | Literal["auto"] | None:
    if storage is None or storage == "auto":
        return storage  # type: ignore[return-value]
    try:
        found = torch_dtype(storage)
    except CheckpointError:
        raise CheckpointError(
            f"storage is {storage!r}; use 'auto', 'bfloat16', 'float16', 'float32' or None."
        ) from None
    assert isinstance(found, torch.dtype)
    return found


def _place(folder: str | Path, base_model: str | Path | nn.Module | None) -> Place:
    """Return where a checkpoint has its parts.

    Raises:
        CheckpointError: If there is no folder, or it has no weights or no configuration.
    """
    path = path_of(folder, "The checkpoint")
    if not path.exists():
        raise CheckpointError(f"The checkpoint folder {path} does not exist.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the checkpoint folder that holds it.")
    place = place_of(path)
    if place.weights is None or (place.home is None and place.weights.layout == "whole"):
        refuse_missing_weights(place)
    if place.home is None:
        place = place._replace(home=_home(place, base_model))
    elif base_model is not None and not _is_adapter(place):
        raise CheckpointError(f"{path} holds a full model; base_model is for adapter folders, leave it out.")
    if place.framework is not None:
        text = f"{place.folder} is a checkpoint of {place.framework}, whose shards are put together in reading."
        warnings.warn(FuncprobeWarning(Note("framework", text)), stacklevel=3)
    return place


def _home(place: Place, base_model: str | Path | nn.Module | None) -> Path:
    """Return the folder that gives a checkpoint without a configuration one, and a tokenizer.

    Raises:
        CheckpointError: If none is given, or it has no configuration.
    """
    if base_model is None or isinstance(base_model, nn.Module):
        raise CheckpointError(
            f"{place.folder} holds weights and no config.json; give the folder of the model that the run started from "
            "as base_model: its configuration and tokenizer are used, its weights are not."
        )
    home = path_of(base_model, "base_model")
    found = home if (home / "config.json").is_file() else cached_model(str(base_model))
    if found is None:
        raise CheckpointError(f"base_model is '{base_model!s:.80}', where no config.json was found.")
    return found


def _is_adapter(place: Place) -> bool:
    return place.home is not None and (place.home / "adapter_config.json").is_file()


def _check_request(place: Place, optimizer: str | None, lr: float | None) -> None:
    """Check, before a model is loaded, for requests that would make it useless.

    Raises:
        CheckpointError: If an argument is wrong, or the optimizer's state is wanted and missing.
    """
    if optimizer not in ("auto", "fresh", None):
        raise CheckpointError(f"optimizer is {optimizer!r}; use 'auto', 'fresh' or None.")
    if optimizer == "fresh" and lr is None:
        raise CheckpointError("optimizer 'fresh' has no learning rate of its own; set lr.")
    if optimizer == "auto" and place.optimizer is None:
        refuse_missing_optimizer(place)


def _optimizer(
    place: Place, params: Params, optimizer: str | None, lr: float | None, offload: str | None
) -> tuple[Optimizer | None, OptState | None, dict[str, torch.dtype]]:
    """Return the optimizer, its state, and the dtype that each leaf's moments are saved in."""
    if optimizer is None:
        return None, None, {}
    if optimizer == "auto":
        saved = place.saved_state(mapped=offload is not None)
        return read_optimizer(saved, params, lr, on_disk=offload is not None)
    warnings.warn(
        "optimizer='fresh': a first AdamW step is sign-like, about lr in every entry whatever the gradient's size, and "
        "represents nothing of the run.",
        FuncprobeWarning,
        stacklevel=3,
    )
    assert lr is not None  # _check_request has seen to it
    fresh = adamw(lr, weight_decay=0.0)
    return fresh, fresh.init(params), {}
