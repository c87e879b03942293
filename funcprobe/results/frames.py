"""Tables as frames of pandas, polars or Arrow, whichever is there and asked for.

One table gives the same columns in all three. What is not there is null in polars and Arrow and NaN in pandas; NaN
stays NaN. Only Arrow has a place for units: a field's metadata, `{"unit": ...}`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, overload

import numpy as np

from funcprobe.errors import InputError, missing_extra
from funcprobe.types import Json

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

Library = Literal["pandas", "polars", "arrow"]

Column = Sequence[Any] | np.ndarray
Columns = Mapping[str, Column]


class Tabular:
    """A result that is one table: by default its long form, `rows`."""

    def rows(self) -> list[Json]:
        """Return the long form.

        Raises:
            NotImplementedError: For a result that has none.
        """
        raise NotImplementedError

    def columns(self) -> Columns:
        """Return the table as plain columns; see `to_frame`."""
        return columns_of_rows(self.rows())

    def units(self) -> Mapping[str, str]:
        """Return the unit of every column that has one; a long form says it in a column of its own."""
        return {}

    @overload
    def to_frame(self, *, library: Literal["pandas"] = ...) -> pandas.DataFrame: ...

    @overload
    def to_frame(self, *, library: Literal["polars"]) -> polars.DataFrame: ...

    @overload
    def to_frame(self, *, library: Literal["arrow"]) -> pyarrow.Table: ...

    def to_frame(self, *, library: Library = "pandas") -> Any:
        """Return the table as a frame of "pandas", "polars" or "arrow".

        Raises:
            InputError: If there is no such library.
            MissingExtraError: If the library is not installed.
        """
        return frame_of(self.columns(), library, self.units())


def columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, in the order in which names appear; None where a row lacks one."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def frame_of(columns: Columns, library: Library, units: Mapping[str, str]) -> Any:
    """Return columns as a frame of a library.

    Raises:
        InputError: If there is no such library.
        MissingExtraError: If it is not installed.
    """
    if library not in _MAKERS:
        raise InputError(f"Unknown library {library!r}; expected one of {', '.join(get_args(Library))}.")
    maker = _MAKERS[library]
    try:
        module = importlib.import_module(maker.package)
    except ImportError as error:
        missing = missing_extra(maker.package, maker.extra, "a data frame")
        raise missing from error
    return maker.make(module, columns, units)


def _pandas(pandas: ModuleType, columns: Columns, units: Mapping[str, str]) -> Any:
    return pandas.DataFrame({name: _or_nan(values) for name, values in columns.items()})


def _polars(polars: ModuleType, columns: Columns, units: Mapping[str, str]) -> Any:
    types = {"text": polars.String, "whole": polars.Int64, "flag": polars.Boolean, "number": polars.Float64}
    return polars.DataFrame([polars.Series(name, _values(x), types[_kind(x)]) for name, x in columns.items()])


def _arrow(pyarrow: ModuleType, columns: Columns, units: Mapping[str, str]) -> Any:
    types = {"text": pyarrow.string(), "whole": pyarrow.int64(), "flag": pyarrow.bool_(), "number": pyarrow.float64()}
    fields, arrays = [], []
    for name, values in columns.items():
        said = {"unit": units[name]} if name in units else None
        fields.append(pyarrow.field(name, types[_kind(values)], metadata=said))
        arrays.append(pyarrow.array(_values(values), types[_kind(values)], from_pandas=False))  # NaN is no null
    return pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields))


class _Maker(NamedTuple):
    """A library that frames are made in."""

    package: str
    extra: str  #: that brings it
    make: Callable[[ModuleType, Columns, Mapping[str, str]], Any]


_MAKERS = {
    "pandas": _Maker("pandas", "app", _pandas),
    "polars": _Maker("polars", "polars", _polars),
    "arrow": _Maker("pyarrow", "app", _arrow),
}


def _kind(values: Column) -> str:
    """Return "text", "whole", "flag" or "number", which a column without any value is one of."""
    if isinstance(values, np.ndarray):
        return {"b": "flag", "i": "whole"}.get(values.dtype.kind, "number")
    types = {type(value) for value in values if value is not None}
    kinds = ((str, "text"), (bool, "flag"), (int, "whole"))
    return next((kind for own, kind in kinds if types == {own}), "number")


def _values(values: Column) -> Column:
    """Return the values of a column, whole numbers among fractions as fractions."""
    if isinstance(values, np.ndarray) or _kind(values) != "number":
        return values
    return [None if value is None else float(value) for value in values]


def _or_nan(values: Column) -> Column:
    """Return the values of a column for pandas, which would take one without any value for objects."""
    empty = not isinstance(values, np.ndarray) and len(values) > 0 and all(value is None for value in values)
    return np.full(len(values), np.nan) if empty else values
