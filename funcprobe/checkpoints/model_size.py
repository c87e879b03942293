"""The model of a configuration against the weights beside it, by arithmetic, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from funcprobe.checkpoints.weights import Stored
from funcprobe.data.reading import json_object
from funcprobe.errors import CheckpointError, InputError

#: How configurations call the number of layers.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")

#: Layers that may share their weights, so that a file holds fewer tensors than the model has layers.
_SHARED = 256

#: Names of the weights elsewhere than in the folder's own files, which transformers would follow.
_ELSEWHERE = ("transformers_weights",)

#: A model of so many numbers more than the file holds is another one: what is not saved is tied, or small.
_FACTOR = 4

#: A size beyond both is looked into.
_ORDINARY = 2**20


def check_size(path: Path, stored: Mapping[str, Stored]) -> None:
    """Refuse a configuration whose model cannot be that of the weights beside it.

    Sizes that are in proportion to the file cost nothing. Others are built on `meta`, where a tensor has no memory.

    Raises:
        CheckpointError: If the configuration is none, or describes a model that is out of proportion.
    """
    file = path / "config.json"
    try:
        config = json_object(file)
    except InputError as error:
        raise CheckpointError(f"the checkpoint's configuration cannot be read: {error}") from None
    if named := [key for key in _ELSEWHERE if key in config]:
        raise CheckpointError(
            f"{file} holds '{named[0]}', a name of other weights, which is not followed; leave it out."
        )
    largest = max((size for tensor in stored.values() for size in tensor.shape), default=1)
    for name, value in _sizes(config):
        if not -(2**63) <= value < 2**63:
            raise CheckpointError(f"{name} in {file} is an integer of more than 64 bits; the file is damaged.")
        if name in _LAYERS and value > max(len(stored), _SHARED):
            raise CheckpointError(
                f"{name} in {file} is {value:,}, and the weights hold {len(stored):,} tensors; they are of "
                "different models."
            )
    if any(value > max(_ORDINARY, 4 * largest) for _, value in _sizes(config)):
        _check_on_meta(path, file, sum(math.prod(tensor.shape) for tensor in stored.values()))


def _check_on_meta(path: Path, file: Path, held: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        wanted = sum(leaf.numel() for leaf in module.parameters())
    except Exception as error:  # whatever a model says of sizes that it cannot have
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} describes no model that can be built: {reason}") from error
    if wanted > _FACTOR * max(held, 1):
        raise CheckpointError(
            f"{file} describes {wanted:,} numbers, and the weights hold {held:,}; they are of different models."
        )


def _sizes(plain: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer in a configuration, under its own name."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _sizes(value, str(key))
    elif isinstance(plain, list):
        for value in plain:
            yield from _sizes(value, name)
    elif isinstance(plain, int) and not isinstance(plain, bool):
        yield name, plain
