"""Group ids of any kind, in lists and in files, and what one id of two prompts means."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.data.files import read_rollouts, write_rollouts
from funcprobe.data.rollouts import concatenate, rollouts_from_lists, rollouts_from_padded, take
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.objectives.losses import grpo
from funcprobe.types import Rollouts
from tests.cases.rollout_lists import assert_same_rollouts

ONE, TWO = uuid.UUID(int=7), uuid.UUID(int=2**100)

NAMES: list[tuple[Any, list[int]]] = [
    (["a", "a", "b", "b"], [0, 0, 1, 1]),
    (["b", "b", "a", "a"], [0, 0, 1, 1]),
    ([ONE, ONE, TWO, TWO], [0, 0, 1, 1]),
    ([("x", 1), ("x", 1), ("x", 2), ("x", 2)], [0, 0, 1, 1]),
    ([2**63, 2**63, -(2**70), -(2**70)], [0, 0, 1, 1]),
    ([2**63 - 1, 2**63 - 1, -(2**63), -(2**63)], [2**63 - 1, 2**63 - 1, -(2**63), -(2**63)]),
    ([-3, -3, 7, 7], [-3, -3, 7, 7]),
    (["1", "1", 1, 1], [0, 0, 1, 1]),
    ([b"a", b"a", "a", "a"], [0, 0, 1, 1]),
    (np.array(["a", "a", "b", "b"]), [0, 0, 1, 1]),
    (np.array([5, 5, 6, 6], dtype=np.uint8), [5, 5, 6, 6]),
    (np.array([2**63 + 1, 2**63 + 1, 2**63 + 2, 2**63 + 2], dtype=np.uint64), [0, 0, 1, 1]),
    (np.array([ONE, ONE, TWO, TWO], dtype=object), [0, 0, 1, 1]),
    (torch.tensor([9, 9, 4, 4], dtype=torch.int32), [9, 9, 4, 4]),
    (("a", "a", "b", "b"), [0, 0, 1, 1]),
]

PROMPTS = [[1, 2], [1, 2], [3], [3]]
COMPLETIONS = [[4], [5], [4, 4], [5]]


def build(**keywords: Any) -> Rollouts:
    return rollouts_from_lists(
        PROMPTS, COMPLETIONS, **({"temperature": 1.0, "rewards": [1.0, 0.0, 2.0, 0.0]} | keywords)
    )


@pytest.mark.parametrize(("names", "expected"), NAMES)
def test_any_key_is_a_group_id(names: Any, expected: list[int], tmp_path: Path) -> None:
    found = build(group_ids=names)
    assert found.group_ids.dtype == torch.int64
    assert found.group_ids.tolist() == expected
    padded = rollouts_from_padded(
        [[1, 2, 4], [1, 2, 5]] * 2, [[1, 1, 1]] * 4, [[0, 0, 1]] * 4, temperature=1.0,
        group_ids=[list(names)[i] for i in (0, 1, 0, 1)],
    )  # fmt: skip
    assert len(padded.group_ids.unique()) == 1
    for extension in ("parquet", "jsonl"):
        write_rollouts(tmp_path / f"a.{extension}", found)
        assert_same_rollouts(read_rollouts(tmp_path / f"a.{extension}"), found)


@given(
    st.lists(
        st.one_of(st.text(max_size=2), st.integers(), st.uuids(), st.tuples(st.integers(0, 1))), min_size=1, max_size=9
    )
)
def test_numbers_are_equal_where_names_are(names: list[Hashable]) -> None:
    found = rollouts_from_lists([[1]] * len(names), [[2]] * len(names), temperature=1.0, group_ids=names).group_ids
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            assert bool(found[i] == found[j]) == (one == other)


BAD: list[tuple[Any, str]] = [
    (["a", None, "b", "b"], "Row 1: group_ids is None"),
    ([["a"], ["a"], ["b"], ["b"]], "Row 0: group_ids is a list, which cannot be a key"),
    ([1, 1, {}, 2], "Row 2: group_ids is a dict, which cannot be a key"),
    ([0.5, 1, 1, 1], "'group_ids' holds float64 values; expected integers.*row 0 has 0.5"),
    ([1, 1, float("nan"), 2], "'group_ids' holds float64 values; expected integers.*row 2 has nan"),
    ([True, True, False, False], "'group_ids' holds bool values; expected integers"),
    (["a", "b"], r"'group_ids' has shape \(2,\)"),
    (torch.tensor([[1, 1], [2, 2]]), r"'group_ids' has shape \(2,\)"),
]


@pytest.mark.parametrize(("names", "message"), BAD)
def test_what_cannot_be_a_group_id_names_its_row(names: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(group_ids=names)


@pytest.mark.parametrize(
    ("names", "shown"), [(["a", "b", "b", "c"], "'b'"), ([5, 9, 9, 5], "9"), ([ONE, TWO, TWO, ONE], "UUID")]
)
def test_one_id_of_two_prompts_is_reported_with_both_rows(names: Any, shown: str) -> None:
    with pytest.warns(FuncprobeWarning, match=f"group id .*{shown}.* carries two prompts, those of rows 1 and 2"):
        build(group_ids=names)


COLUMNS: list[tuple[Any, list[int]]] = [
    (pa.array(["a", "a", "b", "b"]), [0, 0, 1, 1]),
    (pa.array(["a", "a", "b", "b"], pa.large_string()), [0, 0, 1, 1]),
    (pa.array([str(ONE), str(ONE), str(TWO), str(TWO)], pa.string_view()), [0, 0, 1, 1]),
    (pa.array(["a", "a", "b", "b"]).dictionary_encode(), [0, 0, 1, 1]),
    (pa.array([5, 5, 6, 6]).dictionary_encode(), [5, 5, 6, 6]),
    (pa.array([2**63 + 1] * 2 + [2**63 + 2] * 2, pa.uint64()), [0, 0, 1, 1]),
    (pa.array([3, 3, 4, 4], pa.uint64()), [3, 3, 4, 4]),
    (pa.array([-3, -3, 4, 4], pa.int8()), [-3, -3, 4, 4]),
    (pa.array([ONE.bytes] * 2 + [TWO.bytes] * 2, pa.binary(16)), [0, 0, 1, 1]),
    (pa.array([ONE.bytes] * 2 + [TWO.bytes] * 2, pa.uuid()), [0, 0, 1, 1]),
    (pa.array([b"a", b"a", b"b", b"b"]), [0, 0, 1, 1]),
]


@pytest.mark.parametrize(("column", "expected"), COLUMNS)
def test_parquet_columns_of_group_ids(column: Any, expected: list[int], tmp_path: Path) -> None:
    table = {"prompt_ids": PROMPTS, "completion_ids": COMPLETIONS, "temperature": [1.0] * 4, "group_id": column}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=3)
    found = read_rollouts(tmp_path / "a.parquet")
    assert found.group_ids.tolist() == expected
    write_rollouts(tmp_path / "b.parquet", found)
    assert_same_rollouts(read_rollouts(tmp_path / "b.parquet"), found)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["a", "a", "b", "b"], [0, 0, 1, 1]), ([2**70, 2**70, 1, 1], [0, 0, 1, 1]), ([-4, -4, 1, 1], [-4, -4, 1, 1])],
)
def test_json_lines_of_group_ids(names: list[Any], expected: list[int], tmp_path: Path) -> None:
    rows = [
        {"prompt_ids": p, "completion_ids": c, "temperature": 1.0, "group_id": g}
        for p, c, g in zip(PROMPTS, COMPLETIONS, names, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_rollouts(tmp_path / "a.jsonl").group_ids.tolist() == expected


def two(prompt: list[int], reward: float, **keywords: Any) -> Rollouts:
    return rollouts_from_lists([prompt] * 2, [[4], [5]], temperature=1.0, rewards=[reward] * 2, **keywords)


def test_default_ids_of_different_prompts_do_not_merge() -> None:
    both = concatenate([two([1, 2], 1.0), two([7, 8], 0.0), two([1, 2], 1.0)])
    assert both.group_ids.tolist() == [0, 0, 1, 1, 0, 0]
    with pytest.warns(FuncprobeWarning, match="All advantages are zero"):
        assert not bool(grpo().prepare(both).advantages.any())  # type: ignore[union-attr]


def test_default_ids_give_way_to_ids_of_the_callers_own() -> None:
    own = two([7, 8], 0.0, group_ids=[1, 1])
    both = concatenate([two([1, 2], 1.0), own, two([3], 0.0), two([9], 0.0)])
    assert both.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_own_ids_that_collide_stay_and_are_warned_of() -> None:
    with pytest.warns(FuncprobeWarning, match="group id 5 carries two prompts, those of rows 0 and 2"):
        both = concatenate([two([1, 2], 1.0, group_ids=[5, 5]), two([7, 8], 0.0, group_ids=[5, 5])])
    assert both.group_ids.tolist() == [5] * 4


def test_ids_without_a_collision_are_taken_as_they_are() -> None:
    whole = build(group_ids=[8, 8, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_rollouts(concatenate([take(whole, [0, 1]), take(whole, [2]), take(whole, [3])]), whole)


def test_a_message_that_names_a_group_still_can() -> None:
    with pytest.raises(InputError, match=r"Group 1 has a single rollout \(row 2\)"):
        grpo().prepare(take(build(group_ids=["a", "a", "b", "b"]), [0, 1, 2]))
