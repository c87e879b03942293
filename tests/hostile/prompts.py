"""Prompts, options and reward functions of `funcprobe sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.hostile.room import Case, Room

HUGE = "9" * 5000


def _sample(*words: str, prompts: str = "prompts.txt") -> list[str]:
    given = ["sample", "checkpoint", prompts, "--output", "drawn.jsonl", "--max-new-tokens", "2", *words]
    return given if "--temperature" in words else [*given, "--temperature", "1"]


def _words(*words: str) -> Callable[[Room], list[str]]:
    return lambda room: _sample(*words)


def _prompts(text: str | bytes, name: str = "p.jsonl") -> Callable[[Room], list[str]]:
    def make(room: Room) -> list[str]:
        room.write(name, text)
        return _sample(prompts=name)

    return make


def _reward(source: str, name: str = "mine:reward") -> Callable[[Room], list[str]]:
    def make(room: Room) -> list[str]:
        room.write("mine.py", source)
        return _sample("--reward", name)

    return make


def _returns(expression: str) -> Callable[[Room], list[str]]:
    return _reward(f"def reward(prompts, completions):\n    return {expression}\n")


def _parquet(**columns: Any) -> Callable[[Room], list[str]]:
    def make(room: Room) -> list[str]:
        room.parquet(columns, "p.parquet")
        return _sample(prompts="p.parquet")

    return make


_NUMBERS = {
    "temperature": ("0", "-1", "nan", "inf", "1e400", "abc", "²", HUGE),
    "max-new-tokens": ("0", "-1", "1.5", "²", HUGE, str(2**63), "1000001"),
    "group-size": ("0", "-1", "x", HUGE, str(2**63), "1000000000"),
    "batch-size": ("0", "-3", "x", HUGE),
    "seed": ("x", "1.5", HUGE, str(2**64), "-1"),
    "dtype": ("int7", "int64"),
    "device": ("toaster", "cuda:99"),
}

_PROMPTS: dict[str, tuple[str, Callable[[Room], list[str]]]] = {
    "nowhere": ("nowhere.txt", lambda r: _sample(prompts="nowhere.txt")),
    "a folder": ("checkpoint", lambda r: _sample(prompts="checkpoint")),
    "NUL": ("NUL", lambda r: _sample(prompts="pro\0mpts.txt")),
    "an unknown user's": ("no-such-user", lambda r: _sample(prompts="~no-such-user/p.txt")),
    "another suffix": ("p.csv", _prompts("a", "p.csv")),
    "an empty text": ("p.txt", _prompts("", "p.txt")),
    "a text of white space": ("p.txt", _prompts("\n \n", "p.txt")),
    "a text in Latin-1": ("p.txt", _prompts(b"caf\xe9\n", "p.txt")),
    "more tokens than the model has positions": ("max_new_tokens", _words("--max-new-tokens", "100")),
    "a text longer than the model": ("32", _prompts("3" * 100 + "\n", "p.txt")),
    "a text of 20 MB": ("p.txt", _prompts("3" * 20_000_000 + "\n", "p.txt")),
    "empty": ("p.jsonl", _prompts("")),
    "a word": ("line 1", _prompts("hello\n")),
    "a number": ("line 1", _prompts("3\n")),
    "another key": ("line 1", _prompts('{"text": "a"}\n')),
    "null": ("line 1", _prompts('{"prompt": null}\n')),
    "a number as prompt": ("prompt 0", _prompts('{"prompt": 3}\n')),
    "an object as prompt": ("prompt 0", _prompts('{"prompt": {"a": 1}}\n')),
    "truth in ids": ("prompt 0", _prompts('{"prompt_ids": [true]}\n')),
    "fractions in ids": ("prompt 0", _prompts('{"prompt_ids": [3.5]}\n')),
    "no ids": ("prompt 0", _prompts('{"prompt_ids": []}\n')),
    "a negative id": ("Prompt 0", _prompts('{"prompt_ids": [-1]}\n')),
    "an id beyond the vocabulary": ("Prompt 0", _prompts('{"prompt_ids": [14]}\n')),
    "an id of 2**70": ("Prompt 0", _prompts(f'{{"prompt_ids": [{2**70}]}}\n')),
    "an id of 5,000 digits": ("line 1", _prompts(f'{{"prompt_ids": [{HUGE}]}}\n')),
    "ids longer than the model": ("32", _prompts(f'{{"prompt_ids": {[3] * 100}}}\n')),
    "nested deeply": ("line 1", _prompts("[" * 100_000)),
    "chat without a template": ("chat template", _prompts('{"prompt": [{"role": "user", "content": "3"}]}\n')),
    "a surrogate": ("prompt 0", _prompts('{"prompt": "\\ud800"}\n')),
    "a parquet file that is none": ("p.parquet", _prompts("hello", "p.parquet")),
    "parquet of numbers": ("prompt 0", _parquet(prompt=[1, 2])),
    "parquet without prompts": ("p.parquet", _parquet(text=["a"])),
    "parquet with a null": ("prompt 1", _parquet(prompt=["31=", None])),
}

_REWARDS: dict[str, tuple[str, Callable[[Room], list[str]]]] = {
    "another form": ("module:function", _words("--reward", "mine")),
    "a path": ("mine.py", _words("--reward", "mine.py:reward")),
    "a module that is not there": ("nowhere", _words("--reward", "nowhere:reward")),
    "a function that is not there": ("other", _reward("", "mine:other")),
    "a number": ("int", _reward("reward = 3\n")),
    "a syntax error": ("mine", _reward("def reward(:\n")),
    "an error on import": ("mine", _reward("1 / 0\n")),
    "an exit on import": ("mine", _reward("import sys\nsys.exit(0)\n")),
    "a lazy error": ("mine", _reward("def __getattr__(name):\n    raise ValueError('no')\n")),
    "an error": ("ZeroDivisionError", _returns("1 / 0")),
    "an exit": ("SystemExit", _returns("exit(0)")),
    "a recursion": (
        "RecursionError",
        _reward("def reward(prompts, completions):\n    return reward(prompts, completions)\n"),
    ),
    "an error with an escape": (
        "‹U+001B›",
        _reward("def reward(**_):\n    raise ValueError('\\x1b[31m\\u202e' * 999)\n"),
    ),
    "an error of a megabyte": ("ValueError", _reward("def reward(**_):\n    raise ValueError('x' * 10**6)\n")),
    "an error that cannot be told": (
        "mine:reward",
        _reward(
            "class E(Exception):\n    def __str__(self):\n        raise ValueError\ndef reward(**_):\n    raise E\n"
        ),
    ),
    "nothing": ("NoneType", _returns("None")),
    "a number returned": ("int", _returns("3")),
    "a text": ("reward", _returns("'1' * len(prompts) + 'x'")),
    "too few": ("values", _returns("[1.0]")),
    "too many": ("values", _returns("[1.0] * 99")),
    "infinitely many": ("values", _reward("import itertools\ndef reward(**_):\n    return itertools.repeat(1.0)\n")),
    "a generator that fails": ("reward", _reward("def reward(**_):\n    yield 1.0\n    raise ValueError('late')\n")),
    "a generator that exits": ("reward", _reward("def reward(**_):\n    yield 1.0\n    raise SystemExit(0)\n")),
    "a dictionary": ("reward", _returns("{'a': 1, 'b': 2}")),
    "texts": ("row 0", _returns("['good'] * len(prompts)")),
    "NaN": ("row 0", _returns("[float('nan')] * len(prompts)")),
    "infinity": ("row 0", _returns("[float('inf')] * len(prompts)")),
    "400 digits": ("row 0", _returns("[10 ** 400] * len(prompts)")),
    "a float that fails": (
        "row 0",
        _reward(
            "class X:\n    def __float__(self):\n        raise RuntimeError('no')\ndef reward(prompts, **_):\n"
            "    return [X()] * len(prompts)\n"
        ),
    ),
    "a repr that fails": (
        "row 0",
        _reward(
            "class X:\n    def __repr__(self):\n        raise RuntimeError('no')\ndef reward(prompts, **_):\n"
            "    return [X()] * len(prompts)\n"
        ),
    ),
    "a megabyte each": ("row 0", _returns("['x' * 10**6] * len(prompts)")),
    "wrong arguments": ("mine:reward", _reward("def reward(texts):\n    return []\n")),
    "a coroutine": ("reward", _reward("async def reward(**_):\n    return []\n")),
}

CASES = [
    *(
        Case(f"sample: --{name} {text if len(text) < 30 else 'of many digits'}", f"--{name}", _words(f"--{name}", text))
        for name, texts in _NUMBERS.items()
        for text in texts
        if name not in ("dtype", "device")
    ),
    *(
        Case(f"sample: --{name} {text}", name, _words(f"--{name}", text))
        for name in ("dtype", "device")
        for text in _NUMBERS[name]
    ),
    *(Case(f"prompts: {name}", said, make) for name, (said, make) in _PROMPTS.items()),
    *(Case(f"reward: {name}", said, make) for name, (said, make) in _REWARDS.items()),
]
