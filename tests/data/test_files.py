"""Files: reading what was written is the identity, and every broken file has its own calm message."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings

from funcprobe.data import parquet
from funcprobe.data.files import read_metadata, read_rollouts, write_rollouts
from funcprobe.data.schema import KNOWN
from funcprobe.errors import FuncprobeWarning, InputError, MissingExtraError
from tests.cases.rollout_lists import Lists, assert_same_rollouts, fixed, lists

FORMATS = [".parquet", ".jsonl"]


@pytest.mark.parametrize("extension", FORMATS)
@given(batch=lists())
@settings(max_examples=50)
def test_reading_what_was_written_is_the_identity(extension: str, batch: Lists) -> None:
    rollouts = batch.build()
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder, f"a{extension}"), Path(folder, f"b{extension}")
        write_rollouts(path, rollouts)
        found = read_rollouts(path)
        write_rollouts(again, found)
        assert path.read_bytes() == again.read_bytes()
    assert_same_rollouts(found, rollouts)


@pytest.mark.parametrize("extension", FORMATS)
def test_columns_are_those_of_the_schema(tmp_path: Path, extension: str) -> None:
    write_rollouts(tmp_path / f"a{extension}", fixed().build(), tokenizer_id="some/tokenizer")
    names = list(rows_of(tmp_path / f"a{extension}")[0])
    # No weight (all ones), no advantage, no old or reference log-probabilities: they were not given.
    listed = "prompt_ids completion_ids completion_mask reward group_id temperature sampling_logps step"
    assert names == listed.split()
    assert set(names) <= set(KNOWN)
    assert read_metadata(tmp_path / f"a{extension}") == {
        "schema_version": 1,
        "tokenizer": "some/tokenizer",
        "retokenized": False,
    }


def test_what_a_hand_written_line_may_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt_ids": [1], "completion_ids": [2, 3], "temperature": 1, "advantage": null}\n\n')
    expected = Lists([[1]], [[2, 3]], {"temperature": 1.0}).build()
    assert_same_rollouts(read_rollouts(path), expected)
    assert read_metadata(path) == {"schema_version": None, "tokenizer": None, "retokenized": False}


def test_a_first_line_with_tokens_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"schema_version": 1, "prompt_ids": [1], "completion_ids": [2, 3], "temperature": 1}\n')
    with pytest.warns(FuncprobeWarning, match="the columns schema_version are not rollout columns"):
        assert_same_rollouts(read_rollouts(path), Lists([[1]], [[2, 3]], {"temperature": 1.0}).build())


def test_parquet_written_by_others(tmp_path: Path) -> None:
    """32-bit numbers, fixed-size and large lists, several row groups, nulls in holes, no metadata."""
    table = pa.table(
        {
            "prompt_ids": pa.array([[1, 2], [3, 4], [1, 2]], pa.list_(pa.int32(), 2)),
            "completion_ids": pa.array([[1, 2, 3], [4], [0, 0]], pa.large_list(pa.uint16())),
            "completion_mask": pa.array([[1, 0, 1], [1], [1, 1]], pa.list_(pa.int8())),
            "old_logps": pa.array([[-0.5, None, -0.25], [-1.0], [-2.0, -4.0]], pa.list_(pa.float32())),
            "reward": pa.array([1, 0, 1], pa.int64()),
            "temperature": pa.array([1, 1, 1], pa.float32()),
            "advantage": pa.nulls(3),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    expected = Lists(
        [[1, 2], [3, 4], [1, 2]],
        [[1, 2, 3], [4], [0, 0]],
        {
            "temperature": 1.0,
            "completion_masks": [[1, 0, 1], [1], [1, 1]],
            "old_logps": [[-0.5, -9.0, -0.25], [-1.0], [-2.0, -4.0]],
            "rewards": [1.0, 0.0, 1.0],
        },
    )
    assert_same_rollouts(read_rollouts(tmp_path / "a.parquet"), expected.build())


@pytest.mark.parametrize("extension", FORMATS)
def test_one_step_of_a_file(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a{extension}"
    write_rollouts(path, fixed().build())
    # Groups are those of the file, so that rows of one group stay together whatever else is read.
    assert_same_rollouts(read_rollouts(path, step=1), fixed().rows([2]).build(), ignore=("group_ids",))
    assert read_rollouts(path, step=1).group_ids.tolist() == [1]
    with pytest.raises(InputError, match="no row is of step 7; the file has 2 steps from 0 to 1"):
        read_rollouts(path, step=7)
    write_rollouts(path, fixed().build()._replace(step=None), overwrite=True)
    with pytest.raises(InputError, match="step 1 was asked for, but the file has no column 'step'"):
        read_rollouts(path, step=1)


@pytest.mark.parametrize("extension", FORMATS)
def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path, extension: str) -> None:
    path, rollouts = tmp_path / f"a{extension}", fixed().build()
    write_rollouts(path, rollouts)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"already exists; choose another name, or pass overwrite=True"):
        write_rollouts(path, rollouts)
    with pytest.raises(InputError, match="Row 0: rewards is nan"):
        write_rollouts(path, rollouts._replace(rewards=rollouts.temperature * torch.nan), overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    write_rollouts(path, rollouts._replace(step=None), overwrite=True)
    assert read_rollouts(path).step is None


def test_a_run_that_stops_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_rollouts(path, fixed().build())
    before = path.read_bytes()

    def interrupted(table: pa.Table, where: Path, **options: Any) -> None:
        Path(where).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_rollouts(path, fixed().build(), overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def write_raw(path: Path, rows: list[dict[str, Any]], version: object = 1) -> Path:
    """Write whatever is given, without funcprobe's checks."""
    if path.suffix == ".parquet":
        table = (
            pa.Table.from_pylist(rows)
            if rows
            else pa.table({"prompt_ids": [], "completion_ids": [], "temperature": []})
        )
        pq.write_table(table.replace_schema_metadata({"schema_version": str(version)}), path)
    else:
        path.write_text("\n".join(map(json.dumps, [{"schema_version": version}, *rows])) + "\n")
    return path


