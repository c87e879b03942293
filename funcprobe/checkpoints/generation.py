"""Which tokens end a completion, as a checkpoint's generation configuration and tokenizer say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from funcprobe.data.reading import json_object
from funcprobe.errors import CheckpointError, InputError


def end_tokens(folder: Path, module: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids of every token that ends a completion, rising: several in Qwen2.5 and Llama 3.

    They are those of the folder's `generation_config.json`, or of the base model's where an adapter has none, and the
    tokenizer's own.

    Raises:
        CheckpointError: If `eos_token_id` in the file is neither a token id nor a list of them.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        found = _of_file(file)
    else:
        found = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    own = getattr(tokenizer, "eos_token_id", None)
    ids = [*_listed(found, file), *([] if own is None else [int(own)])]
    return tuple(sorted(set(ids)))


def _of_file(file: Path) -> Any:
    try:
        return json_object(file).get("eos_token_id")
    except InputError as error:
        raise CheckpointError(str(error)) from None


def _listed(found: Any, file: Path) -> Sequence[int]:
    ids = [] if found is None else found if isinstance(found, list | tuple) else [found]
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]:
        raise CheckpointError(f"eos_token_id in {file} holds {wrong[0]!r}; expected a token id, or a list of them.")
    return ids
