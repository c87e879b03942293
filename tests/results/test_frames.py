"""One table is the same in pandas, polars and Arrow: values, types, what is missing; Arrow keeps units."""

from __future__ import annotations

import math
import sys
from typing import Any, get_args

import numpy as np
import pandas
import polars
import pyarrow
import pytest

from funcprobe.errors import InputError, MissingExtraError
from funcprobe.results.books import Books
from funcprobe.results.frames import Library, columns_of_rows, frame_of
from tests.cases.written_attribution import attribution, with_bars, words
from tests.cases.written_results import RESULTS
from tests.cases.written_validation import validation

LIBRARIES: tuple[Library, ...] = get_args(Library)

FRAMED: dict[str, Any] = {
    **{kind: found.to_frame for kind, found in RESULTS.items()},
    "validation": validation().to_frame,
    **{
        table: lambda library, table=table: with_bars(
            attribution(vocabulary=words(), influence=True, hole=True), 1e-7, "layers"
        ).to_frame(table, library=library)
        for table in ("sequences", "prompts", "positions", "parameters", "layers", "ledger", "influence")
    },
}

#: A column of each kind, with what is missing, and numbers that a library might take for missing.
COLUMNS: dict[str, Any] = {
    "text": ["a", None, ""],
    "flag": [True, None, False],
    "whole": [1, None, -(2**53)],
    "number": [math.nan, None, math.inf],
    "mixed": [1, 2.5, None],
    "nothing": [None, None, None],
    "array": np.array([1.0, math.nan, -0.0]),
    "counts": np.array([3, 2, 1]),
}


def plain(frame: Any) -> dict[str, list[Any]]:
    """Return a frame's columns as lists, NaN in the place of what is missing."""
    found = frame.to_dict("list") if isinstance(frame, pandas.DataFrame) else {}
    if not isinstance(frame, pandas.DataFrame):
        found = frame.to_dict(as_series=False) if isinstance(frame, polars.DataFrame) else frame.to_pydict()
    missing = {name: [x is None or x is pandas.NA or x != x for x in values] for name, values in found.items()}
    return {n: ["missing" if m else x for x, m in zip(values, missing[n], strict=True)] for n, values in found.items()}


@pytest.mark.parametrize("kind", FRAMED)
def test_the_libraries_agree(kind: str) -> None:
    made = {library: FRAMED[kind](library=library) for library in LIBRARIES}
    kinds = [pandas.DataFrame, polars.DataFrame, pyarrow.Table]
    assert [type(frame) for frame in made.values()] == kinds
    columns = [plain(frame) for frame in made.values()]
    assert list(columns[0]) == list(columns[1]) == list(columns[2])
    assert columns[0] == columns[1] == columns[2]
    assert columns[0]
    pandas.testing.assert_frame_equal(made["pandas"], FRAMED[kind](library="pandas"))


def test_types_and_what_is_missing_are_right() -> None:
    arrow, frame = frame_of(COLUMNS, "arrow", {}), frame_of(COLUMNS, "polars", {})
    types = ["string", "bool", "int64", "double", "double", "double", "double", "int64"]
    assert [str(field.type) for field in arrow.schema] == types
    assert frame.dtypes == [polars.String, polars.Boolean, polars.Int64, *[polars.Float64] * 4, polars.Int64]
    nulls = {"text": 1, "flag": 1, "whole": 1, "number": 1, "mixed": 1, "nothing": 3, "array": 0, "counts": 0}
    assert {name: arrow.column(name).null_count for name in COLUMNS} == nulls
    assert {name: frame[name].null_count() for name in COLUMNS} == nulls
    assert arrow.column("whole").to_pylist() == [1, None, -(2**53)]
    for values in (arrow.column("number").to_pylist(), frame["number"].to_list()):
        assert math.isnan(values[0])
        assert values[1:] == [None, math.inf]
    assert math.copysign(1, arrow.column("array")[2].as_py()) == -1
    pandas_frame = frame_of(COLUMNS, "pandas", {})
    assert pandas_frame["nothing"].dtype == np.float64
    assert pandas_frame["mixed"].dtype == np.float64
    assert pandas_frame["counts"].dtype == np.int64


def test_arrow_keeps_units_and_says_none_where_there_is_none() -> None:
    fields = {f.name: f.metadata for f in attribution(vocabulary=words()).to_frame("tokens", library="arrow").schema}
    assert fields["contribution"] == fields["through_logp"] == {b"unit": b"nats per token"}
    assert fields["logp"] == {b"unit": b"nats"}
    assert {name: fields[name] for name in ("text", "position", "advantage")} == dict.fromkeys(
        ("text", "position", "advantage")
    )


def test_rows_that_lack_a_name_have_none_there() -> None:
    assert columns_of_rows([{"a": 1}, {"b": 2.0, "a": 3}]) == {"a": [1, 3], "b": [None, 2.0]}
    assert columns_of_rows([]) == {}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_table_without_rows_is_a_frame_without_any(library: Library) -> None:
    frame = frame_of({"a": [], "b": np.array([])}, library, {})
    assert (len(frame), len(plain(frame))) == (0, 2)
    assert len(Books(()).to_frame(library=library)) == 0


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(InputError, match=r"Unknown library 'dask'; expected one of pandas, polars, arrow"):
        RESULTS["sweep"].to_frame(library="dask")


@pytest.mark.parametrize(
    ("library", "said"),
    [("pandas", r"'pandas', .*\[app\]"), ("polars", r"'polars', .*\[polars\]"), ("arrow", r"'pyarrow', .*\[app\]")],
)
def test_a_library_that_is_not_there_is_named_with_its_extra(
    library: Library, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow" if library == "arrow" else library, None)
    with pytest.raises(MissingExtraError, match=rf"a data frame needs the package {said}"):
        RESULTS["sweep"].to_frame(library=library)
