"""Adapters of peft over a base model, checked against the contents of their file.

peft fills what a file lacks with fresh weights, without a word. Here that is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcprobe.checkpoints.models import first_line, listing, load_full, quiet, ready, structural_copy
from funcprobe.checkpoints.weights import Stored, check_finite, header
from funcprobe.data.paths import path_of
from funcprobe.data.reading import json_object
from funcprobe.errors import CheckpointError, InputError, missing_extra

#: The name of a model in the Hugging Face cache.
_MODEL_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")

#: Where a base model's own weight stands inside what peft put round its module, and in its place.
_BASE_WEIGHTS = ("", "base_layer.", "original_module.", "token_adapter.base_layer.")


def load_adapter(
    path: Path, base_model: str | Path | nn.Module | None, dtype: torch.dtype | str, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Path | None]:
    """Return (the base model with the adapter in a folder, where the base lies); only the adapter is trainable.

    Every key in `adapter_model.safetensors` is held against the live names: file `…lora_A.weight` is live
    `…lora_A.default.weight`, and likewise for `modules_to_save`.

    Raises:
        CheckpointError: If the base is not found, or the adapter's keys or shapes do not fit it.
        MissingExtraError: If peft is not installed.
    """
    try:
        import peft  # noqa: F401  found missing here, before a base is loaded
    except ImportError as error:
        missing = missing_extra("peft", "hf", "reading an adapter")
        raise missing from error
    config, stored = _config(path), header(path, "adapter_model")
    _refuse_lost_encoder(path, config)
    base, where = _base(path, base_model, dtype)
    _part_embeddings(base, stored)
    try:
        with quiet():
            module = _adapted(base, path, prompt=config.is_prompt_learning)
    except Exception as error:  # peft raises what the failing step happens to raise
        raise CheckpointError(f"The adapter in {path} does not fit the base model: {_mismatch(error)}") from error
    _check_adapter(path, module, stored)
    check_finite(path, module, trainable=True)
    return ready(module, device), where


def adapter_dtypes(path: Path, module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype in the file of every trainable leaf of a loaded adapter, as far as it can be told."""
    from peft import get_peft_model_state_dict

    stored = header(path, "adapter_model")
    live = {(p.data_ptr(), tuple(p.shape)): name for name, p in module.named_parameters() if p.requires_grad}
    with quiet():
        expected = get_peft_model_state_dict(module, save_embedding_layers=False)
    found = {live.get((t.data_ptr(), tuple(t.shape))): stored[key].dtype for key, t in expected.items()}
    dtypes = {tensor.dtype for tensor in stored.values()}
    shared = next(iter(dtypes)) if len(dtypes) == 1 else None  # a prompt encoder saves what it makes, and no leaf
    known = {name: found.get(name, shared) for name in live.values()}
    return {name: dtype for name, dtype in known.items() if dtype is not None}


def _adapted(base: nn.Module, path: Path, *, prompt: bool) -> nn.Module:
    """Return the base with the adapter of a folder on it, its parameters trainable.

    peft loads what it prepends to a prompt for inference only; its embedding is the whole of its file all the same.
    """
    from peft import PeftModel

    module: Any = PeftModel.from_pretrained(base, str(path), is_trainable=not prompt, local_files_only=True)
    if prompt:
        module.prompt_encoder.requires_grad_(True)
    return module


def _refuse_lost_encoder(path: Path, config: Any) -> None:
    """Refuse an adapter whose file holds the product of its trained parameters, and not the parameters themselves.

    Raises:
        CheckpointError: If it is one.
    """
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if name == "P_TUNING" or getattr(config, "prefix_projection", False):
        raise CheckpointError(
            f"The adapter in {path} is {name} with an encoder of its own, of which peft saves the output and not the "
            "parameters, so the step of the run cannot be taken from it; use from_training(model, optimizer) in the "
            "training process."
        )


def _part_embeddings(base: nn.Module, stored: dict[str, Stored]) -> None:
    """Give the base its own copy of embeddings that the adapter's file holds too: peft writes over them in place."""
    for name, module in base.named_modules():
        kept = tuple(f".{name}.{inner}weight" for inner in _BASE_WEIGHTS)
        if name and any(key.endswith(kept) for key in stored):
            for leaf in module.parameters(recurse=False):
                leaf.data = leaf.data.clone()


