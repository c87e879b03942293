"""Folders of results, as funcprobe.load reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.room import Case, Room


def _load(room: Room) -> object:
    import funcprobe

    return funcprobe.load(room.folder / "results")


def _written(text: str | bytes) -> Callable[[Room], None]:
    return lambda room: room.write("results/result.json", text) and None


def _plain(**changes: Any) -> Callable[[Room], None]:
    plain = {"schema_version": 3, "kind": "probe", "arrays": None, **changes}
    return _written(json.dumps({k: v for k, v in plain.items() if v is not ...}))


def _folder(room: Room) -> None:
    room.path("results/result.json/x")


def _link(room: Room) -> None:
    room.path("results/x")
    (room.folder / "results" / "result.json").symlink_to("/dev/zero")


_SPOILED: dict[str, tuple[str, Callable[[Room], None]]] = {
    "no folder": ("results", lambda room: None),
    "an empty folder": ("result.json", lambda room: room.path("results/x") and None),
    "a folder as file": ("result.json", _folder),
    "an endless device": ("result.json", _link),
    "empty": ("result.json", _written("")),
    "a word": ("result.json", _written("hello")),
    "a list": ("result.json", _written("[]")),
    "nested deeply": ("result.json", _written("[" * 100_000)),
    "binary": ("result.json", _written(bytes(range(256)))),
    "UTF-16": ("result.json", _written('{"a": 1}'.encode("utf-16"))),
    "a version of 5,000 digits": ("result.json", _written('{"schema_version": ' + "9" * 5000 + "}")),
    "a version of another kind": ("schema version", _plain(schema_version="3")),
    "a version of 300 digits": ("schema version", _plain(schema_version=10**300)),
    "a version with an escape": ("‹U+001B›", _plain(schema_version="\x1b[31m\u202e")),
    "a kind that is none": ("kind", _plain(kind="tomorrow")),
    "a kind that is a list": ("kind", _plain(kind=["probe"])),
    "a kind of a megabyte": ("kind", _plain(kind="x" * 1_000_000)),
    "nothing else": ("results holds no whole probe", _plain()),
    "arrays that are not there": ("result.safetensors", _plain(arrays="0" * 64)),
    "arrays that are a number": ("results", _plain(arrays=3)),
    "arrays that are a list": ("results", _plain(arrays=["x"])),
    "an outcome that is a number": ("results", _plain(outcome=3)),
    "a field too many": ("results", _plain(evil="\x1b[31m")),
    "20,000 fields too many": ("results", _plain(**{f"evil{i}": 1 for i in range(20_000)})),
}


CASES = [
    Case(f"result: {name}", said, lambda room, make=make: (make(room), [])[1], _load)  # type: ignore[misc]
    for name, (said, make) in _SPOILED.items()
]
