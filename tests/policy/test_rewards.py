"""Reward functions: found by name, called as TRL calls them, and never believed unseen."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.cli.demo_task import build_tokenizer
from funcprobe.errors import InputError
from funcprobe.policy.rewards import load_reward, rewards_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of one's own, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_function_of_a_module_in_the_working_directory(here: Path) -> None:
    (here / "house_rewards.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    reward = load_reward("house_rewards:length")
    assert rewards_of(reward, [[1], [2]], [[3, 4], [5]]) == [2.0, 1.0]


def test_the_working_directory_comes_first_and_stays_as_under_python_m(here: Path) -> None:
    (here / "house_rewards.py").write_text(
        "def late(completions, **_):\n    import helper\n    return helper.ones(completions)\n"
    )
    (here / "helper.py").write_text("def ones(rows):\n    return [1.0 for _ in rows]\n")
    assert rewards_of(load_reward("house_rewards:late"), [[1]], [[3]]) == [1.0]
    assert sys.path[0] == str(here)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "expected the form module:function"),
        ("module:", "expected the form module:function"),
        (":function", "expected the form module:function"),
        ("a-b:c", "expected the form module:function"),
        ("path/to.py:c", "expected the form module:function"),
        ("not_there_at_all:f", "There is no module 'not_there_at_all'"),
        ("funcprobe.not_there:f", "There is no module 'funcprobe.not_there'"),
        ("math:not_there", "The module 'math' has no 'not_there'"),
        ("math:pi", "'math:pi' is a float; expected a function"),
        ("needs_more:f", "'needs_more' cannot be imported: ModuleNotFoundError: No module named 'not_installed'"),
        ("half_written:f", "'half_written' cannot be imported: SyntaxError"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(here: Path, name: str, message: str) -> None:
    (here / "needs_more.py").write_text("import not_installed\n")
    (here / "half_written.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=message):
        load_reward(name)


def test_a_reward_sees_text_without_special_tokens_where_there_is_a_tokenizer() -> None:
    tokenizer, seen = build_tokenizer(), {}

    def reward(prompts: list[str], completions: list[str]) -> torch.Tensor:
        seen.update(prompts=prompts, completions=completions)
        return torch.tensor([1.0, 0.0])

    ids = [tokenizer.encode(text) for text in ("12=", "3.=")]
    assert rewards_of(reward, ids, [[1, 3, tokenizer.eos_token_id], [3]], tokenizer) == [1.0, 0.0]
    assert seen == {"prompts": ["12=", "3.="], "completions": ["13", "3"]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, math.nan], "returned nan for row 1; expected a finite number"),
        ([math.inf, 1.0], "returned inf for row 0"),
        ([1.0, None], "returned None for row 1"),
        (["right", 1.0], "returned 'right' for row 0"),
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0] * 3, "returned 3 values for 2 completions"),
        (None, "returned a NoneType; expected a list of numbers"),
        (1.0, "returned a float; expected a list of numbers"),
    ],
)
def test_an_answer_that_is_no_list_of_rewards_is_refused(returned: Any, message: str) -> None:
    def judge(prompts: list[Any], completions: list[Any]) -> Any:
        return returned

    with pytest.raises(InputError, match=f"The reward function 'judge' {message}"):
        rewards_of(judge, [[1], [2]], [[3], [4]])
