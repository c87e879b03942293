"""Dumps of other frameworks as U: lines that are not what the framework writes, and pickles."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

from tests.cases.dumps import BY_NAME
from tests.hostile.room import Case, Room

NAN = float("nan")
HUGE = 10**18


def _lines(name: str, *changes: dict[str, Any], file: str = "batch.jsonl") -> Callable[[Room], None]:
    """Return a dump whose first lines have other values; ... leaves a key out."""

    def make(room: Room) -> None:
        lines = [dict(line) for line in BY_NAME[name](3).lines]
        for line, change in zip(lines, changes, strict=False):
            line |= change
        plain = ({k: v for k, v in line.items() if v is not ...} for line in lines)
        room.write(file, "".join(json.dumps(line) + "\n" for line in plain))
        room.config(batch=file, temperature=1.0)

    return make


def _raw(text: str) -> Callable[[Room], None]:
    def make(room: Room) -> None:
        room.write("batch.jsonl", text)
        room.config(temperature=1.0)

    return make


def _turns(*turns: Any) -> dict[str, Any]:
    return {"turns": list(turns)}


def _turn(prompt: Any = (3,), completion: Any = (4,), **more: Any) -> dict[str, Any]:
    made = {"prompt_token_ids": prompt, "completion_token_ids": completion, "max_policy_version": 3}
    return made | more


def _unsaid(room: Room) -> None:
    _lines("open-instruct")(room)
    room.config(batch="batch.jsonl")


def _without_tokenizer(room: Room) -> None:
    _lines("verl")(room)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (room.folder / "checkpoint" / name).unlink()


def _texts(**change: Any) -> Callable[[Room], None]:
    """Return texts in the demo's vocabulary, the first of which is another one."""
    plain = {"input": "31=", "output": "4"}
    return _lines("verl", plain | change, plain, plain, plain)


def _pt(content: Callable[[Room], bytes], suffix: str = "pt") -> Callable[[Room], None]:
    def make(room: Room) -> None:
        room.write(f"batch.{suffix}", content(room))
        room.config(batch=f"batch.{suffix}", temperature=1.0)

    return make


def _saved(value: Any) -> Callable[[Room], bytes]:
    def content(room: Room) -> bytes:
        import torch

        stream = io.BytesIO()
        torch.save(value(torch) if callable(value) else value, stream)
        return stream.getvalue()

    return content


def _sample(**change: Any) -> dict[str, Any]:
    sample = {"tokens": [3, 4, 5], "response_length": 2, "reward": 1.0, "loss_mask": [1, 1], "group_index": 0}
    return {"rollout_id": 3, "samples": [sample | change, sample]}