def raw(**change: Any) -> list[dict[str, Any]]:
    """Two good rows with some keys changed; `...` leaves a key out."""
    row: dict[str, Any] = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "temperature": 1.0, "reward": 1.0}
    row = {key: value for key, value in (row | change).items() if value is not ...}
    return [row, dict(row)]


BAD_ROWS: list[tuple[list[dict[str, Any]], str]] = [
    ([], "the file holds 0 rows; expected at least one sequence"),
    (raw(temperature=...), "the column 'temperature' is missing; found 'prompt_ids', 'completion_ids', 'reward'"),
    (raw(temperature=None), "the column 'temperature' is missing"),
    (raw(completion_ids=..., prompt_ids=...), "the column 'prompt_ids', 'completion_ids' is missing"),
    (raw(reward="high"), "the column 'reward' has type str.*; expected float"),
    (raw(reward=[1.0]), "the column 'reward' has type list.*; expected float"),
    (raw(group_id=0.5), "'group_id' (has type double; expected int|holds float64 values; expected integers)"),
    (raw(prompt_ids=3), "the column 'prompt_ids' has type int.*; expected list of int"),
    (raw(prompt_ids=["a", "b"]), "'prompt_ids.* (has type list<.*string>; expected list of int|holds <U1 values)"),
    (raw(prompt_ids=[1.5]), "'prompt_ids.* (has type list<.*double>; expected list of int|holds float64 values)"),
    (raw(prompt_ids=[1, None]), "'prompt_ids.* (has type list<.*int64>; expected list of int|holds float64 values)"),
    (raw(completion_mask=[1, 2]), "'completion_mask.* holds values other than 0 and 1"),
    (raw(completion_mask=[0, 0, 1, 1]), "Row 0: the completion mask has 4 .* cover the prompt.*counted from 0"),
    (raw(completion_mask=[1]), "Row 0: the completion mask has 1 entries for 2 completion tokens"),
    (raw(completion_mask=[0, 0]), "Row 0 has no completion token"),
    (raw(reward=float("nan")), "Row 0: rewards is nan"),
    (raw(advantage=float("inf")), "Row 0: advantages is inf"),
    (raw(temperature=0.0), "Row 0: temperature is 0.0"),
    (raw(temperature=-1), "Row 0: temperature is -1.0"),
    (raw(completion_ids=[3, 9]), "Row 0: token id 9 at position 3 is outside the vocabulary of 9"),
    (raw(old_logps=[-1.0]), "Row 0: old_logps has 1 values for 2 completion tokens"),
    (raw()[:1] + raw(temperature=None)[:1], "Row 1: the column 'temperature' is empty|line 3 has no 'temperature'"),
    (raw(step=1)[:1] + raw(step=None)[:1], "Row 1: the column 'step' is empty|line 3 has no 'step'"),
]


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_bad_content(tmp_path: Path, extension: str, rows: list[dict[str, Any]], message: str) -> None:
    path = write_raw(tmp_path / f"a{extension}", rows)
    with pytest.raises(InputError, match=message) as caught:
        read_rollouts(path, vocab_size=9)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("read", [read_rollouts, read_metadata])
