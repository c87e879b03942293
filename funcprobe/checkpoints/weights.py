"""Names, shapes and dtypes of a checkpoint's weights from the headers of safetensors files, before any is loaded.

A wrapper that stood round the model when it was saved leaves its name in every key: torch.compile `_orig_mod.`, DDP
`module.`, activation checkpointing `_checkpoint_wrapped_module.`, FSDP `_fsdp_wrapped_module.`, peft
`base_model.model.` and `.base_layer`. None of them belongs to the model, and all are left out in reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcprobe.data.reading import check_ordinary, json_object, parsed
from funcprobe.errors import CheckpointError, InputError

#: Wrappers, as patterns for `re.sub` and for transformers' `key_mapping`, and what stands in their place.
WRAPPERS: Mapping[str, str] = {
    r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+": "",
    r"\b(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.": "",
    r"\.base_layer\.": ".",
}

#: Names under which peft keeps what it adds to a model.
_ADDED_BY_PEFT = re.compile(
    r"\.(lora_|ia3_l|vera_lambda|oft_[RS]|hada_|lokr_|boft_|trainable_tokens|modules_to_save\.|original_module\.)"
)

#: The name of a shard: no folder, and safetensors alone.
_SHARD = re.compile(r"[^/\\\x00]+\.safetensors")

#: Bytes of a header at most, as safetensors itself has it.
_HEADER = 100_000_000

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored(NamedTuple):
    """One tensor in a file, by its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  #: None for anything that no weight is stepped in: integers, float8


class ShardedWeights(NamedTuple):
    """Weights that several processes wrote, each a part, by name: described before they are read."""

    stored: Mapping[str, Stored]
    read: Callable[[str], Tensor]  #: one of them, whole


def header(path: Path, name: str = "model") -> dict[str, Stored]:
    """Return every tensor of a folder's `name.safetensors`, or of the shards in its index, under its name in the file.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    found: dict[str, Stored] = {}
    for file in _files(path, name):
        try:
            found |= _header_of(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors ({error}); the file is damaged.") from error
    return found


def plain_name(key: str) -> str:
    """Return the name of a weight without the wrappers that the model was saved in.

    Example:
        >>> plain_name("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.weight")
        'model.layers.0.mlp.weight'
    """
    for pattern, instead in WRAPPERS.items():
        key = re.sub(pattern, instead, key)
    return key


def wrapped(path: Path, keys: Iterable[str]) -> str | None:
    """Return the first key that carries a wrapper's name; None where none does.

    Raises:
        CheckpointError: If two keys are one weight without their wrappers.
    """
    found: dict[str, str] = {}
    first = None
    for key in keys:
        plain = plain_name(key)
        if plain in found:
            raise CheckpointError(
                f"The weights in {path} hold '{plain}' twice, as '{found[plain]}' and as '{key}'; save the unwrapped "
                "model once."
            )
        found[plain] = key
        first = key if first is None and plain != key else first
    return first


def refuse_unmerged(path: str | Path, unexpected: Iterable[str]) -> None:
    """Hold the weights that a model has no place for against those of an adapter, which are never left out.

    Raises:
        CheckpointError: If one is an adapter's.
    """
    if added := [key for key in unexpected if _ADDED_BY_PEFT.search(key)]:
        raise CheckpointError(
            f"The weights in {path} hold '{added[0]}', which a peft adapter adds: without it the model would be "
            "another one. Save the adapter as a folder of its own (save_pretrained), or merge it (merge_and_unload)."
        )


def check_finite(path: str | Path, module: nn.Module, *, trainable: bool = False) -> None:
    """Hold every weight, or every trainable one, against NaN and infinity.

    Raises:
        CheckpointError: Naming the first leaf that holds one, and how many do.
    """
    held = [(n, p.detach()) for n, p in module.named_parameters() if p.requires_grad or not trainable]
    bad = [(n, p) for n, p in held if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if bad:
        name, leaf = bad[0]
        count = int((~torch.isfinite(leaf)).sum())
        more = f", and {len(bad) - 1} other leaves hold some" if len(bad) > 1 else ""
        raise CheckpointError(
            f"The weights in {path} are not finite: '{name}' holds {count} of {leaf.numel()} entries that are NaN or "
            f"infinite{more}. The run had diverged when it was saved, or the dtype is too narrow; use an earlier "
            "checkpoint, or a wider dtype."
        )


def dtypes_of_leaves(leaves: Iterable[str], stored: Mapping[str, Stored]) -> dict[str, torch.dtype]:
    """Return the dtype in the file of every leaf, as far as it can be told.

    A leaf that has no tensor of its name (transformers merges experts, say) has the dtype that all tensors without a
    leaf share, if they share one.
    """
    known = {plain_name(key): tensor.dtype for key, tensor in stored.items() if tensor.dtype is not None}
    names = list(leaves)
    rest = {dtype for name, dtype in known.items() if name not in set(names)}
    shared = next(iter(rest)) if len(rest) == 1 else None
    found = {name: known.get(name, shared) for name in names}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _files(path: Path, name: str) -> list[Path]:
    whole, index = path / f"{name}.safetensors", path / f"{name}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(path.glob(f"{name}*.safetensors"))
    shards = _shards(index)
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise CheckpointError(f"{path} lacks '{missing[0]}', a shard that its index names; copy the whole folder.")
    return [path / shard for shard in shards]


def _shards(index: Path) -> list[str]:
    """Return the files that an index names, all of them safetensors beside it.

    Raises:
        CheckpointError: If it names none, or anything else.
    """
    try:
        named = json_object(index).get("weight_map")
    except InputError as error:
        raise CheckpointError(f"the index of the weights cannot be read: {error}") from None
    shards = list(named.values()) if isinstance(named, dict) else []
    if not shards:
        raise CheckpointError(f"{index} names no shards; the index is damaged.")
    for shard in shards:
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index} names {shard!r:.80} as a shard; expected the name of a .safetensors file beside the index, "
                "and nothing else is read."
            )
    return sorted(set(shards))


def _header_of(file: Path) -> dict[str, Stored]:
    check_ordinary(file)
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= min(file.stat().st_size, _HEADER):
            raise ValueError("its header does not fit into it")
        plain = parsed(stream.read(size))
    return {
        key: Stored(tuple(entry["shape"]), _DTYPES.get(entry["dtype"]))
        for key, entry in plain.items()
        if key != "__metadata__"
    }
