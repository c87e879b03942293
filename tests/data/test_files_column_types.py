"""What other tools write: a column is read right, or refused by a sentence that says where and what."""

from __future__ import annotations

import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from funcprobe.data.files import read_rollouts
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.errors import InputError

PROMPTS, COMPLETIONS, REWARDS = [[1, 2], [1, 2], [3, 4], [3, 4]], [[4, 5], [6, 0], [2, 3], [1, 7]], [1.0, 0.0, 0.5, 1.0]


def write(path: Path, **columns: Any) -> Path:
    table = {"prompt_ids": PROMPTS, "completion_ids": COMPLETIONS, "temperature": [1.0] * 4, "reward": REWARDS}
    pq.write_table(pa.table(table | columns), path, row_group_size=3)
    return path


FLAT = pa.array([4, 5, 6, 0, 2, 3, 1, 7])
READ: dict[str, tuple[str, Any]] = {
    "small unsigned": ("completion_ids", pa.array(COMPLETIONS, pa.list_(pa.uint16()))),
    "large list": ("completion_ids", pa.array(COMPLETIONS, pa.large_list(pa.int32()))),
    "fixed size": ("completion_ids", pa.array(COMPLETIONS, pa.list_(pa.int64(), 2))),
    "list view": ("completion_ids", pa.array(COMPLETIONS, pa.list_view(pa.int64()))),
    "list of dictionary": (
        "completion_ids",
        pa.ListArray.from_arrays(pa.array([0, 2, 4, 6, 8], pa.int32()), FLAT.dictionary_encode()),
    ),
    "dictionary": ("reward", pa.array(REWARDS).dictionary_encode()),
    "decimal": ("reward", pa.array([decimal.Decimal(str(r)) for r in REWARDS], pa.decimal128(5, 2))),
    "decimal256": ("reward", pa.array([decimal.Decimal(str(r)) for r in REWARDS], pa.decimal256(50, 20))),
    "half": ("reward", pa.array([np.float16(r) for r in REWARDS], pa.float16())),
    "float32": ("reward", pa.array(REWARDS, pa.float32())),
    "integer temperature": ("temperature", pa.array([1] * 4)),
}


@pytest.mark.parametrize("name", READ)
def test_columns_that_hold_numbers_are_read(name: str, tmp_path: Path) -> None:
    column, values = READ[name]
    found = read_rollouts(write(tmp_path / "a.parquet", **{column: values}))
    expected = rollouts_from_lists(PROMPTS, COMPLETIONS, temperature=1.0, rewards=REWARDS)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.rewards, expected.rewards)  # type: ignore[arg-type]


def test_decimals_are_the_nearest_floats_and_bools_are_0_and_1(tmp_path: Path) -> None:
    values = ["0.1", "-123456789.987654321", "0.333333333333333333", "2.675"]
    column = pa.array([decimal.Decimal(v) for v in values], pa.decimal128(38, 18))
    found = read_rollouts(write(tmp_path / "a.parquet", reward=column))
    assert found.rewards is not None
    assert found.rewards.tolist() == [float(v) for v in values]
    found = read_rollouts(write(tmp_path / "b.parquet", reward=pa.array([True, False, False, True])))
    assert found.rewards is not None
    assert found.rewards.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_null_log_probability_stands_in_holes_only(tmp_path: Path) -> None:
    logps = pa.array([[-1.0, None], [-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]])
    masks = [[1, 0], [1, 1], [1, 1], [1, 1]]
    found = read_rollouts(write(tmp_path / "a.parquet", old_logps=logps, completion_mask=masks))
    assert found.old_logps is not None
    assert found.old_logps[0].tolist() == [-1.0, 0.0]
    with pytest.raises(InputError, match="Row 0: old_logps is nan at completion position 1"):
        read_rollouts(write(tmp_path / "b.parquet", old_logps=logps))


REFUSED: list[tuple[str, Any, str]] = [
    (
        "completion_ids",
        [[4, 5], [6, None], [2, 3], [1, 7]],
        "Row 1: the column 'completion_ids' .* position 1 is empty",
    ),
    ("prompt_ids", [[1, 2], [1, 2], [3, 4], [None, 4]], "Row 3: the column 'prompt_ids' .* position 0 is empty"),
    ("completion_mask", [[1, 1], [1, 1], [1, None], [1, 1]], "Row 2: the column 'completion_mask' .* position 1 is"),
    ("completion_mask", [[True, True], [True, None], [True, True], [True, True]], "Row 1: .* position 1 is empty"),
    ("completion_ids", [[float(i) for i in c] for c in COMPLETIONS], r"list<.*double>; .*row 0 holds \[4.0, 5.0\]"),
    ("completion_ids", ["4 5"] * 4, "type string; expected list of int, and row 0 holds '4 5'"),
    (
        "completion_ids",
        pa.array([[str(i) for i in c] for c in COMPLETIONS]),
        r"type list<.*string>; expected list of int",
    ),
    ("completion_ids", pa.array([[[i] for i in c] for c in COMPLETIONS]), "expected list of int, and row 0"),
    (
        "completion_ids",
        pa.array([[(4, 1)], [(6, 1)], [(2, 1)], [(1, 1)]], pa.map_(pa.int64(), pa.int64())),
        "type map<",
    ),
    (
        "completion_ids",
        pa.array([[2**64 - 1, 1]] * 4, pa.list_(pa.uint64())),
        "18446744073709551615, which is no 64-bit",
    ),
    ("sampling_logps", [[[-1.0, -2.0]] * 2] * 4, "expected list of float, and row 0 holds"),
    (
        "sampling_logps",
        [[{"logprob": -1.0}] * 2] * 4,
        "struct<logprob: double>>; expected list of float, and row 0 holds",
    ),
    ("reward", [1.0, None, 0.0, 1.0], r"Row 1: the column 'reward' is empty \(null\)"),
    ("reward", [1.0, float("nan"), 0.0, 1.0], "Row 1: rewards is nan"),
    ("reward", ["high"] * 4, "type string; expected float, and row 0 holds 'high'"),
    ("reward", pa.array([1, 2, 3, 4], pa.timestamp("s")), "expected float, and row 0 holds"),
    ("reward", pa.array([b"1"] * 4), "type binary; expected float"),
    ("advantage", [[0.5, 0.5]] * 4, r"expected float, and row 0 holds \[0.5, 0.5\]"),
    ("old_logps", [[-1.0, -1.0], None, [-1.0, -1.0], [-1.0, -1.0]], "Row 1: the column 'old_logps' is empty"),
    ("step", [1.0] * 4, "type double; expected int, and row 0 holds 1.0"),
    ("group_id", [0.5] * 4, "type double; expected int or text, and row 0 holds 0.5"),
    ("group_id", [None, "a", "a", "a"], r"Row 0: the column 'group_id' is empty \(null\)"),
    ("group_id", [[1]] * 4, r"expected int or text, and row 0 holds \[1\]"),
    ("group_id", [True] * 4, "type bool; expected int or text"),
]