def test_files_that_are_none(tmp_path: Path, extension: str, read: Any) -> None:
    path = tmp_path / f"a{extension}"
    with pytest.raises(InputError, match="there is no such file"):
        read(path)
    path.touch()
    with pytest.raises(InputError, match=r"the file is empty \(0 bytes\)"):
        read(path)
    (tmp_path / f"folder{extension}").mkdir()
    with pytest.raises(InputError, match="this is a folder"):
        read(tmp_path / f"folder{extension}")
    write_raw(path, raw(), version=2)
    with pytest.raises(InputError, match=r"schema version is '?2'?; this release reads version 1"):
        read(path)


@pytest.mark.parametrize("read", [read_rollouts, read_metadata])
def test_files_of_another_format(tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.parquet").write_text("this is text\n" * 9)
    with pytest.raises(InputError, match="not a readable parquet file"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00PAR1")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"extension '.csv' is not known; expected .parquet or .jsonl"):
        read(tmp_path / "a.csv")


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_rollouts(path, fixed().build())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"not a readable parquet file .*; was it written completely"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_ids": [1, 2', r"line 3 is not JSON \(.* at column \d+\)"),
        ("[1, 2]", "line 3 is a JSON list; expected one object per line"),
        ('{"prompt_ids": [1]}', "line 3 has no 'completion_ids', other lines do"),
        ('{"prompt_ids": [1], "completion_ids": "text", "temperature": 1}', "type str in line 3; expected list of int"),
        ('{"prompt_ids": [1], "completion_ids": [1], "temperature": true}', "has type bool in line 3; expected float"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_raw(tmp_path / "a.jsonl", raw(reward=...)[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=message):
        read_rollouts(path)


@pytest.mark.parametrize("extension", FORMATS)
def test_unknown_columns_are_named(tmp_path: Path, extension: str) -> None:
    path = write_raw(tmp_path / f"a{extension}", raw(uid="x", min_p=0.1))
    with pytest.warns(FuncprobeWarning, match="the columns uid, min_p are not rollout columns and were not read"):
        rollouts = read_rollouts(path)
    assert rollouts.ids.tolist() == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("extension", FORMATS)
def test_truncated_sampling_warns(tmp_path: Path, extension: str) -> None:
    path = write_raw(tmp_path / f"a{extension}", raw(top_p=0.9))
    with pytest.warns(FuncprobeWarning, match="2 of 2 rows were sampled with top_p < 1"):
        read_rollouts(path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    rollouts = fixed().build()
    with pytest.raises(InputError, match=r"the folder '.*nowhere' does not exist"):
        write_rollouts(tmp_path / "nowhere" / "a.parquet", rollouts)
    with pytest.raises(InputError, match="extension '' is not known"):
        write_rollouts(tmp_path / "a", rollouts)
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(InputError, match="already exists"):
        write_rollouts(tmp_path / "a.parquet", rollouts, overwrite=True)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rollouts(tmp_path / "a.parquet", fixed().build())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (read_rollouts, read_metadata, parquet.read_parquet):
        with pytest.raises(MissingExtraError, match=r"needs the package 'pyarrow'.*funcprobe\[app\]"):
            call(tmp_path / "a.parquet")
    with pytest.raises(MissingExtraError, match=r"funcprobe\[app\]"):
        write_rollouts(tmp_path / "b.parquet", fixed().build())
