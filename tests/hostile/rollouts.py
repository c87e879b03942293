"""Files of rollouts: JSONL and parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from tests.hostile.room import ROW, Case, Room

HUGE = "9" * 5000
LINE = json.dumps(ROW)
NAN = float("nan")


def _text(text: str | bytes) -> Callable[[Room], None]:
    return lambda room: room.write("evaluation.jsonl", text) and None


def _second(**changes: Any) -> Callable[[Room], None]:
    """Return a file whose second row is another one."""
    return lambda room: room.rows({}, changes)


def _all(**changes: Any) -> Callable[[Room], None]:
    return lambda room: room.rows(changes, changes)


def _raw(key: str, text: str) -> Callable[[Room], None]:
    """Return a file in which the text of one value is another one."""
    row = {k: v for k, v in ROW.items() if k != key}
    return _text(f"{LINE}\n{json.dumps(row)[:-1]}, {json.dumps(key)}: {text}}}\n")


_FILES: dict[str, tuple[str, Callable[[Room], None]]] = {
    "empty": ("the file is empty", _text("")),
    "white space": ("0 rows", _text("\n\n \n")),
    "a header alone": ("0 rows", _text('{"schema_version": 1}\n')),
    "another schema": ("schema version", _text('{"schema_version": 99}\n' + LINE)),
    "a schema that is a list": ("schema version", _text('{"schema_version": [1]}\n' + LINE)),
    "a schema of a megabyte": ("schema version", _text(json.dumps({"schema_version": "x" * 1_000_000}) + "\n" + LINE)),
    "an array": ("line 1", _text(f"[{LINE}]\n")),
    "a document": ("line 1", _text(json.dumps(ROW, indent=1))),
    "a word": ("line 1", _text("hello\n")),
    "a number": ("line 1", _text("1\n")),
    "null": ("line 1", _text("null\n")),
    "a cut line": ("line 2", _text(f"{LINE}\n{LINE[:-9]}")),
    "nested deeply": ("line 2", _raw("reward", "[" * 100_000)),
    "objects nested deeply": ("line 2", _raw("reward", '{"a":' * 100_000)),
    "UTF-16": ("UTF-16", _text(LINE.encode("utf-16"))),
    "Latin-1": ("not UTF-8", _text(b'{"prompt_ids": "caf\xe9"}\n')),
    "binary": ("evaluation.jsonl", _text(bytes(range(256)) * 9)),
    "NUL": ("line 1", _text(b"\0\n")),
    "a key twice": ("line 1", _text('{"reward": 1, "reward": 2}\n')),
    "a key twice, 100 kB": ("line 1", _text('{"%s": 1, "%s": 2}\n' % (("k" * 100_000,) * 2))),
    "a pickle's beginning": ("evaluation.jsonl", _text(b"\x80\x04\x95")),
    "parquet under this name": ("evaluation.jsonl", _text(b"PAR1" + bytes(100) + b"PAR1")),
}

_ROWS: dict[str, tuple[str, Callable[[Room], None]]] = {
    "no prompt": ("'prompt_ids'", _all(prompt_ids=...)),
    "no completion": ("'completion_ids'", _all(completion_ids=...)),
    "no temperature": ("'temperature'", _all(temperature=...)),
    "a null temperature": ("line 2", _second(temperature=None)),
    "a lost temperature": ("line 2", _second(temperature=...)),
    "temperature 0": ("temperature", _second(temperature=0)),
    "a negative temperature": ("temperature", _second(temperature=-1)),
    "temperature NaN": ("temperature", _second(temperature=NAN)),
    "temperature infinity": ("temperature", _second(temperature=float("inf"))),
    "temperature 1e400": ("temperature", _raw("temperature", "1e400")),
    "a text as temperature": ("line 2", _second(temperature="1")),
    "truth as temperature": ("line 2", _second(temperature=True)),
    "a list as temperature": ("line 2", _second(temperature=[1])),
    "an object as temperature": ("line 2", _second(temperature={"a": 1})),
    "5,000 digits as temperature": ("line 2", _raw("temperature", HUGE)),
    "400 digits as temperature": ("temperature", _raw("temperature", "9" * 400)),
    "reward NaN": ("reward", _second(reward=NAN)),
    "reward 400 digits": ("reward", _raw("reward", "9" * 400)),
    "a text as reward": ("line 2", _second(reward="good")),
    "a list as reward": ("line 2", _second(reward=[1.0])),
    "no reward": ("reward", lambda room: (room.rows({"reward": ...}, name="batch.jsonl"), None)[1]),
    "one reward missing": ("line 2", _second(reward=...)),
    "an empty prompt": ("Row 1", _second(prompt_ids=[])),
    "a prompt as text": ("line 2", _second(prompt_ids="31=")),
    "a prompt of texts": ("row 1", _second(prompt_ids=["3", "1"])),
    "a prompt of lists": ("row 1", _second(prompt_ids=[[3], [1]])),
    "a prompt of fractions": ("row 1", _second(prompt_ids=[3.5, 1.0])),
    "a prompt of truths": ("row 1", _second(prompt_ids=[True, False])),
    "a null in a prompt": ("row 1", _second(prompt_ids=[3, None, 1])),
    "an object in a prompt": ("row 1", _second(prompt_ids=[{"a": 1}])),
    "a negative token": ("Row 1", _second(prompt_ids=[-1, 3])),
    "a token beyond the vocabulary": ("Row 1", _second(prompt_ids=[14, 3])),
    "a token of 2**31": ("Row 1", _second(prompt_ids=[2**31, 3])),
    "a token of 2**63": ("row 1", _second(prompt_ids=[2**63, 3])),
    "a token of 2**70": ("row 1", _second(prompt_ids=[2**70, 3])),
    "a token of 5,000 digits": ("line 2", _raw("prompt_ids", f"[{HUGE}]")),
    "a token NaN": ("row 1", _second(completion_ids=[3, NAN])),
    "a token 1e300": ("row 1", _second(completion_ids=[3, 1e300])),
    "only empty completions": ("completion", _all(completion_ids=[])),
    "a mask too long": ("completion mask", _all(completion_mask=[1] * 9)),
    "a mask too short": ("completion mask", _all(completion_mask=[1])),
    "a mask of twos": ("completion_mask", _all(completion_mask=[2, 2, 2])),
    "a mask of texts": ("completion_mask", _all(completion_mask=["a", "b", "c"])),
    "a mask of nothing": ("completion", _all(completion_mask=[0, 0, 0])),
    "a null in a mask": ("completion_mask", _all(completion_mask=[1, None, 1])),
    "log-probabilities too short": ("sampling_logps", _all(sampling_logps=[-1.0])),
    "log-probabilities above 0": ("sampling_logps", _all(sampling_logps=[0.5, 0.5, 0.5])),
    "log-probabilities NaN": ("sampling_logps", _all(sampling_logps=[NAN] * 3)),
    "log-probabilities infinite": ("sampling_logps", _all(sampling_logps=[-float("inf")] * 3)),
    "log-probabilities of texts": ("sampling_logps", _all(sampling_logps=["a"] * 3)),
    "log-probabilities of 400 digits": ("line 2", _raw("sampling_logps", f"[-{'9' * 400}, 0, 0]")),
    "nested log-probabilities": ("sampling_logps", _all(sampling_logps=[[-1.0], [-1.0], [-1.0]])),
    "a negative weight": ("weight", _second(weight=-1)),
    "all weights 0": ("weights", _all(weight=0)),
    "a weight NaN": ("weight", _second(weight=NAN)),
    "top_p of 2": ("top_p", _all(top_p=2)),
    "top_k of -2": ("top_k", _all(top_k=-2)),
    "top_k of a half": ("top_k", _all(top_k=0.5)),
    "top_k of 2**70": ("top_k", _all(top_k=2**70)),
    "step of 1e300": ("step", _all(step=1e300)),
    "a group that is a fraction": ("group_id", _all(group_id=0.5)),
    "a group that is a list": ("group_id", _all(group_id=[1])),
    "a group that is an object": ("group_id", _all(group_id={"a": 1})),
    "a row longer than the model": ("32", _second(prompt_ids=[3] * 40)),
    "a row of 2 million tokens": ("Row 1", _second(prompt_ids=[3] * 2_000_000)),
    "20,000 rows, one of 2 million tokens": (
        "Row 0",
        lambda r: r.rows({"prompt_ids": [3] * 2_000_000}, *[{}] * 20_000),
    ),
}


def _places() -> dict[str, tuple[str, Callable[[Room], None]]]:
    def gone(room: Room) -> None:
        (room.folder / "evaluation.jsonl").unlink()

    def fifo(room: Room) -> None:
        gone(room)
        os.mkfifo(room.folder / "evaluation.jsonl")

    def linked(target: str) -> Callable[[Room], None]:
        def make(room: Room) -> None:
            gone(room)
            (room.folder / "evaluation.jsonl").symlink_to(target)

        return make

    return {
        "gone": ("there is no such file", gone),
        "a FIFO": ("evaluation.jsonl", fifo),
        "a link to itself": ("evaluation.jsonl", linked("evaluation.jsonl")),
        "a link to /dev/zero": ("evaluation.jsonl", linked("/dev/zero")),
        "a link to a folder": ("this is a folder", linked("checkpoint")),
    }


def _parquet(said: str, **columns: Any) -> tuple[str, Callable[[Room], None]]:
    def make(room: Room) -> None:
        import pyarrow as pa

        whole = {k: [v, v] for k, v in ROW.items()}
        found = {k: v(pa) if callable(v) else v for k, v in {**whole, **columns}.items()}
        room.parquet({k: v for k, v in found.items() if v is not None})

    return said, make


def _file(content: bytes) -> Callable[[Room], None]:
    def make(room: Room) -> None:
        room.write("evaluation.parquet", content)
        room.config(evaluation="evaluation.parquet")

    return make


def _twice(room: Room) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array([v, v]) for v in ROW.values()]
    table = pa.Table.from_arrays([*arrays, pa.array([1.0, 2.0])], [*ROW, "reward"])
    pq.write_table(table, room.folder / "evaluation.parquet")
    room.config(evaluation="evaluation.parquet")


def _metadata(value: bytes) -> Callable[[Room], None]:
    def make(room: Room) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({k: [v, v] for k, v in ROW.items()})
        pq.write_table(table.replace_schema_metadata({b"schema_version": value}), room.folder / "evaluation.parquet")
        room.config(evaluation="evaluation.parquet")

    return make


def _truncated(room: Room) -> None:
    _parquet("")[1](room)
    content = (room.folder / "evaluation.parquet").read_bytes()
    room.write("evaluation.parquet", content[: len(content) // 2] + content[-8:])


_PARQUET: dict[str, tuple[str, Callable[[Room], None]]] = {
    "empty": ("the file is empty", _file(b"")),
    "a word": ("not a readable parquet file", _file(b"hello")),
    "its ends alone": ("parquet", _file(b"PAR1PAR1")),
    "a footer of 4 GB": ("parquet", _file(b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1")),
    "noise between its ends": ("parquet", _file(b"PAR1" + bytes(range(256)) * 9 + b"\x20\x00\x00\x00PAR1")),
    "cut in the middle": ("evaluation.parquet", _truncated),
    "JSON": ("parquet", _file(b'{"a": 1}\n')),
    "a column twice": ("'reward' stands twice", _twice),
    "metadata that are not UTF-8": ("evaluation.parquet", _metadata(b"\xff\xfe")),
    "another schema": ("schema version", _metadata(b"99")),
    "a schema of a megabyte": ("schema version", _metadata(b"9" * 1_000_000)),
    "no temperature": _parquet("'temperature'", temperature=None),
    "a null temperature": _parquet("Row 1", temperature=[1.0, None]),
    "a text as temperature": _parquet("'temperature'", temperature=["1", "1"]),
    "a list as temperature": _parquet("'temperature'", temperature=[[1.0], [1.0]]),
    "a date as temperature": _parquet("'temperature'", temperature=lambda pa: pa.array([1, 2], pa.date32())),
    "temperature NaN": _parquet("temperature", temperature=[1.0, NAN]),
    "a null prompt": _parquet("Row 1", prompt_ids=[[3], None]),
    "a null in a prompt": _parquet("Row 1", prompt_ids=[[3], [3, None]]),
    "a null in a large list": _parquet(
        "Row 1", prompt_ids=lambda pa: pa.array([[3], [3, None]], pa.large_list(pa.int32()))
    ),
    "a null in a list of fixed size": _parquet(
        "Row 1", prompt_ids=lambda pa: pa.array([[3, 3], [3, None]], pa.list_(pa.int64(), 2))
    ),
    "a null in a mask": _parquet("Row 1", completion_mask=[[1, 1, 1], [1, None, 1]]),
    "a null among log-probabilities": _parquet("Row 1", sampling_logps=[[-1.0] * 3, [-1.0, None, -1.0]]),
    "a prompt of texts": _parquet("'prompt_ids'", prompt_ids=[["a"], ["b"]]),
    "a prompt of fractions": _parquet("'prompt_ids'", prompt_ids=[[3.5], [3.0]]),
    "nested prompts": _parquet("'prompt_ids'", prompt_ids=[[[3]], [[3]]]),
    "prompts as text": _parquet("'prompt_ids'", prompt_ids=["31=", "31="]),
    "prompts as structures": _parquet("'prompt_ids'", prompt_ids=[{"a": 3}, {"a": 3}]),
    "prompts as maps": _parquet(
        "'prompt_ids'", prompt_ids=lambda pa: pa.array([[(1, 2)], [(1, 2)]], pa.map_(pa.int64(), pa.int64()))
    ),
    "tokens beyond 63 bits": _parquet(
        "prompt_ids", prompt_ids=lambda pa: pa.array([[2**63], [3]], pa.list_(pa.uint64()))
    ),
    "a negative token": _parquet("Row 1", prompt_ids=[[3], [-3]]),
    "a token beyond the vocabulary": _parquet("Row 1", prompt_ids=[[3], [14]]),
    "decimals as temperature below 0": _parquet(
        "temperature", temperature=lambda pa: pa.array([1, -1], pa.decimal128(5, 2))
    ),
    "decimals as tokens": _parquet(
        "'prompt_ids'", prompt_ids=lambda pa: pa.array([[1], [1]], pa.list_(pa.decimal128(5, 2)))
    ),
    "all columns null": _parquet(
        "'prompt_ids'", prompt_ids=lambda pa: pa.nulls(2), completion_ids=lambda pa: pa.nulls(2)
    ),
    "no rows": _parquet(
        "0 rows",
        **{k: lambda pa, k=k: pa.array([], pa.list_(pa.int64()) if "ids" in k else pa.float64()) for k in ROW},
    ),
    "a group that is a fraction": _parquet("group_id", group_id=[0.5, 0.5]),
    "a group that is a list": _parquet("group_id", group_id=[[1], [1]]),
    "a reward that is text with an escape": _parquet("'reward'", reward=["\x1b[31m", "\u202e"]),
    "a reward of a megabyte": _parquet("'reward'", reward=["x" * 1_000_000, "y"]),
}

CASES = [
    *(Case(f"rollouts: {name}", said, make) for name, (said, make) in (_FILES | _ROWS | _places()).items()),
    *(Case(f"parquet: {name}", said, make) for name, (said, make) in _PARQUET.items()),
]
