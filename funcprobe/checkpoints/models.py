"""Models and tokenizers from local folders through transformers, checked against the contents of the files.

transformers fills what a file lacks with random weights and a log line. Here that is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcprobe.checkpoints.model_size import check_size
from funcprobe.checkpoints.weights import (
    WRAPPERS,
    ShardedWeights,
    check_finite,
    header,
    plain_name,
    refuse_unmerged,
    wrapped,
)
from funcprobe.data.reading import json_object
from funcprobe.errors import CheckpointError, FuncprobeWarning, InputError, missing_extra
from funcprobe.policy import copying
from funcprobe.types import Params

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_full(
    path: Path,
    dtype: torch.dtype | str,
    device: str | torch.device = "cpu",
    shards: ShardedWeights | None = None,
) -> nn.Module:
    """Return the causal language model in a folder, in eval mode, without cache, every parameter trainable.

    With `shards`, the folder gives the configuration and they the weights.

    Raises:
        CheckpointError: If a file in it is damaged, or not data alone; if the model of its configuration is not that of
            its weights, or transformers cannot read it.
        MissingExtraError: If transformers is not installed.
    """
    try:
        import transformers  # noqa: F401  found missing here, before a file is read
    except ImportError as error:
        missing = missing_extra("transformers", "hf", "reading a Hugging Face checkpoint")
        raise missing from error
    stored = header(path) if shards is None else shards.stored
    check_size(path, stored)
    keys = _wrapped_keys(path, stored)
    try:
        with quiet():
            module, info = _from_pretrained(path, shards, dtype=dtype, **keys)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers, safetensors or a JSON parser say about a folder
        raise CheckpointError(f"transformers cannot read the model in {path}: {first_line(error)}") from error
    _check_complete(path, info)
    _check_tied(path, module)
    check_finite(path, module)
    return ready(module.requires_grad_(True), device)


def _from_pretrained(path: Path, shards: ShardedWeights | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model and transformers' account of the keys that were missing, unexpected, or of another shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    local = {"local_files_only": True, "trust_remote_code": False}
    options |= {
        "attn_implementation": "sdpa",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported, and refused with the names
    }
    found: Any
    if shards is None:
        found = AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, **local, **options)
    else:
        config = AutoConfig.from_pretrained(str(path), **local)
        with torch.device("meta"):
            cls: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        weights = {name: shards.read(name) for name in shards.stored}
        found = cls.from_pretrained(None, config=config, state_dict=weights, **options)
    module, info = found
    return module, info


def load_tokenizer(*folders: Path | None) -> Any:
    """Return the tokenizer of the first folder that has one, or None.

    A `tokenizer.json` whose configuration names the generic class is read as it stands. AutoTokenizer (5.23) would go
    by the model type of `config.json` instead, and rebuild a custom vocabulary beside a Qwen2 as Qwen2's own, so that
    words become no tokens at all without a word said.

    Raises:
        CheckpointError: If its files cannot be read.
    """
    found = next((f for f in folders if f and any((f / name).is_file() for name in _TOKENIZER_FILES)), None)
    if found is None:
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reader: Any = PreTrainedTokenizerFast if _names_generic_tokenizer(found) else AutoTokenizer
    try:
        with quiet():
            return reader.from_pretrained(str(found), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers, sentencepiece and JSON parsers each raise their own
        raise CheckpointError(f"The tokenizer in {found} cannot be read: {first_line(error)}") from error


def structural_copy(module: nn.Module, params: Params | None = None) -> nn.Module:
    """Return a copy of a module whose parameters are new objects over the same storage, or over that of `params`.

    Flags and submodules of the copy can change without the original noticing; tied parameters stay tied.
    """
    leaves = params or {}
    return copying.structural_copy(
        module,
        {
            id(p): nn.Parameter(leaves[name].detach() if name in leaves else p.detach(), p.requires_grad)
            for name, p in module.named_parameters()
        },
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' log lines, warnings and progress bars off the terminal, and the global generator still."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _names_generic_tokenizer(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        named = json_object(config).get("tokenizer_class")
    except InputError:
        return False  # AutoTokenizer will say what is wrong with it
    return named in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _wrapped_keys(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Return how transformers is told to leave a wrapper's name out of the weights' keys; nothing where there is none.

    Raises:
        CheckpointError: If two keys are one weight without their wrappers.
    """
    first = wrapped(path, keys)
    if first is None:
        return {}
    warnings.warn(
        f"The weights in {path} were saved inside a wrapper ('{first}'); its name is left out in reading, as in "
        f"'{plain_name(first)}'.",
        FuncprobeWarning,
        stacklevel=4,
    )
    return {"key_mapping": dict(WRAPPERS)}


def _check_tied(path: str | Path, module: Any) -> None:
    """Say so where the configuration ties the head to the embedding, and the file holds another one."""
    config = module.config.get_text_config()
    ends = module.get_input_embeddings(), module.get_output_embeddings()
    if getattr(config, "tie_word_embeddings", False) and all(hasattr(end, "weight") for end in ends):
        if ends[0].weight is ends[1].weight:
            return
        warnings.warn(
            f"config.json in {path} ties the head to the embedding, and the weights hold a head that differs from it; "
            "they are read as two, as transformers reads them. If the run trained one, save it with "
            "save_pretrained again.",
            FuncprobeWarning,
            stacklevel=4,
        )


def _check_complete(path: str | Path, info: dict[str, Any]) -> None:
    missing, mismatched = sorted(info.get("missing_keys") or ()), list(info.get("mismatched_keys") or ())
    if missing or mismatched:
        detail = f"the file lacks {listing(missing)}" if missing else f"shapes differ: {listing(mismatched)}"
        raise CheckpointError(f"The weights in {path} do not fill the model of config.json: {detail}.")
    if unexpected := sorted(info.get("unexpected_keys") or ()):
        refuse_unmerged(path, unexpected)
        warnings.warn(
            f"The weights in {path} hold more than the model takes ({listing(unexpected)}); that is left out.",
            FuncprobeWarning,
            stacklevel=4,
        )


def ready(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Return a module in eval mode, without cache, on a device."""
    module.eval().to(device)
    module.config.use_cache = False  # type: ignore[union-attr]
    return module


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def listing(names: list[Any], limit: int = 3) -> str:
    """Return the first of many names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more
