"""Rollouts to and from files: parquet (`.parquet`) and JSONL (`.jsonl`), the columns of `schema`, one row per sequence.

Reading what was written gives the same rollouts, every float64 bit included. A file appears under its name only when it
is complete, and an existing one is never replaced unless that is asked for. Files of other suffixes are read by readers
that other packages bring (`plugins`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funcprobe import plugins
from funcprobe.arguments import checked
from funcprobe.data.atomic import fresh_file
from funcprobe.data.jsonl import read_jsonl, read_jsonl_metadata, write_jsonl
from funcprobe.data.parquet import read_parquet, read_parquet_metadata, write_parquet
from funcprobe.data.paths import path_of
from funcprobe.data.ragged import Array, Ragged, columns, ragged_from_dense
from funcprobe.data.reading import check_ordinary
from funcprobe.data.rollouts import rollouts_from_ragged
from funcprobe.data.schema import SCHEMA_VERSION, Columns, Table
from funcprobe.data.slicing import take
from funcprobe.data.validation import LOGP_FIELDS, validate
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.types import Rollouts

#: Per-row columns whose field has another name.
FIELD_OF = {"reward": "rewards", "advantage": "advantages", "group_id": "group_ids"}


#: Tokens of a batch at most, padding included: 16 GiB of ids.
PADDED = 2**31


class _Format(NamedTuple):
    read: Callable[[Path], Table]
    read_metadata: Callable[[Path], dict[str, Any]]
    write: Callable[[Path, Columns, dict[str, Any]], None]


#: funcprobe's own formats by suffix; other packages add readers by an entry point in `funcprobe.readers`.
FORMATS = {
    ".parquet": _Format(read_parquet, read_parquet_metadata, write_parquet),
    ".jsonl": _Format(read_jsonl, read_jsonl_metadata, write_jsonl),
}


def read_rollouts(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Rollouts:
    """Return the rollouts of a file, validated; with `step` those of that training step only.

    A suffix other than `.parquet` and `.jsonl` is read by the package that brings a reader for it, if there is one.
    Rows longer than `max_length`, the positions that a model has, are refused before anything is padded to them.
    Columns that funcprobe does not know are passed over with a warning that names them; rows sampled with top_p < 1 or
    top_k > 0 give a warning as well.

    Raises:
        InputError: If the file is missing, empty, not in the format of its extension, of another schema version, lacks
            a column, has a column of the wrong type, has no row of that step, or fails `validate`.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    path, unknown = path_of(path), list[str]()
    try:
        found = _reader(path)(_existing(path))
        if isinstance(found, Table):
            unknown = found.unknown
            rollouts = _rollouts(found if step is None else _rows_of_step(found, step), vocab_size, max_length)
        else:
            rollouts = _checked(path, found, step, vocab_size)
    except InputError as error:
        raise InputError(_located(path, step, error)) from None
    if unknown:
        warnings.warn(
            f"{path}: the columns {', '.join(unknown)} are not rollout columns and were not read.",
            FuncprobeWarning,
            stacklevel=2,
        )
    return rollouts


@checked
def write_rollouts(
    path: str | os.PathLike[str], rollouts: Rollouts, *, tokenizer_id: str | None = None, overwrite: bool = False
) -> None:
    """Write the rollouts, and the name of the tokenizer that made their ids, to a `.parquet` or `.jsonl` file.

    The mask and the weight are written only where they are not all ones. `token_weights`, which an objective derives
    from the other fields, is not written.

    Raises:
        InputError: If the file exists and `overwrite` is not set, its folder does not exist, its extension is not
            known, or the rollouts fail `validate`.
        MissingExtraError: If a parquet file is written without pyarrow.
    """
    path = path_of(path)
    try:
        writer = _format(path).write
        _check_free(path, overwrite)
        _check_advantages(rollouts)
    except InputError as error:
        raise InputError(_located(path, None, error)) from None
    metadata = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer_id}
    with fresh_file(path, overwrite=overwrite) as partial:
        writer(partial, _columns(validate(rollouts)), metadata)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return {"schema_version": int, "tokenizer": str} of a rollout file, None where it does not say.

    Raises:
        InputError: If the file is missing, empty, not in the format of its extension, or of another schema version.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    path = path_of(path)
    try:
        reader = _reader(path)
        own = next((format for format in FORMATS.values() if format.read is reader), None)
        found = _existing(path)
        return {"schema_version": None, "tokenizer": None} if own is None else own.read_metadata(found)
    except InputError as error:
        raise InputError(_located(path, None, error)) from None


def _format(path: Path) -> _Format:
    if path.suffix not in FORMATS:
        raise InputError(f"the extension '{path.suffix}' is not known; expected {' or '.join(FORMATS)}.")
    return FORMATS[path.suffix]


def _reader(path: Path) -> Callable[[Path], Table | Rollouts]:
    """Return the function that reads files of that suffix, funcprobe's own or another package's.

    Raises:
        InputError: If there is none.
    """
    own = {suffix.removeprefix("."): format.read for suffix, format in FORMATS.items()}
    reader = plugins.find("reader", path.suffix.removeprefix("."), own)
    if reader is None:
        known = " or ".join(f".{name}" for name in plugins.names("reader", own))
        raise InputError(f"the extension '{path.suffix}' is not known; expected {known}.")
    return reader


