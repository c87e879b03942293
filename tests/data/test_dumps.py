"""Dumps of other frameworks: every column arrives under our name, and what a file leaves open is asked for.

The lines are written by hand from the frameworks' own writers (`tests.cases.dumps`); TRL's files are written by a real
trainer, in `tests/data/test_dump_text.py`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.data.dump_rows import packed
from funcprobe.data.dumps import DUMPS, recognised
from funcprobe.data.files import read_metadata, read_rollouts, write_rollouts
from funcprobe.errors import FuncprobeWarning, InputError, Note
from funcprobe.types import Rollouts
from tests.cases import dumps
from tests.cases.dumps import SEQUENCES
from tests.cases.trl_runs import tokenizer

IDS = ["open-instruct", "nemo-rl", "prime-rl", "torchtitan"]


def read(path: Path, from_: str = "auto", **options: Any) -> tuple[Rollouts, dict[str, str]]:
    """Read a dump; return the rollouts, and the warnings by kind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_rollouts(path, from_=from_, **{"temperature": 0.7, "tokenizer": tokenizer(), **options})
    notes = [w.message.args[0] for w in caught if isinstance(w.message, FuncprobeWarning)]  # type: ignore[union-attr]
    assert all(isinstance(note, Note) for note in notes), notes
    return found, {note.kind: str(note) for note in notes}


def row(found: Rollouts, b: int, name: str) -> list[Any]:
    mask = found.completion_mask[b]
    values = getattr(found, name)
    return values[b][mask].tolist() if values.ndim == 2 else [values[b].item()]


@pytest.mark.parametrize("name", dumps.BY_NAME)
def test_every_column_arrives(name: str, tmp_path: Path) -> None:
    written = dumps.BY_NAME[name](3)
    path = dumps.write(tmp_path, written)
    found, notes = read(path)
    is_text = DUMPS[name].is_text
    assert set(notes) == ({"format", "retokenized"} if is_text else {"format"})
    assert f"from_='{name}'" in notes["format"]
    for b, (prompt, completion, reward, advantage, logps) in enumerate(SEQUENCES):
        kept = [i for i in completion if i != 1] if is_text else completion  # the end of a text is not in it
        length = len(prompt)
        assert found.ids[b, :length].tolist() == prompt
        assert found.ids[b, length : length + len(kept)].tolist() == kept
        assert found.completion_mask[b].sum() == len(kept)
        assert not written.rewards or row(found, b, "rewards") == [reward]
        assert not written.advantages or row(found, b, "advantages") == [advantage]
        assert not written.sampling or row(found, b, "sampling_logps") == logps
    for field in ("rewards", "advantages", "sampling"):
        assert (getattr(found, field if field != "sampling" else "sampling_logps") is not None) == getattr(
            written, field
        )
    assert found.group_ids[0] == found.group_ids[1] != found.group_ids[2] == found.group_ids[3]
    assert found.temperature.tolist() == [0.7] * 4
    assert found.step is not None
    assert found.step.tolist() == [3] * 4
    assert read_metadata(path)["retokenized"] is is_text


@pytest.mark.parametrize("name", dumps.BY_NAME)
def test_a_named_dump_is_read_without_a_word_on_its_format(name: str, tmp_path: Path) -> None:
    _, notes = read(dumps.write(tmp_path, dumps.BY_NAME[name](3)), from_=name)
    assert "format" not in notes


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


@pytest.mark.parametrize("name", dumps.BY_NAME)
def test_what_a_file_leaves_open_is_asked_for(name: str, tmp_path: Path) -> None:
    path = dumps.write(tmp_path, dumps.BY_NAME[name](3))
    with pytest.raises(InputError, match=r"do not say their temperature|does not say its temperature"):
        read(path, temperature=None)
    if DUMPS[name].is_text:
        with pytest.raises(InputError, match=r"are text; give the tokenizer of the run as tokenizer="):
            read(path, tokenizer=None)


def test_names_that_are_none(tmp_path: Path) -> None:
    path = dumps.write(tmp_path, dumps.verl())
    with pytest.raises(InputError, match="from_ is 'verll'; expected auto, funcprobe, trl, ms-swift"):
        read(path, from_="verll")
    with pytest.raises(InputError, match="the column 'prompt_ids', 'completion_ids', 'temperature' is missing"):
        read(path, from_="funcprobe")
    for name in DUMPS.keys() - {"verl"}:
        with pytest.raises(
            InputError, match=rf"has no '\w+', which {DUMPS[name].title} have; found input, output, gts"
        ):
            read(path, from_=name)


def test_no_dump_has_the_signs_of_another(tmp_path: Path) -> None:
    for name, make in dumps.BY_NAME.items():
        keys = make(3).lines[0]
        assert [n for n, dump in DUMPS.items() if dump.suffix == ".jsonl" and dump.sign <= set(keys)] == [name]
    assert recognised(".jsonl", ["prompt", "completion"]) is None


