"""Columns as rollouts: one step of several, advantages of rows or of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from funcprobe.errors import InputError
from tests.cases import dumps
from tests.cases.dumps import read, row


@pytest.mark.parametrize("name", ["open-instruct", "prime-rl", "torchtitan", "verl", "ms-swift"])
def test_a_file_of_several_steps_is_read_by_step(name: str, tmp_path: Path) -> None:
    early, late = dumps.BY_NAME[name](3), dumps.BY_NAME[name](4)
    path = dumps.write(tmp_path, early, [*early.lines, *late.lines])
    found, _ = read(path, step=4)
    assert found.step is not None
    assert found.step.tolist() == [4] * 4
    with pytest.raises(InputError, match=r"holds 2 steps from 3 to 4, .*; choose one with step="):
        read(path)
    with pytest.raises(InputError, match="no row is of step 9; the file has 2 steps from 3 to 4"):
        read(path, step=9)


def test_advantages_of_tokens_stay_where_they_differ(tmp_path: Path) -> None:
    written = dumps.nemo()
    written.lines[0]["advantages"] = [[9.0, 9.0, 1.0, 2.0, 3.0, 9.0]]
    found, _ = read(dumps.write(tmp_path, written))
    assert found.advantages is not None
    assert found.advantages.shape == found.completion_mask.shape
    assert row(found, 0, "advantages") == [1.0, 2.0, 3.0]
    assert found.advantages[1].tolist() == [-0.5, -0.5, 0.0]
