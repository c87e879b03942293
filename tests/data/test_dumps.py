"""Dumps of other frameworks: every column arrives under our name, and what a file leaves open is asked for.

The lines are written by hand from the frameworks' own writers (`tests.cases.dumps`); TRL's files are written by a real
trainer, in `tests/data/test_dump_text.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from funcprobe.data.dumps import DUMPS, recognised
from funcprobe.data.files import read_metadata, read_rollouts
from funcprobe.errors import FuncprobeWarning, InputError
from tests.cases import dumps
from tests.cases.dumps import SEQUENCES, read, row, turn


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
