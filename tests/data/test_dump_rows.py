"""Lines of dumps come apart into sequences: masks, packing, turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.data.dump_rows import packed
from funcprobe.data.files import read_rollouts
from funcprobe.errors import FuncprobeWarning
from tests.cases import dumps
from tests.cases.dumps import SEQUENCES, read, row, turn


def test_old_log_probabilities_are_those_that_the_ratio_is_taken_against(tmp_path: Path) -> None:
    nemo, _ = read(dumps.write(tmp_path, dumps.nemo()))
    prime, _ = read(dumps.write(tmp_path, dumps.prime_rl()))
    instruct, _ = read(dumps.write(tmp_path, dumps.open_instruct()))
    assert nemo.old_logps is not None
    assert prime.old_logps is not None
    assert row(nemo, 0, "old_logps") == [x - 0.125 for x in SEQUENCES[0][4]]
    assert row(prime, 0, "old_logps") == SEQUENCES[0][4]
    assert instruct.old_logps is None


def test_a_sample_that_is_taken_out_of_the_loss_keeps_its_row(tmp_path: Path) -> None:
    written = dumps.nemo()
    written.lines[1]["sample_loss_mask"] = [0.0]
    found, _ = read(dumps.write(tmp_path, written))
    assert found.completion_mask.sum(1).tolist() == [3, 0, 2, 1]
    assert found.prompt_lengths.tolist() == [2, 2, 1, 1]


def test_holes_in_a_mask_stay_holes(tmp_path: Path) -> None:
    written = dumps.prime_rl()
    written.lines[0]["loss_mask"][3] = False  # in the first completion
    found, _ = read(dumps.write(tmp_path, written))
    assert found.completion_mask[0].tolist() == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5))
def test_packing_is_undone(lengths: list[tuple[int, int]]) -> None:
    """Sequences laid end to end, with padding behind each, come apart where their positions begin again."""
    line: dict[str, list[Any]] = {"tokens": [], "positions": [], "marks": []}
    for number, (prompt, completion) in enumerate(lengths):
        line["tokens"] += [*[number] * (prompt + completion), 0, 0]
        line["positions"] += [*range(prompt + completion), 0, 0]
        line["marks"] += [0] * prompt + [1] * completion + [0, 0]
    expected = [([n] * p, [n] * c) for n, (p, c) in enumerate(lengths)]
    assert [(row["prompt_ids"], row["completion_ids"]) for row in packed(line)] == expected


def conversation(*turns: dict[str, Any]) -> dict[str, Any]:
    return {**dumps.torchtitan().lines[0], "turns": list(turns)}


def test_turns_are_one_sequence_with_the_environments_tokens_masked_out(tmp_path: Path) -> None:
    line = conversation(turn([3], [4, 5], [-1.0, -2.0]), turn([3, 4, 5, 8, 9], [6], [-0.5]))
    found, _ = read(dumps.write(tmp_path, dumps.torchtitan(), [line]))
    assert found.ids.tolist() == [[3, 4, 5, 8, 9, 6]]
    assert found.prompt_lengths.tolist() == [1]
    assert found.completion_mask.tolist() == [[True, True, False, False, True]]
    assert row(found, 0, "sampling_logps") == [-1.0, -2.0, -0.5]


def test_a_turn_that_does_not_go_on_begins_a_sequence(tmp_path: Path) -> None:
    line = conversation(turn([3], [4], [-1.0]), turn([7, 8], [6], [-0.5]))
    with pytest.warns(FuncprobeWarning) as caught:
        found = read_rollouts(dumps.write(tmp_path, dumps.torchtitan(), [line]), temperature=1.0, from_="torchtitan")
    assert found.ids.tolist() == [[3, 4, 0], [7, 8, 6]]
    assert any("group id 10 carries two prompts" in str(w.message) for w in caught)


def test_log_probabilities_of_some_turns_are_none(tmp_path: Path) -> None:
    line = conversation(turn([3], [4], [-1.0]), turn([3, 4, 8], [6]))
    found, _ = read(dumps.write(tmp_path, dumps.torchtitan(), [line]))
    assert found.sampling_logps is None
    assert found.old_logps is None