def test_old_log_probabilities_are_those_that_the_ratio_is_taken_against(tmp_path: Path) -> None:
    nemo, _ = read(dumps.write(tmp_path, dumps.nemo()))
    prime, _ = read(dumps.write(tmp_path, dumps.prime_rl()))
    instruct, _ = read(dumps.write(tmp_path, dumps.open_instruct()))
    assert nemo.old_logps is not None
    assert prime.old_logps is not None
    assert row(nemo, 0, "old_logps") == [x - 0.125 for x in SEQUENCES[0][4]]
    assert row(prime, 0, "old_logps") == SEQUENCES[0][4]
    assert instruct.old_logps is None


def test_advantages_of_tokens_stay_where_they_differ(tmp_path: Path) -> None:
    written = dumps.nemo()
    written.lines[0]["advantages"] = [[9.0, 9.0, 1.0, 2.0, 3.0, 9.0]]
    found, _ = read(dumps.write(tmp_path, written))
    assert found.advantages is not None
    assert found.advantages.shape == found.completion_mask.shape
    assert row(found, 0, "advantages") == [1.0, 2.0, 3.0]
    assert found.advantages[1].tolist() == [-0.5, -0.5, 0.0]


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
    """Sequences laid end to end, with padding behind them, come apart where their positions begin again."""
    line: dict[str, list[Any]] = {"tokens": [], "positions": [], "marks": []}
    for number, (prompt, completion) in enumerate(lengths):
        line["tokens"] += [number] * (prompt + completion)
        line["positions"] += range(prompt + completion)
        line["marks"] += [0] * prompt + [1] * completion
    padded = {name: [*values, 0, 0] for name, values in line.items()}
    expected = [([n] * p, [n] * c) for n, (p, c) in enumerate(lengths)]
    assert [(row["prompt_ids"], row["completion_ids"]) for row in packed(padded)] == expected


