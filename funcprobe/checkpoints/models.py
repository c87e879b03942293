"""Models and tokenizers from local folders through transformers and peft, held against what the files hold.

Both libraries fill what a file lacks with random weights and a log line. Here that is an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcprobe.errors import CheckpointError, FuncprobeWarning, missing_extra
from funcprobe.policy import copying
from funcprobe.types import Params

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_full(path: str | Path, dtype: torch.dtype | str, device: str | torch.device = "cpu") -> nn.Module:
    """Return the causal language model in a folder, in eval mode, without cache, every parameter trainable.

    Raises:
        CheckpointError: If transformers cannot read it, or the file lacks weights of the model.
        MissingExtraError: If transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        missing = missing_extra("transformers", "hf", "reading a Hugging Face checkpoint")
        raise missing from error
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info`, and refused below with the names
            )
    except Exception as error:  # whatever transformers, safetensors or a JSON parser say about a folder
        raise CheckpointError(f"transformers cannot read the model in {path}: {_first_line(error)}") from error
    module, info = loaded
    _check_complete(path, info)
    return _ready(module.requires_grad_(True), device)


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
        from peft import PeftModel
    except ImportError as error:
        missing = missing_extra("peft", "hf", "reading an adapter")
        raise missing from error
    base, where = _base(path, base_model, dtype)
    try:
        with quiet():
            module = PeftModel.from_pretrained(base, str(path), is_trainable=True, local_files_only=True)
    except Exception as error:  # peft raises what the failing step happens to raise
        raise CheckpointError(f"The adapter in {path} does not fit the base model: {_mismatch(error)}") from error
    _check_adapter(path, module)
    return _ready(module, device), where


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
        raise CheckpointError(f"The tokenizer in {found} cannot be read: {_first_line(error)}") from error


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


def _base(
    path: Path, base_model: str | Path | nn.Module | None, dtype: torch.dtype | str
) -> tuple[nn.Module, Path | None]:
    if isinstance(base_model, nn.Module):
        module = structural_copy(base_model)
        return (module if dtype == "auto" else module.to(dtype)), None
    named = base_model if base_model is not None else _named_base(path)
    given = Path(named).expanduser()
    where = _only_place(path, given, [given] if base_model is not None else [given, path / given, path.parent / given])
    try:
        return load_full(where or str(named), dtype), where
    except CheckpointError as error:
        if where is not None:
            raise
        raise CheckpointError(
            f"The base model '{named}' of the adapter in {path} was found neither as a folder (as given, or beside the "
            "adapter) nor in the local Hugging Face cache; give its folder as base_model."
        ) from error


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


def _named_base(path: Path) -> str:
    from peft import PeftConfig

    try:
        with quiet():
            named = PeftConfig.from_pretrained(str(path), local_files_only=True).base_model_name_or_path
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise CheckpointError(f"{path / 'adapter_config.json'} cannot be read: {_first_line(error)}") from error
    if not named:
        raise CheckpointError(f"{path / 'adapter_config.json'} names no base model; give its folder as base_model.")
    return str(named)


def _names_generic_tokenizer(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError):
        return False  # AutoTokenizer will say what is wrong with it
    return named in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _check_complete(path: str | Path, info: dict[str, Any]) -> None:
    missing, mismatched = sorted(info.get("missing_keys") or ()), list(info.get("mismatched_keys") or ())
    if missing or mismatched:
        detail = f"the file lacks {_listing(missing)}" if missing else f"shapes differ: {_listing(mismatched)}"
        raise CheckpointError(f"The weights in {path} do not fill the model of config.json: {detail}.")
    if unexpected := sorted(info.get("unexpected_keys") or ()):
        warnings.warn(
            f"The weights in {path} hold more than the model takes ({_listing(unexpected)}); that is left out.",
            FuncprobeWarning,
            stacklevel=4,
        )


def _check_adapter(path: Path, module: nn.Module) -> None:
    """Hold the file's keys and shapes against the adapter that was built on the base.

    Raises:
        CheckpointError: Naming what is missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(path / "adapter_model.safetensors"), framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  no mapping
    with quiet():
        expected = get_peft_model_state_dict(module, save_embedding_layers=False)
    whole = module.state_dict()  # embeddings may be saved beside the adapter, under their own names
    live = {key: tuple(t.shape) for key, t in [*whole.items(), *expected.items()]}
    missing = sorted(set(expected) - set(stored))
    if missing or (unexpected := sorted(set(stored) - set(live))):
        detail = (
            f"the file lacks {_listing(missing)}" if missing else f"the base has no place for {_listing(unexpected)}"
        )
        raise CheckpointError(f"The adapter in {path} does not fit the base model: {detail}.")
    if wrong := [key for key in stored if stored[key] != live[key]]:
        raise CheckpointError(
            f"The adapter in {path} does not fit the base model: '{wrong[0]}' has shape {stored[wrong[0]]} in the file "
            f"and {live[wrong[0]]} on the base."
        )


def _ready(module: nn.Module, device: str | torch.device) -> nn.Module:
    module.eval().to(device)
    module.config.use_cache = False  # type: ignore[union-attr]
    return module


def _mismatch(error: Exception) -> str:
    """Return the line that names the leaf, where there is one."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "size mismatch" in line), _first_line(error))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _listing(names: list[Any], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more