def _base(
    path: Path, base_model: str | Path | nn.Module | None, dtype: torch.dtype | str
) -> tuple[nn.Module, Path | None]:
    if isinstance(base_model, nn.Module):
        module = structural_copy(base_model)
        return (module if dtype == "auto" else module.to(dtype)), None
    named = base_model if base_model is not None else _named_base(path)
    given = path_of(named, "base_model" if base_model is not None else f"The base model in {path}")
    where = _only_place(path, given, [given] if base_model is not None else [given, path / given, path.parent / given])
    where = where or cached_model(str(named))
    if where is None:
        raise CheckpointError(
            f"The base model '{named!s:.80}' of the adapter in {path} was found neither as a folder (as given, or "
            "beside the adapter) nor in the local Hugging Face cache; give its folder as base_model."
        )
    if (where / "adapter_config.json").is_file():
        raise CheckpointError(
            f"The base model of the adapter in {path} is {where}, an adapter itself; merge that one into its base "
            "(merge_and_unload), and give the merged model as base_model."
        )
    return load_full(where, dtype), where


def cached_model(name: str) -> Path | None:
    """Return the folder in the local Hugging Face cache that holds a model of that name; nothing is downloaded."""
    from huggingface_hub import snapshot_download

    if not _MODEL_NAME.fullmatch(name):
        return None
    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # whatever the hub's client says of a model that is not there
        return None
    return found if (found / "config.json").is_file() else None


def _only_place(path: Path, named: Path, candidates: list[Path]) -> Path | None:
    """Return the one folder among the candidates that holds a model, or None.

    Raises:
        CheckpointError: If several do: a relative name says nothing about where it was relative to.
    """
    places = {c.resolve(): c for c in candidates if (c / "config.json").is_file()}
    if len(places) > 1:
        listed = " and ".join(str(place) for place in places)
        raise CheckpointError(
            f"The base model '{named}' of the adapter in {path} is a relative path that leads to several models: "
            f"{listed}. Give the one that the adapter was trained on as base_model."
        )
    return next(iter(places.values()), None)


def _config(path: Path) -> Any:
    from peft import PeftConfig

    file = path / "adapter_config.json"
    try:
        named = json_object(file).get("base_model_name_or_path")
    except InputError as error:
        raise CheckpointError(f"the adapter's configuration cannot be read: {error}") from None
    if named is not None and not isinstance(named, str):
        raise CheckpointError(f"base_model_name_or_path in {file} is {named!r:.60}; expected the base model's folder.")
    try:
        with quiet():
            return PeftConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error


def _named_base(path: Path) -> str:
    named = _config(path).base_model_name_or_path
    if not named:
        raise CheckpointError(f"{path / 'adapter_config.json'} names no base model; give its folder as base_model.")
    return str(named)


def _check_adapter(path: Path, module: nn.Module, tensors: dict[str, Stored]) -> None:
    """Hold the file's keys and shapes against the adapter that was built on the base.

    Raises:
        CheckpointError: Naming what is missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict

    stored = {key: tensor.shape for key, tensor in tensors.items()}
    with quiet():
        expected = get_peft_model_state_dict(module, save_embedding_layers=False)
        # a resized vocabulary is saved whole beside the adapter, trained copies under a second name
        beside = get_peft_model_state_dict(module, save_embedding_layers=True)
    whole = module.state_dict()  # embeddings may be saved beside the adapter, under their own names
    live = {key: tuple(t.shape) for key, t in [*whole.items(), *beside.items(), *expected.items()]}
    missing = sorted(set(expected) - set(stored))
    if missing or (unexpected := sorted(set(stored) - set(live))):
        detail = f"the file lacks {listing(missing)}" if missing else f"the base has no place for {listing(unexpected)}"
        raise CheckpointError(f"The adapter in {path} does not fit the base model: {detail}.")
    if wrong := [key for key in stored if stored[key] != live[key]]:
        raise CheckpointError(
            f"The adapter in {path} does not fit the base model: '{wrong[0]}' has shape {stored[wrong[0]]} in the file "
            f"and {live[wrong[0]]} on the base."
        )


def _mismatch(error: Exception) -> str:
    """Return the line that names the leaf, where there is one, and the fix where it is the vocabulary's size."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if "size mismatch" in line), first_line(error))
    sizes = re.findall(r"torch\.Size\(\[(\d+), (\d+)\]\)", line)
    if len(sizes) == 2 and sizes[0][1] == sizes[1][1] and re.search(r"embed|lm_head|wte|embd", line):
        rows = sizes[0][0]
        line += (
            f" Its run resized the vocabulary: call base.resize_token_embeddings({rows}) and give base as base_model."
        )
    return line
