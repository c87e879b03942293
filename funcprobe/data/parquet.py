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
    wanted = (b"schema_version", b"tokenizer")
    return {key.decode(): value.decode() for key, value in (metadata or {}).items() if key in wanted}


def _column(name: str, column: Any) -> Ragged | Array:
    for row in np.flatnonzero(np.concatenate([_nulls(chunk) for chunk in column.chunks]))[:1]:
        raise InputError(f"Row {row}: the column '{name}' is empty (null); give it in every row or in none.")
    if name not in LIST_COLUMNS:
        return _numbers(name, column, column.type, ROW_COLUMNS[name])
    if not hasattr(column.type, "value_type"):
        raise type_error(name, column.type)
    import pyarrow.compute as pc

    lengths = [pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = [_numbers(name, chunk.flatten(), column.type, LIST_COLUMNS[name]) for chunk in column.chunks]
    return Ragged(np.concatenate(values), np.concatenate(lengths).astype(np.int64))


def _nulls(chunk: Any) -> Array:
    return np.asarray(chunk.is_null().to_numpy(zero_copy_only=False))


def _numbers(name: str, values: Any, found: Any, dtype: type) -> Array:
    # Arrow gives NaN for a null among floats, and floats or objects for a null among ints, which are then refused.
    array = values.to_numpy() if hasattr(values, "chunks") else values.to_numpy(zero_copy_only=False)
    if array.size and array.dtype.kind not in ("iu" if dtype is int else "biuf"):
        raise type_error(name, found)
    return as_dtype(to_array(array, name), name, dtype)


def _arrow(pa: Any, column: Ragged | Array) -> Any:
    if not isinstance(column, Ragged):
        return pa.array(column)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(column.lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(column.values))
