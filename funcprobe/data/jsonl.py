"""Columns to and from JSONL: an optional header line with the metadata, then one JSON object per sequence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from funcprobe.data.ragged import Array, Ragged, as_dtype, ragged_from_lists, to_array
from funcprobe.data.reading import parsed
from funcprobe.data.schema import (
    KNOWN,
    LIST_COLUMNS,
    ROW_COLUMNS,
    Columns,
    Table,
    check_columns,
    metadata_of,
    type_error,
)
from funcprobe.errors import InputError
from funcprobe.visible_text import shortened


def read_jsonl(path: Path) -> Table:
    """Return the known columns of a JSONL file; blank lines are passed over.

    Raises:
        InputError: If a line is broken, the schema version another, or a key missing.
    """
    lines = list(objects_of(path))
    header = _header(lines[:1])
    rows = lines[1:] if header is not None else lines
    metadata = metadata_of(header or {})
    names = list(dict.fromkeys(key for _, row in rows for key in row))
    if rows:
        check_columns(names)
    present = [name for name in names if name in KNOWN and any(row.get(name) is not None for _, row in rows)]
    if rows:
        check_columns(present)
    columns = {name: column_of(name, rows) for name in present}
    return Table(columns, [name for name in names if name not in KNOWN], metadata)


def read_jsonl_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a JSONL file, reading its first line only.

    Raises:
        InputError: If the first line is broken, or the schema version another.
    """
    return metadata_of(_header(list(islice(objects_of(path), 1))) or {})


def write_jsonl(path: Path, columns: Columns, metadata: dict[str, Any]) -> None:
    """Write the header line and one object per row; floats are written so that they read back exactly."""
    lists = {name: _split(column) for name, column in columns.items()}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(metadata) + "\n")
        for row in zip(*lists.values(), strict=True):
            file.write(json.dumps(dict(zip(lists, row, strict=True)), allow_nan=False) + "\n")


def objects_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of every line that is not blank.

    Raises:
        InputError: If a line is not a JSON object, or the file is not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a byte order mark
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(number, line)
    except UnicodeDecodeError as error:
        wide = error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "it is UTF-16 or UTF-32, so save it as UTF-8." if wide else "is it a JSONL file?"
        raise InputError(f"this is not UTF-8 text ({error.reason} at byte {error.start}); {hint}") from None


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        row = parsed(line, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        if number == 1 and line.strip() in ("{", "["):
            raise InputError(
                "line 1 is not JSON by itself: this is a JSON document over several lines; expected one object per "
                "line, as `jq -c` writes it."
            ) from None
        raise InputError(f"line {number} is not JSON ({error.msg} at column {error.colno}).") from None
    except ValueError as error:  # nested too deeply, an integer of too many digits, or a key that stands twice
        raise InputError(
            f"line {number} cannot be read ({error}); expected one object of numbers and flat lists."
        ) from None
    if not isinstance(row, dict):
        array = " (a JSON array of rows is no JSONL: write its objects a line each, as `jq -c '.[]'` does)"
        hint = array if isinstance(row, list) else ""
        raise InputError(f"line {number} is a JSON {type(row).__name__}; expected one object per line{hint}.")
    return row


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shortened(next(k for k in keys if keys.count(k) > 1), 60)!r} stands twice")
    return row


def _header(lines: list[tuple[int, dict[str, Any]]]) -> dict[str, Any] | None:
    return next((row for _, row in lines if "schema_version" in row and "prompt_ids" not in row), None)


def column_of(name: str, rows: list[tuple[int, dict[str, Any]]]) -> Ragged | Array:
    """Return one column of rows that stand in the lines of those numbers.

    Raises:
        InputError: If a row lacks it, others have it, or it holds another number; the message names the line.
        type_error: If it holds another type, which is an InputError.
    """
    for number, row in rows:
        if row.get(name) is None:
            raise InputError(f"line {number} has no '{name}', other lines do; give it in every line or in none.")
        if isinstance(row[name], list) is not (name in LIST_COLUMNS):
            raise type_error(name, f"{type(row[name]).__name__} in line {number}")
    values = [row[name] for _, row in rows]
    if name in LIST_COLUMNS:
        return ragged_from_lists(values, name, LIST_COLUMNS[name])
    for number, row in rows:
        allowed = int | float | str if name == "group_id" else int | float
        if not isinstance(row[name], allowed) or isinstance(row[name], bool):
            raise type_error(name, f"{type(row[name]).__name__} in line {number}")
        if name == "group_id" and isinstance(row[name], float):
            raise InputError(
                f"'group_id' holds float64 values; expected integers or text, and line {number} has {row[name]}."
            )
    if name == "group_id":
        names = np.empty(len(values), dtype=object)
        names[:] = values
        return names
    return as_dtype(to_array(values, name), name, ROW_COLUMNS[name])


def _split(column: Ragged | Array) -> list[Any]:
    if not isinstance(column, Ragged):
        return list(column.tolist())
    values = column.values.astype(np.int64) if column.values.dtype == np.bool_ else column.values
    return [row.tolist() for row in np.split(values, np.cumsum(column.lengths)[:-1])]