def test_ranks_of_a_step_are_one_batch(tmp_path: Path) -> None:
    written = dumps.prime_rl(5)
    folder = tmp_path / "step_5"
    folder.mkdir()
    for rank, line in enumerate(written.lines):
        (folder / f"rank_{rank}.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="no file STABLE"):
        read(folder)
    (folder / "STABLE").touch()
    found, notes = read(folder)
    assert len(found.ids) == 4
    assert set(notes) == {"format"}
    with pytest.raises(InputError, match="this is a folder; expected a file"):
        read(tmp_path, from_="verl")


def turn(prompt: list[int], completion: list[int], logps: list[float] | None = None) -> dict[str, Any]:
    made = {"min_policy_version": 3, "max_policy_version": 3, "prompt_token_ids": prompt}
    return made | {"completion_token_ids": completion, "completion_logprobs": logps}


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


def test_one_id_of_two_prompts_is_reported(tmp_path: Path) -> None:
    written = dumps.open_instruct()
    written.lines[2]["prompt_idx"] = 0
    with pytest.warns(FuncprobeWarning, match="The group id 0 carries two prompts, those of rows 0 and 2"):
        read_rollouts(dumps.write(tmp_path, written), temperature=1.0, from_="open-instruct")


@pytest.mark.parametrize("ids", [["a", "a", "b", "b"], ["6f1c-1", "6f1c-1", "6f1c-2", "6f1c-2"], [2**70, 2**70, 1, 1]])
def test_group_ids_are_any_key(ids: list[Any], tmp_path: Path) -> None:
    written = dumps.verl()
    lines = [line | {"uid": uid} for line, uid in zip(written.lines, ids, strict=True)]
    found, _ = read(dumps.write(tmp_path, written, lines))
    assert found.group_ids.tolist() == [0, 0, 1, 1]


NAN = float("nan")


def test_tokens_that_the_sampler_did_not_score(tmp_path: Path) -> None:
    written = dumps.nemo()
    written.lines[0]["generation_logprobs"][0][3] = NAN
    found, notes = read(dumps.write(tmp_path, written))
    assert row(found, 0, "sampling_logps") == [-0.5, -1.125, -0.25]  # the old policy's in its place
    assert set(notes) == {"format"}
    written = dumps.open_instruct()
    written.lines[0]["logprobs"] = [-0.5, NAN, -0.25]
    found, notes = read(dumps.write(tmp_path, written))
    assert found.sampling_logps is None
    assert "(NaN) for 1 of 8 tokens" in notes["unscored tokens"]
    written = dumps.prime_rl()
    written.lines[0]["inference_logprobs"][2] = None
    found, notes = read(dumps.write(tmp_path, written))
    assert (found.sampling_logps, found.old_logps) == (None, None)
    assert "unscored tokens" in notes


def test_several_rewards_are_named_and_none_is_taken(tmp_path: Path) -> None:
    written = dumps.ms_swift()
    (table,) = written.lines
    entries = list(table.items())
    more = dict([*entries[:3], ("Format", [1.0] * 4), *entries[3:]])
    found, notes = read(dumps.write(tmp_path, written, [more]))
    assert found.rewards is None
    assert "the columns Format, Accuracy are not read" in notes["columns"]


def test_the_stamp_goes_with_a_file(tmp_path: Path) -> None:
    found, _ = read(dumps.write(tmp_path, dumps.verl()))
    for extension in ("parquet", "jsonl"):
        path = tmp_path / f"again.{extension}"
        write_rollouts(path, found, retokenized=True)
        assert read_metadata(path)["retokenized"] is True
        again, notes = read(path)
        assert set(notes) == {"retokenized"}
        assert torch.equal(again.ids, found.ids)


def slime(change: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "rollout_id": 3,
        "samples": [
            {
                "group_index": i // 2,
                "index": i,
                "rollout_id": None,
                "prompt": "text",
                "tokens": prompt + completion,
                "response_length": len(completion),
                "reward": reward,
                "loss_mask": torch.ones(len(completion), dtype=torch.int),
                "rollout_log_probs": logps,
                "status": "completed",
                **(change or {}),
            }
            for i, (prompt, completion, reward, _, logps) in enumerate(SEQUENCES)
        ],
    }


def test_a_pickle_of_plain_containers_is_read(tmp_path: Path) -> None:
    torch.save(slime(), tmp_path / "rollout_data_3.pt")
    found, notes = read(tmp_path / "rollout_data_3.pt")
    assert set(notes) == {"format"}
    assert row(found, 0, "sampling_logps") == SEQUENCES[0][4]
    assert found.step is not None
    assert found.step.tolist() == [3] * 4
    assert found.group_ids.tolist() == [0, 0, 1, 1]


class Trap:
    """An object that would say so if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("suffix", ["pt", "pkl", "pickle", "pth"])
def test_any_other_pickle_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    import pickle

    path = tmp_path / f"rollouts.{suffix}"
    if suffix in ("pt", "pth"):
        torch.save(slime({"status": Trap()}), path)
    else:
        path.write_bytes(pickle.dumps({"samples": [Trap()]}))
    with pytest.raises(InputError, match=r"slime's \.pt and SkyRL's \.pkl are pickles") as caught:
        read(path)
    assert str(path) in str(caught.value)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("nemo-rl", {"token_ids": [[1, 2]]}, "'marks' has 6 values for 2 tokens|length is 5"),
    ("nemo-rl", {"token_ids": 3}, "line 1: 'tokens' is int; expected a list"),
    ("nemo-rl", {"token_loss_mask": [[1] * 4]}, "line 1: 'marks' has 4 values for 5 tokens"),
    ("nemo-rl", {"input_lengths": [9]}, "line 1: the length is 9"),
    ("nemo-rl", {"input_lengths": ["a"]}, "line 1: the length is 'a'"),
    ("nemo-rl", {"advantages": [["a"] * 6]}, "'advantage, row 0' holds"),
    ("nemo-rl", {"advantages": [[NAN] * 6]}, "Row 0: advantages is nan"),
    ("prime-rl", {"position_ids": [0, 1]}, r"line 1: '\w+' has 9 values for 2 tokens"),
    ("prime-rl", {"position_ids": ["a"] * 9}, "line 1: a position is 'a'"),
    ("prime-rl", {"loss_mask": 1}, "line 1: 'marks' is int"),
    ("prime-rl", {"loss_mask": [[1]] * 9}, "completion_mask"),
    ("torchtitan", {"turns": [{"turn_id": 0}]}, "line 1: a turn has no 'prompt_token_ids'; .*log_tensors=True"),
    ("torchtitan", {"turns": [3]}, "line 1: a turn has no"),
    ("torchtitan", {"turns": 3}, "line 1: 'turns' is int"),
    ("torchtitan", {"turns": [turn([3], [4], 7)]}, "line 1: 'completion_logprobs' is int"),  # type: ignore[arg-type]
    ("torchtitan", {"group_id": [1]}, "'group_id' has type list"),
    ("open-instruct", {"logprobs": [-1.0]}, "Row 0: sampling_logps has 1 values for 3"),
    ("open-instruct", {"prompt_tokens": "text"}, "'prompt_ids' has type str in line 1"),
    ("open-instruct", {"response_tokens": None}, "line 1 has no 'completion_ids'"),
    ("open-instruct", {"step": "soon"}, "'step' has type str in line 1"),
    ("verl", {"input": 3}, "line 1: 'prompt' is int; expected text"),
    ("verl", {"output": None}, "line 1: 'completion' is NoneType"),
    ("verl", {"score": "good"}, "'reward' has type str in line 1"),
    ("ms-swift", {"prompt": ["a"]}, "line 1: the columns of the table have different lengths"),
    ("ms-swift", {"advantages": 1.0}, "line 1: 'advantage' is float"),
    ("ms-swift", {"completion": [[{"content": "a"}, {"content": "b"}]] * 4}, "one message of text"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_lines(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written = dumps.BY_NAME[name](3)
    path = dumps.write(tmp_path, written, [written.lines[0] | change, *written.lines[1:]])
    with pytest.raises(InputError, match=message) as caught:
        read(path, from_=name)
    assert str(caught.value).startswith(str(path))
