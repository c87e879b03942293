"""Rollouts to and from files: parquet (`.parquet`) and JSONL (`.jsonl`), the columns of `schema`, one row per sequence.

Reading what was written gives the same rollouts, every float64 bit included. A file appears under its name only when it
is complete, and an existing one is never replaced unless that is asked for. Dumps of training frameworks are read too
(`dumps`), and files of other suffixes by readers that other packages bring (`plugins`).
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
from funcprobe.data.assembly import FIELD_OF, of_step, one_step, rollouts_of, rows_of_step
from funcprobe.data.atomic import fresh_file
from funcprobe.data.dump_files import PICKLED, dump_in, read_dump
from funcprobe.data.dump_text import stamp
from funcprobe.data.dumps import DUMPS
from funcprobe.data.jsonl import read_jsonl, read_jsonl_metadata, write_jsonl
from funcprobe.data.parquet import read_parquet, read_parquet_metadata, write_parquet
from funcprobe.data.paths import path_of
from funcprobe.data.ragged import Array, Ragged, columns, ragged_from_dense
from funcprobe.data.reading import check_ordinary
from funcprobe.data.schema import SCHEMA_VERSION, Columns, Table, metadata_of
from funcprobe.data.slicing import take
from funcprobe.data.validation import LOGP_FIELDS, validate
from funcprobe.errors import FuncprobeWarning, InputError, Note
from funcprobe.types import Rollouts


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
    from_: str = "auto",
    tokenizer: Any = None,
    temperature: float | None = None,
) -> Rollouts:
    """Return the rollouts of a file, validated; with `step` those of that training step only.

    The file is funcprobe's own or a training framework's dump, `from_` one of `trl`, `ms-swift`, `verl`,
    `open-instruct`, `nemo-rl`, `prime-rl`, `torchtitan` and `slime`; `auto` goes by the keys of its first line, and a
    warning says so. Another suffix is read by the package that brings a reader for it, if there is one.
    Rows longer than `max_length`, the positions that a model has, are refused before anything is padded to them.
    Columns that funcprobe does not know are passed over with a warning that names them; rows sampled with top_p < 1 or
    top_k > 0 give a warning as well, and so do ids that are made from text (a note of kind "retokenized").

    Args:
        path: The file; of prime-rl a step's folder, whose ranks make one batch.
        step: The step whose rows are wanted; a dump of several steps needs it, for each has a policy of its own.
        vocab_size: Where given, ids are checked against it.
        max_length: The tokens that a row may have.
        from_: Whose file it is: "auto", "funcprobe" or a framework.
        tokenizer: The run's, as transformers loads it; needed where a dump is text, and not read elsewhere.
        temperature: The one that the rows were sampled at, where the file does not say; a file's own column stands.

    Raises:
        InputError: If the file is missing, empty, not in the format of its extension, of another schema version, lacks
            a column, has a column of the wrong type, has no row of that step, or fails `validate`; or if a dump needs
            a step, a tokenizer or a temperature, or is a pickle of other things than tensors and containers.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    path, unknown = path_of(path), list[str]()
    try:
        if (dump := _dump_in(path, from_)) is not None:
            found: Table | Rollouts = one_step(read_dump(path, dump, tokenizer, temperature), step)
        else:
            found = _reader(path)(_existing(path))
        if isinstance(found, Table):
            unknown = found.unknown
            rollouts = rollouts_of(found if step is None else rows_of_step(found, step), vocab_size, max_length)
        else:
            rollouts = _checked(path, found, step, vocab_size)
    except InputError as error:
        raise InputError(_located(path, step, error), kind=error.kind) from None
    if unknown:
        warnings.warn(
            f"{path}: the columns {', '.join(unknown)} are not rollout columns and were not read.",
            FuncprobeWarning,
            stacklevel=2,
        )
    _tell(path, dump if from_ == "auto" else None, found)
    return rollouts


@checked
def write_rollouts(
    path: str | os.PathLike[str],
    rollouts: Rollouts,
    *,
    tokenizer_id: str | None = None,
    overwrite: bool = False,
    retokenized: bool = False,
) -> None:
    """Write the rollouts, and the name of the tokenizer that made their ids, to a `.parquet` or `.jsonl` file.

    The mask and the weight are written only where they are not all ones. `token_weights`, which an objective derives
    from the other fields, is not written. `retokenized` stamps rollouts whose ids were made again from text.

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
    metadata |= {"retokenized": True} if retokenized else {}
    with fresh_file(path, overwrite=overwrite) as partial:
        writer(partial, _columns(validate(rollouts)), metadata)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return {"schema_version": int, "tokenizer": str, "retokenized": bool} of a rollout file, None where it is silent.

    Raises:
        InputError: If the file is missing, empty, not in the format of its extension, or of another schema version.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    path = path_of(path)
    try:
        if (dump := _dump_in(path, "auto")) is not None:
            return metadata_of({"retokenized": DUMPS[dump].is_text})
        reader = _reader(path)
        own = next((format for format in FORMATS.values() if format.read is reader), None)
        found = _existing(path)
        return metadata_of({}) if own is None else own.read_metadata(found)
    except InputError as error:
        raise InputError(_located(path, None, error)) from None


def dump_of(path: str | os.PathLike[str]) -> str | None:
    """Return the name of the framework whose dump a file is, by the keys of its first line; None for any other file.

    Raises:
        InputError: If there is no such file, or its first line cannot be read.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    path = path_of(path)
    try:
        return _dump_in(path, "auto")
    except InputError as error:
        raise InputError(_located(path, None, error)) from None


def _dump_in(path: Path, from_: str) -> str | None:
    """Return the name of the dump that a path is; None for one of the other formats, or of none.

    Raises:
        InputError: If there is no such file, or its first line cannot be read.
    """
    if from_ == "auto" and path.suffix in FORMATS:
        _reader(path)  # a package that brings one of these suffixes too is named first
    if (not path.is_dir() and path.suffix in (*FORMATS, *PICKLED)) or from_ not in ("auto", "prime-rl"):
        _existing(path)
    return dump_in(path, from_)


def _tell(path: Path, dump: str | None, found: Table | Rollouts) -> None:
    """Warn of decisions about a file: whose dump it is, and that its ids were made from text."""
    if dump is not None:
        text = f"{path} is read as {DUMPS[dump].title}, by its columns; from_='{dump}' says so without this line."
        warnings.warn(Note("format", text), FuncprobeWarning, stacklevel=3)
    if isinstance(found, Table) and found.metadata["retokenized"]:
        rows = len(found.columns["prompt_ids"].lengths)  # type: ignore[union-attr]
        warnings.warn(stamp(rows), FuncprobeWarning, stacklevel=3)


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
        found = take(found, np.flatnonzero(of_step(steps, step)).tolist())
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
