"""Configurations: the text of the file, and the values in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.hostile.room import Case, Room

HUGE = "9" * 5000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)


def _text(text: str | bytes) -> Callable[[Room], None]:
    return lambda room: room.write("config.yaml", text) and None


def _added(text: str) -> Callable[[Room], None]:
    return lambda room: room.raw(text)


def _key(name: str, value: Any) -> Callable[[Room], None]:
    return lambda room: room.config(**{name: value})


def _fifo(room: Room) -> None:
    (room.folder / "config.yaml").unlink()
    os.mkfifo(room.folder / "config.yaml")


def _gone(room: Room) -> None:
    (room.folder / "config.yaml").unlink()


def _unreadable(room: Room) -> None:
    (room.folder / "config.yaml").unlink()
    (room.folder / "config.yaml").symlink_to("config.yaml")


_FILES: dict[str, tuple[str, Callable[[Room], None]]] = {
    "no file": ("config.yaml: there is no such file", _gone),
    "empty": ("config.yaml: the configuration is empty", _text("")),
    "white space": ("config.yaml: the configuration is empty", _text("\n\n  \n")),
    "a list": ("config.yaml: found list", _text("- 1\n- 2\n")),
    "a word": ("config.yaml: found str", _text("hello\n")),
    "UTF-16": ("config.yaml", _text("checkpoint: c\n".encode("utf-16")[:-1])),
    "Latin-1": ("config.yaml", _text("checkpoint: caf\xe9\n".encode("latin-1"))),
    "NUL": ("config.yaml", _text("checkpoint: \0\n")),
    "binary": ("config.yaml", _text(bytes(range(256)) * 20)),
    "a pickle's beginning": ("config.yaml", _text(b"\x80\x04\x95\x00\x00")),
    "a tab": ("config.yaml", _text("\tcheckpoint: c\n")),
    "an open quote": ("config.yaml: line", _text('checkpoint: "c\n')),
    "an open bracket": ("config.yaml: line", _text("also: [reward\n")),
    "100,000 brackets": ("config.yaml", _added("also: " + "[" * 100_000)),
    "100,000 nested maps": ("config.yaml", _added("also: " + "{a: " * 50_000)),
    "deep indentation": ("config.yaml", _text("".join(f"{' ' * i}a:\n" for i in range(3000)))),
    "an alias bomb": ("config.yaml", _text(BOMB)),
    "an alias of itself": ("config.yaml", _text("a: &a [*a]\n")),
    "an alias of nothing": ("config.yaml", _text("a: *nothing\n")),
    "a merge key": ("config.yaml", _added("<<: {lr: 1}")),
    "a Python object": ("config.yaml", _added("lr: !!python/object/apply:os.system ['touch ../executed']")),
    "a Python name": ("config.yaml", _added("lr: !!python/name:os.system")),
    "a tag of nothing": ("config.yaml", _added("lr: !nothing 1")),
    "an integer's tag on a word": ("config.yaml", _added("lr: !!int hello")),
    "a float's tag on a word": ("config.yaml", _added("lr: !!float hello")),
    "a boolean's tag on a word": ("config.yaml", _added("force: !!bool hello")),
    "an integer's tag on a list": ("config.yaml", _added("lr: !!int [1]")),
    "a timestamp's tag on a word": ("config.yaml", _added("lr: !!timestamp hello")),
    "a binary tag": ("config.yaml", _added("lr: !!binary hello")),
    "a set": ("config.yaml", _added("also: !!set {reward, kl}")),
    "a list as a key": ("config.yaml: line", _added("? [1, 2]\n: 3")),
    "a map as a key": ("config.yaml: line", _added("? {a: b}\n: 3")),
    "a key twice": ("config.yaml: line", _added("lr: 1\nlr: 2")),
    "an unknown key": ("learning_rate_", _added("learning_rate_: 1")),
    "20,000 unknown keys": ("config.yaml", _added("".join(f"key{i}: 1\n" for i in range(20_000)))),
    "a key of 100 kB": ("config.yaml", _added(f"? {'k' * 100_000}\n: 1")),
    "a key with an escape": ("config.yaml", _added('"\\e[31mred": 1')),
    "a key with a bidi mark": ("config.yaml", _added('"\\u202Egnihton": 1')),
    "a value of a megabyte": ("lr", _added(f"lr: {'v' * 1_000_000}")),
    "a file of 20 MB": ("config.yaml", _text(b"# " + b"x" * 20_000_000 + b"\n")),
    "a FIFO that nobody writes": ("config.yaml", _fifo),
    "a link to itself": ("config.yaml", _unreadable),
    "two documents": ("config.yaml", _text("a: 1\n---\nb: 2\n")),
    "a surrogate": ("config.yaml", _text(b"checkpoint: \xed\xa0\x80\n")),
    "an escaped surrogate": (
        "‹U+D800›",
        _text('checkpoint: "\\uD800"\nevaluation: evaluation.jsonl\nbatch: batch.jsonl\n'),
    ),
}

#: Files of rollouts that are looked for before they are refused.
_LOOKED_FOR = ("nowhere.parquet", "nowhere.jsonl", "config.yaml", "checkpoint", "/dev/zero")

_VALUES: tuple[tuple[str, str, Any], ...] = (
    ("lr", "text", "abc"),
    ("lr", "a list", [1]),
    ("lr", "a map", {"a": 1}),
    ("lr", "negative", -1e-9),
    ("lr", "truth", True),
    ("max_grad_norm", "zero", 0),
    ("max_grad_norm", "text", "1"),
    ("microbatch", "zero", 0),
    ("microbatch", "a fraction", 1.5),
    ("microbatch", "beyond 64 bits", 2**64),
    ("microbatch_tokens", "zero", 0),
    ("microbatch_tokens", "beyond 64 bits", 2**64),
    ("top_k", "negative", -1),
    ("top_k", "beyond 64 bits", 2**64),
    ("level", "beyond one", 1.5),
    ("tolerance", "zero", 0),
    ("ess_threshold", "beyond one", 2),
    ("order", "three", 3),
    ("mode", "a word", "sideways"),
    ("method", "a word", "magic"),
    ("bars", "a word", "chocolate"),
    ("seed", "negative", -1),
    ("seed", "beyond 64 bits", 2**64),
    ("force", "a word", "maybe"),
    ("also", "a number", 3),
    ("also", "a map", {"reward": 1}),
    ("also", "nested", [["reward"]]),
    ("also", "numbers", [1, 2]),
    ("checkpoint", "a number", 3),
    ("checkpoint", "empty", ""),
    ("checkpoint", "a list", ["checkpoint"]),
    ("checkpoint", "NUL", "check\0point"),
    ("checkpoint", "an unknown user's", "~no-such-user/checkpoint"),
    ("checkpoint", "nowhere", "nowhere"),
    ("checkpoint", "a file", "config.yaml"),
    ("checkpoint", "100 kB", "x" * 100_000),
    ("checkpoint", "a device", "/dev/zero"),
    ("evaluation", "nowhere", "nowhere.parquet"),
    ("evaluation", "a folder", "checkpoint"),
    ("evaluation", "NUL", "eval\0uation.jsonl"),
    ("evaluation", "an unknown user's", "~no-such-user/e.jsonl"),
    ("evaluation", "another suffix", "config.yaml"),
    ("evaluation", "an endless device", "/dev/zero"),
    ("batch", "nowhere", "nowhere.jsonl"),
    ("batch", "NUL", "b\0.jsonl"),
    ("output", "NUL", "res\0ults"),
    ("output", "an unknown user's", "~no-such-user/results"),
    ("output", "empty", ""),
    ("output", "100 kB", "x" * 100_000),
    ("base_model", "a number", 3),
    ("base_model", "empty", ""),
    ("base_model", "beside a full model", "gpt2"),
    ("objective", "a number", 3),
    ("objective", "a list", ["grpo"]),
    ("objective", "a text", "grpo"),
    ("objective", "a name that is a list", {"name": ["grpo"]}),
    ("objective", "an escape", {"name": "\x1b[31m"}),
    ("objective", "epsilon as text", {"epsilon": "abc"}),
    ("objective", "an option that is none", {"clip": 1}),
    ("observable", "a text", "entropy"),
    ("observable", "an integrand that is none", {"integrand": "x"}),
    ("trackers", "a number", 3),
    ("optimizer", "a word", "adam"),
    ("optimizer", "none", "none"),
    ("device", "a number", 3),
    ("dtype", "a number", 3),
    ("dtype", "an escape", "\x1b[31mfloat32"),
    ("storage", "a number", 3),
)

_NUMBERS = {
    "NaN": ".nan",
    "infinity": ".inf",
    "1e400": "1e400",
    "5,000 digits": HUGE,
    "a superscript": "²",
    "hexadecimal": "0x10",
}

_NUMBERED = ("lr", "max_grad_norm", "microbatch", "level", "ess_threshold", "seed")


def _named(key: str, value: Any) -> str:
    """Return the word that must be said: the file where one is looked for, the key elsewhere."""
    return value if key in ("evaluation", "batch") and value in _LOOKED_FOR else key


CASES = [
    *(Case(f"configuration: {name}", said, make) for name, (said, make) in _FILES.items()),
    *(Case(f"configuration: {key} is {what}", _named(key, value), _key(key, value)) for key, what, value in _VALUES),
    *(
        Case(f"configuration: {key} is {what}", key, _added(f"{key}: {text}\nbars: bootstrap"))
        for key in _NUMBERED
        for what, text in _NUMBERS.items()
    ),
    Case("configuration: no checkpoint", "checkpoint: missing", _key("checkpoint", None)),
    Case("configuration: no evaluation", "evaluation: missing", _key("evaluation", None)),
]
