"""A Hugging Face or TRL checkpoint folder, as policy, parameters, optimizer and optimizer state.

Read are `config.json` with `model.safetensors` (or shards and index), or `adapter_config.json` with
`adapter_model.safetensors` over a base model; the tokenizer; `generation_config.json`; and `optimizer.pt`, which
accelerate calls `optimizer.bin`. Nothing is unpickled but the optimizer's state, and that through `weights_only=True`,
which admits tensors and plain containers alone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from funcprobe.checkpoints.adapters import adapter_dtypes, load_adapter
from funcprobe.checkpoints.checkpoint import Checkpoint
from funcprobe.checkpoints.generation import end_tokens
from funcprobe.checkpoints.models import load_full, load_tokenizer
from funcprobe.checkpoints.optimizer_state import FRESH
from funcprobe.checkpoints.run_storage import at_storage, storage_asked_for, storage_of_run
from funcprobe.checkpoints.saved_optimizer import read_optimizer
from funcprobe.checkpoints.saved_state import state_of_file
from funcprobe.checkpoints.weights import dtypes_of_leaves, header
from funcprobe.data.paths import path_of
from funcprobe.errors import CheckpointError, FuncprobeWarning
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
    """Return the checkpoint in a folder, with `optimizer.pt` mapped to parameter names or a refusal.

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
            the working directory, `folder` or its parent (refused where several hold a model), or a cached model.
        optimizer: "auto" reads `optimizer.pt`, and never does without it. "fresh" is AdamW (weight decay 0, as TRL's
            default) with an empty state at `lr`. None reads no optimizer.
        lr: The learning rate of the step; overrides the saved one in every group.
        dtype: What the weights are loaded as; float32 holds bfloat16 and float16 files exactly.
        device: Where the policy, its parameters and the moments go.
        storage: The dtype that the run keeps weights and moments in. "auto" reads it leaf by leaf from the headers of
            the files, and warns where weights and moments differ in it; a dtype sets it for every leaf, and rounds
            weights that are none of its numbers, with a warning; None stores what is computed.
        offload: "cpu" leaves the moments in the file, which is mapped into memory and must stay as it is, and has every
            gradient kept in the machine's memory: the step takes both from there, a piece of a leaf at a time. For a
            model that would not fit its device otherwise, stepped by SGD, Adam or AdamW; any other optimizer has its
            state read as ever.

    Raises:
        CheckpointError: If the folder, the weights, the adapter or the optimizer state cannot be read faithfully, a
            weight is not finite, or `dtype` does not hold what `storage` asks for.
        InputError: If `lr` is negative or not finite, or `offload` is something else.
        MissingExtraError: If transformers, or for an adapter peft, is not installed.
    """
    check_offload(offload)
    path, kept = _existing(folder), _storage_dtype(storage)
    _check_request(path, optimizer, lr)
    is_adapter = (path / "adapter_config.json").is_file()
    if is_adapter:
        module, base = load_adapter(path, base_model, torch_dtype(dtype), device)
    else:
        if base_model is not None:
            raise CheckpointError(f"{path} holds a full model; base_model is for adapter folders, leave it out.")
        module, base = load_full(path, torch_dtype(dtype), device), None
    policy, params = from_module(module)
    found, state, moments = _optimizer(path, params, optimizer, lr, offload)
    if kept == "auto":
        weights = adapter_dtypes(path, module) if is_adapter else dtypes_of_leaves(params, header(path))
        keeps = storage_of_run(params, weights, moments)
    else:
        keeps = {} if kept is None else storage_asked_for(params, kept)
    params, state = at_storage(params, state, keeps)
    tokenizer = load_tokenizer(path, base)
    found = None if found is None else stored(found, keeps)
    return Checkpoint(policy, params, found, state, tokenizer, keeps, end_tokens(path, module, tokenizer), offload)


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


def _existing(folder: str | Path) -> Path:
    path = path_of(folder, "The checkpoint")
    if not path.exists():
        raise CheckpointError(f"The checkpoint folder {path} does not exist.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the checkpoint folder that holds it.")
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        _refuse_shards(path, "the weights")
        inner = sorted(p.name for p in path.glob("checkpoint-*") if p.is_dir())
        hint = f" It holds {inner[-1]}: give that folder." if inner else ""
        raise CheckpointError(
            f"{path} has neither config.json (a full model) nor adapter_config.json (an adapter).{hint}"
        )
    weights = "model" if not (path / "adapter_config.json").is_file() else "adapter_model"
    if not list(path.glob(f"{weights}*.safetensors")):
        _refuse_shards(path, "the weights")
        _refuse_pickled_weights(path)
        raise CheckpointError(f"{path} holds no {weights}.safetensors; the weights are missing.")
    return path


def _check_request(path: Path, optimizer: str | None, lr: float | None) -> None:
    """Check, before a model is loaded, for requests that would make it useless.

    Raises:
        CheckpointError: If an argument is wrong, or `optimizer.pt` is wanted and missing.
    """
    if optimizer not in ("auto", "fresh", None):
        raise CheckpointError(f"optimizer is {optimizer!r}; use 'auto', 'fresh' or None.")
    if optimizer == "fresh" and lr is None:
        raise CheckpointError("optimizer 'fresh' has no learning rate of its own; set lr.")
    if optimizer == "auto" and not _optimizer_file(path).is_file():
        _refuse_shards(path, "the optimizer state")
        raise CheckpointError(
            f"{path} holds no optimizer.pt, so Adam's moments are unknown and so is the step that the run would take "
            f"(the trainer was told to save the model only?). {FRESH}, which represents nothing of the run."
        )


def _optimizer(
    path: Path, params: Params, optimizer: str | None, lr: float | None, offload: str | None
) -> tuple[Optimizer | None, OptState | None, dict[str, torch.dtype]]:
    """Return the optimizer, its state, and the dtype that each leaf's moments are saved in."""
    if optimizer is None:
        return None, None, {}
    if optimizer == "auto":
        saved = state_of_file(_optimizer_file(path), mapped=offload is not None)
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


def _optimizer_file(path: Path) -> Path:
    """Return the file of the optimizer's state: `optimizer.pt`, or `optimizer.bin`, as accelerate calls the same."""
    whole, other = path / "optimizer.pt", path / "optimizer.bin"
    return other if other.is_file() and not whole.is_file() else whole


def _refuse_pickled_weights(path: Path) -> None:
    if pickled := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(f"*model*{pattern[1:]}")):
        raise CheckpointError(
            f"{path} holds its weights as {pickled[0]}, a pickle, which is never loaded; convert it to safetensors "
            "(load it where you trust it, then model.save_pretrained(folder), which writes safetensors)."
        )


def _refuse_shards(path: Path, what: str) -> None:
    """Name the framework whose shards stand where the file `what` should be.

    Raises:
        CheckpointError: If there are such shards.
    """
    for framework, patterns in _SHARDS.items():
        if found := sorted(p.name for pattern in patterns for p in path.glob(pattern)):
            raise CheckpointError(
                f"{path} holds {what} as {framework} shards ({found[0]}), which are not read. Supported are "
                "safetensors weights with the optimizer.pt of transformers.Trainer and TRL without sharding; or use "
                "from_training(model, optimizer) in an unsharded training process."
            )


_SHARDS = {
    "DeepSpeed": ("global_step*", "*_optim_states.pt", "zero_to_fp32.py", "*_model_states.pt"),
    "FSDP": ("optimizer_[0-9]*", "pytorch_model_fsdp*", "*.distcp"),
}
