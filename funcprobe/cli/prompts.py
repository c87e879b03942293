"""Prompts from a text, JSONL or parquet file, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from funcprobe.data.reading import MIB, check_ordinary, parsed, text_of
from funcprobe.errors import InputError, missing_extra

#: Bytes of a file of prompts at most, where it is text.
LIMIT = 1024 * MIB

#: Characters of a prompt at most: more than any model has positions for.
LONGEST = 4 * MIB

#: Of a JSONL or parquet row, the columns that may hold the prompt; ids win over text.
COLUMNS = ("prompt_ids", "prompt")


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Return the prompts of a file as token ids: `.txt` a line each, `.jsonl` and `.parquet` a row each.

    A row's `prompt_ids` are taken as they are; its `prompt` is text, or a list of chat messages for the tokenizer's
    template. Text is encoded with the special tokens that the tokenizer adds.

    Raises:
        InputError: If the file is missing, empty or of another format, text comes without a tokenizer, or the
            tokenizer cannot encode a prompt.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    readers = {".txt": _lines, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(f"{path}: the extension '{path.suffix}' is not known; expected {', '.join(readers)}.")
    rows = list(readers[path.suffix](check_ordinary(path)))
    if not rows:
        raise InputError(f"{path}: the file holds no prompt.")
    return [_ids(row, tokenizer, f"{path}, prompt {number}") for number, row in enumerate(rows)]


def _lines(path: Path) -> Iterator[Any]:
    return (line for line in text_of(path, LIMIT).splitlines() if line.strip())


def _json_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(text_of(path, LIMIT).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}).") from None
        column = next((c for c in COLUMNS if isinstance(row, dict) and row.get(c) is not None), None)
        if column is None:
            raise InputError(f"{path}: line {number} has neither {' nor '.join(COLUMNS)}.")
        yield row[column]


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        missing = missing_extra("pyarrow", "app", "reading parquet")
        raise missing from error
    try:
        names = pq.read_schema(path).names
        column = next((c for c in COLUMNS if c in names), None)
        if column is None:
            raise InputError(f"{path}: the file has neither a column {' nor '.join(COLUMNS)}.")
        return iter(pq.read_table(path, columns=[column])[column].to_pylist())
    except (pa.ArrowException, OSError):
        raise InputError(f"{path}: this is not a parquet file that can be read.") from None


def _ids(prompt: Any, tokenizer: Any, where: str) -> list[int]:
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    is_chat = isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt)
    if not (isinstance(prompt, str) or is_chat):
        raise InputError(f"{where} (counted from 0): expected text, chat messages or token ids, found {prompt!r:.60}.")
    if len(str(prompt)) > LONGEST:
        raise InputError(f"{where} (counted from 0): the text has more than {LONGEST:,} characters; cut it.")
    if tokenizer is None:
        raise InputError(f"{where}: this is text, and the checkpoint folder has no tokenizer; give prompt_ids instead.")
    if is_chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where}: these are chat messages, and the tokenizer has no chat template (tokenizer_config.json or "
            "chat_template.jinja of the checkpoint); give plain text or prompt_ids."
        )
    try:
        return _encoded(prompt, tokenizer)
    except Exception as error:  # tokenizers and their templates raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where} (counted from 0): the tokenizer cannot encode {prompt!r:.60}: {reason.rstrip('.')}."
        ) from error


def _encoded(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    return list(tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False))
