"""Dumps of text: a real TRL run's completions come back as its own batch, but for the special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.data.dump_text import encoded
from funcprobe.data.files import read_rollouts
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.types import Rollouts
from tests.cases.trl_folders import run_folder
from tests.cases.trl_runs import Seen, tokenizer

SPECIAL = (0, 1, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    folder = tmp_path_factory.mktemp("trl") / "run"
    return folder / "completions", run_folder(folder)


def key(prompt: list[int], completion: list[int], advantage: float) -> tuple[Any, ...]:
    return tuple(prompt), tuple(i for i in completion if i not in SPECIAL), round(advantage, 5)


def of_the_run(seen: Seen) -> list[tuple[Any, ...]]:
    """Return the rows of the batch that the trainer stepped on, its special tokens left out."""
    rows = []
    for inputs in seen.inputs:
        for p, pm, c, cm, a in zip(
            *(inputs[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")),
            strict=True,
        ):
            rows.append(key(p[pm.bool()].tolist(), c[cm.bool()].tolist(), a.item()))
    return sorted(rows)


def of_the_file(found: Rollouts) -> list[tuple[Any, ...]]:
    assert found.advantages is not None
    return sorted(
        key(ids[:start].tolist(), ids[start : start + int(mask.sum())].tolist(), a.item())
        for ids, start, mask, a in zip(
            found.ids, found.prompt_lengths, found.completion_mask, found.advantages, strict=True
        )
    )


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_file_of_a_step_is_the_batch_that_it_was_taken_on(step: int, trained: tuple[Path, list[Seen]]) -> None:
    folder, seen = trained
    with pytest.warns(FuncprobeWarning) as caught:
        found = read_rollouts(folder / f"completions_{step:05d}.parquet", tokenizer=tokenizer(), temperature=0.9)
    assert [w.message.args[0].kind for w in caught] == ["format", "retokenized"]  # type: ignore[union-attr]
    assert of_the_file(found) == of_the_run(seen[step - 1])
    assert of_the_file(found) != of_the_run(seen[step % 3])
    assert found.step is not None
    assert set(found.step.tolist()) == {step}
    assert found.rewards is not None
    assert torch.bincount(found.group_ids).tolist() == [4, 4]


class Tokenizer:
    """Ids of words are their lengths; 100 stands before a prompt, and a template says who speaks."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [100] * add_special_tokens + [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        assert all("tool_calls" not in message for message in messages)
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"


def test_prompts_have_the_special_tokens_that_a_trainer_gives_them() -> None:
    row = {"prompt": "a bb", "completion": "ccc", "reward": 1.0}
    assert encoded(row, Tokenizer(), rendered=False) == {
        "prompt_ids": [100, 1, 2],
        "completion_ids": [3],
        "reward": 1.0,
    }
    assert encoded(row, Tokenizer(), rendered=True)["prompt_ids"] == [1, 2]


def test_messages_go_through_the_template() -> None:
    prompt = [{"role": "user", "content": "a bb", "tool_calls": None}]  # parquet gives every message every field
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "ccc dddd"}]}
    found = encoded(row, Tokenizer(), rendered=False)
    assert found == {"prompt_ids": [6, 1, 2, 11], "completion_ids": [3, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "'prompt' is NoneType; expected text, or a list of messages"),
        ({"prompt": [3]}, "'prompt' is list"),
        ({"completion": 3}, "'completion' is int; expected text, or one message"),
        ({"completion": [{"role": "assistant"}]}, "'completion' is NoneType"),
        ({"completion": [{"content": "a"}, {"content": "b"}]}, "'completion' is list"),
    ],
)
def test_texts_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoded({"prompt": "a", "completion": "b", **change}, Tokenizer(), rendered=False)