@pytest.mark.parametrize(("column", "values", "message"), REFUSED)
def test_columns_that_hold_something_else_say_where_and_what(
    column: str, values: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_rollouts(write(tmp_path / "a.parquet", **{column: values}))
    assert "\n" not in str(caught.value)


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    names = ["prompt_ids", "completion_ids", "temperature", "reward", "reward"]
    table = pa.Table.from_arrays([pa.array(x) for x in (PROMPTS, COMPLETIONS, [1.0] * 4, REWARDS, REWARDS)], names)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="the column 'reward' stands twice"):
        read_rollouts(tmp_path / "a.parquet")


ROW = {"prompt_ids": [1, 2], "completion_ids": [4, 5], "temperature": 1.0, "reward": 1.0}
LINE = json.dumps(ROW) + "\n"


@pytest.mark.parametrize(("text", "encoding"), [(LINE * 2, "utf-8-sig"), ((LINE * 2).replace("\n", "\r\n"), "utf-8")])
def test_marks_and_line_ends_of_other_editors_are_read(text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
    assert read_rollouts(tmp_path / "a.jsonl").ids.tolist() == [[1, 2, 4, 5]] * 2


LINES: list[tuple[bytes, str]] = [
    (LINE.encode("utf-16"), "it is UTF-16 or UTF-32, so save it as UTF-8"),
    (LINE.encode("utf-32"), "not UTF-8 text"),
    (json.dumps([ROW, ROW]).encode(), "line 1 is a JSON list; expected one object per line .a JSON array of rows"),
    (json.dumps(ROW, indent=1).encode(), "a JSON document over several lines; expected one object per line"),
    (json.dumps([ROW, ROW], indent=2).encode(), "a JSON document over several lines; expected one object per line"),
    (b'"text"\n', "line 1 is a JSON str; expected one object per line"),
    ((LINE + "\0\0\n").encode(), "line 2 is not JSON"),
    (b"\0" * 64, "line 1 is not JSON"),
    (b"[" * 100_000, "line 1 cannot be read .it is nested too deeply"),
    (b'{"a":' * 100_000, "line 1 cannot be read .it is nested too deeply"),
    (LINE.replace("[4, 5]", "[" + "9" * 5000 + "]").encode(), "line 1 cannot be read .*digits"),
    (LINE.replace('"reward": 1.0', '"reward": 0.0, "reward": 1.0').encode(), "line 1 cannot be read .the key 'reward'"),
    (LINE.replace("[4, 5]", "[4, null]").encode(), "'completion_ids, row 0' holds .*position 1 is null"),
    (LINE.replace('"reward"', '"completion_mask": [1, null], "reward"').encode(), "a mask, and position 1 is null"),
    ((LINE + LINE.replace("[4, 5]", "[4, 99999999999999999999]")).encode(), "row 1' holds .*position 1 is 9{20}"),
    (LINE.replace("[4, 5]", "[18446744073709551615, 1]").encode(), "18446744073709551615"),
    (LINE.replace("[4, 5]", "[4e0, 5]").encode(), "row 0' holds float64 values; expected integers .*position 0 is 4.0"),
    (LINE.replace("[4, 5]", "[[4, 5]]").encode(), "row 0' has 2 dimensions"),
    (LINE.replace("[4, 5]", "[4, [5]]").encode(), "row 0'"),
    (LINE.replace("[4, 5]", "[4, {}]").encode(), "row 0' holds entries that are no numbers"),
    (LINE.replace('"reward": 1.0', '"reward": NaN').encode(), "Row 0: rewards is nan"),
    (LINE.replace('"reward": 1.0', '"reward": ' + "9" * 400).encode(), "rewards?'? "),
    (
        LINE.replace('"reward"', '"group_id": null, "reward"').encode()
        + LINE.replace('"reward"', '"group_id": 1, "reward"').encode(),
        "line 1 has no 'group_id'",
    ),
    (
        LINE.replace('"reward"', '"group_id": 0.5, "reward"').encode(),
        "'group_id' holds float64 values.* line 1 has 0.5",
    ),
    (
        LINE.replace('"reward"', '"group_id": [1], "reward"').encode(),
        "'group_id' has type list in line 1; expected int or text",
    ),
    (LINE.replace('"reward"', '"group_id": true, "reward"').encode(), "'group_id' has type bool in line 1"),
]


@pytest.mark.parametrize(("content", "message"), LINES)
def test_lines_that_are_no_rollouts_say_where_and_what(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rollouts(tmp_path / "a.jsonl")