def _checked(path: Path, found: object, step: int | None, vocab_size: int | None) -> Rollouts:
    """Return the rollouts that another package read, those of one step alone where one is named.

    Raises:
        InputError: If it read something else.
    """
    if not isinstance(found, Rollouts):
        error = plugins.wrong("reader", path.suffix.removeprefix("."), found)
        raise error
    if step is not None:
        steps = None if found.step is None else found.step.cpu().numpy()
        found = take(found, np.flatnonzero(_of_step(steps, step)).tolist())
    return validate(found, vocab_size)


def _existing(path: Path) -> Path:
    try:
        check_ordinary(path)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ")) from None
    if path.stat().st_size == 0:
        raise InputError("the file is empty (0 bytes); was it written completely?")
    return path


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise InputError(f"the folder '{path.parent}' does not exist; create it first.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError("this already exists; choose another name, or pass overwrite=True to replace a file.")


def _check_advantages(rollouts: Rollouts) -> None:
    if rollouts.advantages is not None and rollouts.advantages.ndim == 2:
        raise InputError(
            "the tokens of a row have advantages of their own, and the file format holds one a row; keep the batch in "
            "memory, or leave the advantages out."
        )


def _located(path: Path, step: int | None, error: InputError) -> str:
    text = str(error)
    among = "" if step is None else f" among those of step {step}"
    note = f" (Rows are counted from 0{among}.)" if "row " in text.lower() else ""
    return f"{path}: {text}{note}"


def _rollouts(table: Table, vocab_size: int | None, max_length: int | None = None) -> Rollouts:
    found: dict[str, Any] = dict(table.columns)
    if not found:
        raise InputError("the file holds 0 rows; expected at least one sequence.")
    prompts, completions, masks = (
        found.pop(name, None) for name in ("prompt_ids", "completion_ids", "completion_mask")
    )
    _check_lengths(prompts.lengths + completions.lengths, max_length)
    logps = {name: found.pop(name) for name in LOGP_FIELDS if name in found}
    per_row = {FIELD_OF.get(name, name): column for name, column in found.items()}
    return rollouts_from_ragged(
        prompts, completions, completion_masks=masks, logps=logps, vocab_size=vocab_size, **per_row
    )


def _check_lengths(lengths: Array, max_length: int | None) -> None:
    """Refuse rows that are too long for a model, or beside the others, before they are padded to the longest.

    Raises:
        InputError: Naming the longest row.
    """
    row, rows = int(lengths.argmax()), len(lengths)
    longest = int(lengths[row])
    if max_length is not None and longest > max_length:
        raise InputError(
            f"Row {row} has {longest:,} tokens, and the model has positions for {max_length:,}; drop or cut the row."
        )
    if rows * longest > PADDED:
        raise InputError(
            f"Row {row} has {longest:,} tokens, and padding {rows:,} rows to that makes {rows * longest:,}, of which "
            f"{int(lengths.sum()):,} are real; expected at most {PADDED:,}. Drop or cut the row, or give fewer rows."
        )


def _rows_of_step(table: Table, step: int) -> Table:
    keep = _of_step(table.columns.get("step"), step)
    return table._replace(columns={name: _keep(column, keep) for name, column in table.columns.items()})


def _of_step(steps: Any, step: int) -> Array:
    """Return which rows were drawn at that step.

    Raises:
        InputError: If there is none.
    """
    if steps is None:
        raise InputError(f"step {step} was asked for, but the file has no column 'step'.")
    steps = np.asarray(steps)
    keep: Array = steps == step
    if not keep.any():
        known = np.unique(steps)
        raise InputError(f"no row is of step {step}; the file has {len(known)} steps from {known[0]} to {known[-1]}.")
    return keep


def _keep(column: Ragged | Array, keep: Array) -> Ragged | Array:
    if not isinstance(column, Ragged):
        return column[keep]
    return Ragged(column.values[np.repeat(keep, column.lengths)], column.lengths[keep])


def _columns(rollouts: Rollouts) -> Columns:
    """Return the columns in the order of the documentation."""
    fields = {name: value.detach().cpu().numpy() for name, value in rollouts._asdict().items() if value is not None}
    starts, attention = fields["prompt_lengths"][:, None], fields["attention_mask"]
    lengths = attention.sum(axis=1, dtype=np.int64)[:, None]
    column = columns(attention.shape[1])
    written = columns(fields["completion_mask"].shape[1]) < lengths - starts
    result: Columns = {
        "prompt_ids": ragged_from_dense(fields["ids"], column < starts),
        "completion_ids": ragged_from_dense(fields["ids"], (column >= starts) & (column < lengths)),
    }
    if not fields["completion_mask"][written].all():
        result["completion_mask"] = ragged_from_dense(fields["completion_mask"], written)
    for name in ("reward", "advantage", "group_id", "temperature", "top_p", "top_k"):
        result |= _if_given(name, fields)
    result |= {name: _logps(fields[name], fields["completion_mask"], written) for name in LOGP_FIELDS if name in fields}
    if not (fields["weight"] == 1).all():
        result["weight"] = fields["weight"]
    return result | _if_given("step", fields)


def _if_given(name: str, fields: dict[str, Array]) -> Columns:
    field = FIELD_OF.get(name, name)
    return {name: fields[field]} if field in fields else {}


def _logps(values: Array, mask: Array, written: Array) -> Ragged:
    return ragged_from_dense(np.where(mask, values, 0.0), written)