class _Zipped:
    """A pickle of the room's payload inside what `torch.save` writes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def _ranks(complete: bool) -> Callable[[Room], None]:
    def make(room: Room) -> None:
        _lines("prime-rl", file="step_3/rank_0.jsonl")(room)
        if complete:
            room.write("step_3/STABLE", "")
            room.write("step_3/rank_1.jsonl", "{")
        room.config(batch="step_3", temperature=1.0)

    return make


def _read(room: Room) -> None:
    """Read U as the command does, without a model."""
    from funcprobe.cli.demo_task import build_tokenizer
    from funcprobe.data.files import read_rollouts

    names = ("batch.pt", "batch.pkl", "batch.parquet", "step_3", "batch.jsonl")
    path = next(room.folder / name for name in names if (room.folder / name).exists())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_rollouts(path, temperature=1.0, tokenizer=build_tokenizer(), vocab_size=14, max_length=32)


_RUNS: dict[str, tuple[str, Callable[[Room], None]]] = {
    "no temperature": ("temperature", _unsaid),
    "a temperature of text": (
        "temperature: found 'warm'",
        lambda room: (_unsaid(room), room.config(temperature="warm"), None)[2],
    ),
    "text without a tokenizer": ("the checkpoint has no tokenizer", _without_tokenizer),
    "another step than is asked for": (
        "no row is of step 9",
        lambda room: (_lines("open-instruct")(room), room.config(temperature=1.0, step=9), None)[2],
    ),
    "many steps, and not the next": (
        "no row is of step 1; the file has 2 steps from 3 to 1000",
        _lines("open-instruct", {"step": 1000}),
    ),
    "a mask too short": ("line 1", _lines("nemo-rl", {"token_loss_mask": [[1]]})),
    "a pickle": ("nothing else is unpickled", _pt(lambda room: room.pickle())),
    "a folder that is not complete": ("STABLE", _ranks(False)),
}

_ROWS: dict[str, tuple[str, Callable[[Room], None]]] = {
    "open-instruct: a prompt as text": ("'prompt_ids'", _lines("open-instruct", {"prompt_tokens": "31="})),
    "open-instruct: a prompt of texts": ("'prompt_ids", _lines("open-instruct", {"prompt_tokens": ["3"]})),
    "open-instruct: an empty prompt": ("Row 0", _lines("open-instruct", {"prompt_tokens": []})),
    "open-instruct: a token beyond the vocabulary": ("Row 0", _lines("open-instruct", {"prompt_tokens": [14]})),
    "open-instruct: a row longer than the model": ("32", _lines("open-instruct", {"response_tokens": [3] * 40})),
    "open-instruct: no completion": ("'completion_ids'", _lines("open-instruct", {"response_tokens": None})),
    "open-instruct: log-probabilities above 0": (
        "sampling_logps",
        _lines("open-instruct", {"logprobs": [1.0] * 3}),
    ),
    "open-instruct: log-probabilities too short": ("sampling_logps", _lines("open-instruct", {"logprobs": [-1.0]})),
    "open-instruct: a step of text": ("'step'", _lines("open-instruct", {"step": "\x1b[31m"})),
    "open-instruct: a step of 2**70": ("step", _lines("open-instruct", {"step": 2**70})),
    "open-instruct: an advantage NaN": ("advantages is nan", _lines("open-instruct", {"advantage": NAN})),
    "open-instruct: a group that is a list": ("'group_id'", _lines("open-instruct", {"prompt_idx": [0]})),
    "open-instruct: a cut line": ("line 1", _raw('{"prompt_tokens": [3], "response_tokens"')),
    "nemo-rl: ids that are no list": ("line 1", _lines("nemo-rl", {"token_ids": 3})),
    "nemo-rl: no mask": ("'marks' is NoneType", _lines("nemo-rl", {}, {"token_loss_mask": None})),
    "nemo-rl: a mask too short": ("line 1", _lines("nemo-rl", {"token_loss_mask": [[1]]})),
    "nemo-rl: a length beyond the ids": ("line 1: the length is", _lines("nemo-rl", {"input_lengths": [HUGE]})),
    "nemo-rl: a length below 0": ("line 1: the length is", _lines("nemo-rl", {"input_lengths": [-1]})),
    "nemo-rl: advantages too short": ("line 1", _lines("nemo-rl", {"advantages": [[1.0]]})),
    "nemo-rl: advantages of texts": ("advantage", _lines("nemo-rl", {"advantages": [["a"] * 6]})),
    "nemo-rl: advantages nested": ("line 1", _lines("nemo-rl", {"advantages": [[[1.0]]]})),
    "nemo-rl: advantages infinite": ("advantages is inf", _lines("nemo-rl", {"advantages": [[float("inf")] * 6]})),
    "prime-rl: positions too short": ("line 1", _lines("prime-rl", {"position_ids": [0]})),
    "prime-rl: positions of texts": ("line 1: a position", _lines("prime-rl", {"position_ids": ["a"] * 9})),
    "prime-rl: positions NaN": ("line 1: a position", _lines("prime-rl", {"position_ids": [NAN] * 9})),
    "prime-rl: a mask of lists": ("completion_mask", _lines("prime-rl", {"loss_mask": [[1]] * 9})),
    "prime-rl: a mask of everything": ("Row 0", _lines("prime-rl", {"loss_mask": [True] * 9})),
    "prime-rl: nothing in the loss": ("0 rows", _lines("prime-rl", *[{"loss_mask": [False] * n} for n in (9, 5)])),
    "prime-rl: a folder that is not complete": ("STABLE", _ranks(False)),
    "prime-rl: a rank cut short": ("not JSON", _ranks(True)),
    "torchtitan: no ids": ("log_tensors=True", _lines("torchtitan", _turns({"turn_id": 0}))),
    "torchtitan: a turn that is null": ("a turn has no", _lines("torchtitan", _turns(None))),
    "torchtitan: turns that are text": ("'turns' is str", _lines("torchtitan", {"turns": "[]"})),
    "torchtitan: ids that are text": ("a turn has no", _lines("torchtitan", _turns(_turn(prompt="31=")))),
    "torchtitan: ids of objects": ("'prompt_ids", _lines("torchtitan", _turns(_turn(prompt=[{"a": 1}])))),
    "torchtitan: log-probabilities of text": (
        "'completion_logprobs' is str",
        _lines("torchtitan", _turns(_turn(completion_logprobs="-1"))),
    ),
    "torchtitan: 20,000 turns": (
        "'sampling_logps'",
        _lines("torchtitan", _turns(*[_turn([3] * (k + 1), [3]) for k in range(200)], *[_turn()] * 20_000)),
    ),
    "torchtitan: validation alone": ("0 rows", _lines("torchtitan", *[{"is_validation": True}] * 5)),
    "verl: a number as text": ("line 1: 'prompt' is int", _texts(input=3)),
    "verl: no output": ("line 1: 'completion' is NoneType", _texts(output=None)),
    "verl: words that are not in the vocabulary": ("the tokenizer, or its chat template,", _texts(output="w0")),
    "verl: an empty input": ("Row 0", _texts(input="")),
    "verl: half a character": ("half a character", _texts(output="\ud800")),
    "verl: a score of text": ("'reward'", _texts(score="good")),
    "verl: a score NaN": ("rewards is nan", _texts(score=NAN)),
    "verl: messages without a template": ("chat template", _texts(input=[{"role": "user", "content": "31="}])),
    "verl: messages of numbers": ("'prompt' is list", _texts(input=[3])),
    "verl: a text longer than the model": ("32", _texts(output="3" * 100)),
    "ms-swift: columns of other lengths": ("different lengths", _lines("ms-swift", {"prompt": ["3"]})),
    "ms-swift: a column that is none": ("'advantage' is float", _lines("ms-swift", {"advantages": 1.0})),
    "ms-swift: an empty table": (
        "0 rows",
        _lines("ms-swift", {k: [] for k in ("step", "prompt", "completion", "Accuracy", "advantages")}),
    ),
    "slime: a pickle": ("nothing else is unpickled", _pt(lambda room: room.pickle())),
    "slime: a pickle in a zip": ("nothing else is unpickled", _pt(lambda r: _saved(_Zipped(str(r.canary)))(r))),
    "SkyRL: a pickle": ("SkyRL", _pt(lambda room: room.pickle(), "pkl")),
    "SkyRL: a pickle of plain values": ("SkyRL", _pt(lambda room: pickle.dumps(_sample()), "pkl")),
    "slime: empty": ("the file is empty", _pt(lambda room: b"")),
    "slime: noise": ("nothing else is unpickled", _pt(lambda room: bytes(range(256)))),
    "slime: a list": ("'samples'", _pt(_saved([1]))),
    "slime: samples that are numbers": ("sample 0 is int", _pt(_saved({"samples": [1]}))),
    "slime: no ids": ("has no 'tokens'", _pt(_saved({"samples": [{"response_length": 1}]}))),
    "slime: a completion longer than the row": ("fewer", _pt(_saved(_sample(response_length=4)))),
    "slime: ids of a tensor that claims a terabyte": (
        "'tokens' is Tensor",
        _pt(_saved(lambda torch: _sample(tokens=torch.ones(1, dtype=torch.int64).expand(2**40)))),
    ),
    "slime: ids of a sparse tensor": (
        "'tokens' is Tensor",
        _pt(_saved(lambda torch: _sample(tokens=torch.ones(3).to_sparse()))),
    ),
    "slime: a mask too long": ("completion mask", _pt(_saved(_sample(loss_mask=[1] * 9)))),
}


def _trl(said: str, **columns: Any) -> tuple[str, Callable[[Room], None]]:
    """Return a table like TRL's completions with other columns; None leaves one out."""

    def make(room: Room) -> None:
        whole = {"step": [3, 3], "prompt": ["31=", "31="], "completion": ["4", "5"], "advantage": [1.0, -1.0]}
        room.parquet({k: v for k, v in (whole | columns).items() if v is not None}, "batch.parquet")
        room.config(batch="batch.parquet", temperature=1.0)

    return said, make


_TABLES: dict[str, tuple[str, Callable[[Room], None]]] = {
    "no advantages": _trl("'prompt_ids'", advantage=None),
    "prompts of numbers": _trl("'prompt' is int", prompt=[3, 4]),
    "a null completion": _trl("'completion' is NoneType", completion=["4", None]),
    "a completion of several messages": _trl(
        "one message of text", completion=[[{"role": "assistant", "content": "4"}] * 2, []]
    ),
    "an advantage that is text": _trl("'advantage'", advantage=["a", "b"]),
    "an advantage NaN": _trl("advantages is nan", advantage=[NAN, 1.0]),
    "a step that is text": _trl("'step'", step=["soon", "now"]),
    "no rows": _trl("0 rows", step=[], prompt=[], completion=[], advantage=[]),
}

CASES = [
    *(Case(f"run on a dump: {name}", said, make) for name, (said, make) in _RUNS.items()),
    *(Case(f"dump: {name}", said, make, _read) for name, (said, make) in _ROWS.items()),
    *(Case(f"dump, trl: {name}", said, make, _read) for name, (said, make) in _TABLES.items()),
]
