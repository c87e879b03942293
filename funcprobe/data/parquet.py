"""Columns to and from parquet (zstd), without a Python object per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from funcprobe.data.ragged import Array, Ragged, as_dtype, to_array
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
from funcprobe.errors import InputError, missing_extra


def read_parquet(path: Path) -> Table:
    """Return the known columns of a parquet file.

    Raises:
        InputError: If the file is not parquet, of another schema version, or lacks a column.
        MissingExtraError: If pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            metadata = metadata_of(_decoded(file.schema_arrow.metadata))
            check_columns(names)
            if twice := [name for name in KNOWN if names.count(name) > 1]:
                raise InputError(f"the column '{twice[0]}' stands twice; give it once.")
            table = file.read(columns=[name for name in names if name in KNOWN])
    except (pa.ArrowException, OSError) as error:
        raise InputError(_not_parquet(error)) from None
    present = [name for name in table.column_names if table.num_rows and table[name].null_count < table.num_rows]
    if table.num_rows:
        check_columns(present)
    columns = {name: _column(name, table[name]) for name in present}
    return Table(columns, [name for name in names if name not in KNOWN], metadata)


def read_parquet_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a parquet file, reading its footer only.

    Raises:
        InputError: If the file is not parquet, or of another schema version.
        MissingExtraError: If pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    try:
        return metadata_of(_decoded(pq.read_schema(path).metadata))
    except (pa.ArrowException, OSError) as error:
        raise InputError(_not_parquet(error)) from None


def parquet_names(path: Path) -> list[str]:
    """Return the names of the columns of a parquet file, reading its footer only.

    Raises:
        InputError: If the file is not parquet.
        MissingExtraError: If pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(_not_parquet(error)) from None


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file as dictionaries: for texts, of which there are as many as sequences.

    Raises:
        InputError: If the file is not parquet.
        MissingExtraError: If pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            rows: list[dict[str, Any]] = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(_not_parquet(error)) from None
    return rows


def write_parquet(path: Path, columns: Columns, metadata: dict[str, Any]) -> None:
    """Write the columns with zstd compression; the metadata goes into the footer as text.

    Raises:
        MissingExtraError: If pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    stated = {key: str(value) for key, value in metadata.items() if value is not None}
    table = pa.table({name: _arrow(pa, column) for name, column in columns.items()})
    pq.write_table(table.replace_schema_metadata(stated), path, compression="zstd")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "app", "Reading and writing parquet") from None
    return pyarrow, pyarrow.parquet


def _not_parquet(error: Exception) -> str:
    return f"this is not a readable parquet file ({str(error).splitlines()[0]}); was it written completely?"


def _decoded(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    wanted = (b"schema_version", b"tokenizer", b"retokenized")
    return {key.decode(): value.decode(errors="replace") for key, value in (metadata or {}).items() if key in wanted}


def _column(name: str, column: Any) -> Ragged | Array:
    column = _plain(column)
    for row in np.flatnonzero(np.concatenate([_nulls(chunk) for chunk in column.chunks]))[:1]:
        raise InputError(f"Row {row}: the column '{name}' is empty (null); give it in every row or in none.")
    example = f", and row 0 holds {_shortened(column[0].as_py())}"
    if name == "group_id":
        return _group_ids(column, example)
    if name not in LIST_COLUMNS:
        return _numbers(name, column, column.type, ROW_COLUMNS[name], example)
    if not _is_list(column.type):
        raise type_error(name, column.type, example)
    import pyarrow.compute as pc

    lengths = [pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in column.chunks]
    chunks = [_plain(chunk.flatten()) for chunk in column.chunks]
    rows = np.concatenate(lengths).astype(np.int64)
    if LIST_COLUMNS[name] is not float:  # a null log-probability may stand in a hole, where nobody looks
        _check_entries(name, column.type, np.concatenate([_nulls(chunk) for chunk in chunks]), rows)
    values = [_numbers(name, chunk, column.type, LIST_COLUMNS[name], example) for chunk in chunks]
    return Ragged(np.concatenate(values), rows)


def _plain(column: Any) -> Any:
    """Return the entries of a dictionary-encoded, run-end-encoded or extension column; decimals as float64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(column.cast(kind.storage_type))
    if pa.types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(column))
    return column.cast(pa.float64()) if pa.types.is_decimal(kind) else column


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))


def _group_ids(column: Any, example: str) -> Array:
    """Return the group ids as int64, or as objects where they are text, bytes or larger integers."""
    import pyarrow as pa

    kind = column.type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    other = (pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary, pa.types.is_uint64)
    if not any(test(kind) for test in (*text, *other)):
        return _numbers("group_id", column, kind, int, example)
    names = np.empty(len(column), dtype=object)
    names[:] = column.to_pylist()
    return names


def _check_entries(name: str, found: Any, null: Array, lengths: Array) -> None:
    for entry in np.flatnonzero(null)[:1]:
        ends = np.cumsum(lengths)
        row = int(np.searchsorted(ends, entry, side="right"))
        position = int(entry - (ends[row] - lengths[row]))
        raise _in_row(row, type_error(name, found, f", and position {position} is empty (null)"))


def _in_row(row: int, error: InputError) -> InputError:
    return InputError(f"Row {row}: {error}")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nulls(chunk: Any) -> Array:
    return np.asarray(chunk.is_null().to_numpy(zero_copy_only=False))


def _numbers(name: str, values: Any, found: Any, dtype: type, example: str) -> Array:
    import pyarrow as pa

    kind = values.type
    numeric = pa.types.is_integer(kind) or (
        dtype is not int and (pa.types.is_floating(kind) or pa.types.is_boolean(kind))
    )
    if not numeric and not pa.types.is_null(kind):
        raise type_error(name, found, example)
    # Arrow gives NaN for a null among floats, and floats or objects for a null among ints and bools.
    array = values.to_numpy() if hasattr(values, "chunks") else values.to_numpy(zero_copy_only=False)
    array = array.astype(np.float64) if array.dtype == object else array
    return as_dtype(to_array(array, name), name, dtype)


def _arrow(pa: Any, column: Ragged | Array) -> Any:
    if not isinstance(column, Ragged):
        return pa.array(column)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(column.lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(column.values))
