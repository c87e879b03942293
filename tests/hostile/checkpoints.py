"""Checkpoint folders: configuration, weights, index, tokenizer."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from typing import Any

from tests.hostile.room import Case, Room

CONFIG = "checkpoint/config.json"
WEIGHTS = "checkpoint/model.safetensors"
INDEX = "checkpoint/model.safetensors.index.json"


def _config(**changes: Any) -> Callable[[Room], None]:
    return lambda room: room.edit(CONFIG, **changes)


def _file(name: str, content: str | bytes) -> Callable[[Room], None]:
    return lambda room: room.write(f"checkpoint/{name}", content) and None


def _gone(name: str) -> Callable[[Room], None]:
    return lambda room: (room.folder / "checkpoint" / name).unlink()


def _fifo(name: str) -> Callable[[Room], None]:
    def make(room: Room) -> None:
        path = room.folder / "checkpoint" / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return make


def _header(plain: Any, data: bytes = b"", size: int | None = None) -> Callable[[Room], None]:
    text = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    return _file("model.safetensors", struct.pack("<Q", len(text) if size is None else size) + text + data)


def _tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Room], None]:
    return lambda room: room.weights(change)


def _index(*names: object, **more: Any) -> Callable[[Room], None]:
    """Return a folder whose index names other files."""

    def make(room: Room) -> None:
        (room.folder / WEIGHTS).rename(room.folder / "checkpoint" / "model-00001-of-00001.safetensors")
        for name in names:
            if isinstance(name, str) and name.endswith((".bin", ".pt")) and "/" not in name:
                room.write(f"checkpoint/{name}", room.pickle())
        room.write(
            "outside.safetensors", (room.folder / "checkpoint" / "model-00001-of-00001.safetensors").read_bytes()
        )
        room.write(INDEX, json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}, **more}))

    return make


def _linked_index(room: Room) -> None:
    """An index that names a link, which leads out of the folder to a pickle."""
    (room.folder / WEIGHTS).unlink()
    room.write("outside.bin", room.pickle())
    (room.folder / "checkpoint" / "model-00001-of-00001.safetensors").symlink_to("../outside.bin")
    room.write(INDEX, json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))


def _remote_code(room: Room) -> None:
    room.edit(CONFIG, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, model_type="evil")
    room.write("checkpoint/evil.py", f"open({str(room.canary)!r}, 'w')\n")


def _remote_tokenizer(room: Room) -> None:
    room.write("checkpoint/evil.py", f"open({str(room.canary)!r}, 'w')\n")
    room.edit("checkpoint/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]})
    room.write("checkpoint/tokenizer.json", "{}")


def _nan(tensors: dict[str, Any]) -> None:
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = float("nan")


def _pop(tensors: dict[str, Any]) -> None:
    tensors.pop("transformer.wpe.weight")


def _reshape(tensors: dict[str, Any]) -> None:
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:3].contiguous()


def _twice(tensors: dict[str, Any]) -> None:
    tensors["module.transformer.wpe.weight"] = tensors["transformer.wpe.weight"].clone()


def _escape(tensors: dict[str, Any]) -> None:
    tensors["transformer.h.0.mlp.c_fc.lora_A.\x1b[31m\u202e"] = tensors["transformer.wpe.weight"].clone()


def _pickled(name: str) -> Callable[[Room], None]:
    def make(room: Room) -> None:
        (room.folder / WEIGHTS).unlink()
        room.write(f"checkpoint/{name}", room.pickle())

    return make


_SPOILED: dict[str, tuple[str, Callable[[Room], None]]] = {
    "no configuration": ("config.json", _gone("config.json")),
    "an empty configuration": ("checkpoint", _file("config.json", "")),
    "a configuration that is a list": ("checkpoint", _file("config.json", "[]")),
    "a configuration that is a number": ("checkpoint", _file("config.json", "3")),
    "a configuration nested deeply": ("checkpoint", _file("config.json", '{"a": ' + "[" * 100_000)),
    "a configuration in UTF-16": ("checkpoint", _file("config.json", '{"model_type": "gpt2"}'.encode("utf-16"))),
    "a configuration of NULs": ("checkpoint", _file("config.json", bytes(100))),
    "a configuration of 5,000 digits": ("checkpoint", _file("config.json", '{"n_embd": ' + "9" * 5000 + "}")),
    "a configuration that is a FIFO": ("config.json", _fifo("config.json")),
    "a model that is none": ("checkpoint", _config(model_type="no-such-model")),
    "a model type with an escape": ("checkpoint", _config(model_type="\x1b[31m\u202e")),
    "a model type that is a list": ("checkpoint", _config(model_type=["gpt2"])),
    "code of its own": ("checkpoint", _remote_code),
    "a tokenizer with code of its own": ("tokenizer", _remote_tokenizer),
    "1e9 layers": ("n_layer", _config(n_layer=1_000_000_000)),
    "1e9 entries a vector": ("checkpoint", _config(n_embd=1_000_000_000)),
    "a vocabulary of 1e15": ("checkpoint", _config(vocab_size=10**15)),
    "a vocabulary of 2**70": ("checkpoint", _config(vocab_size=2**70)),
    "1e12 positions": ("checkpoint", _config(n_positions=10**12)),
    "no layers": ("optimizer.pt", _config(n_layer=-1)),
    "text as layers": ("checkpoint", _config(n_layer="two")),
    "NaN as layers": ("checkpoint", _file("config.json", '{"model_type": "gpt2", "n_layer": NaN}')),
    "a list as width": ("checkpoint", _config(n_embd=[8])),
    "heads that do not divide": ("checkpoint", _config(n_head=3)),
    "another width": ("checkpoint", _config(n_embd=16)),
    "more layers": ("checkpoint", _config(n_layer=2)),
    "an activation that is none": ("checkpoint", _config(activation_function="no-such")),
    "no weights": ("model.safetensors", _gone("model.safetensors")),
    "empty weights": ("checkpoint", _file("model.safetensors", b"")),
    "weights of a word": ("checkpoint", _file("model.safetensors", b"hello world")),
    "weights that are a FIFO": ("checkpoint", _fifo("model.safetensors")),
    "a header of 2**60": ("checkpoint", _header({}, size=2**60)),
    "a header beyond the file": ("checkpoint", _header({}, size=10**6)),
    "a header that is a list": ("checkpoint", _header([])),
    "a header nested deeply": ("checkpoint", _header(b"[" * 100_000)),
    "a header of 5,000 digits": ("checkpoint", _header(b'{"w": {"shape": [' + b"9" * 5000 + b"]}}")),
    "a tensor beyond the file": (
        "checkpoint",
        _header({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}),
    ),
    "a tensor of a negative shape": (
        "checkpoint",
        _header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    ),
    "a tensor of a huge shape": (
        "checkpoint",
        _header({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)),
    ),
    "a tensor of no dtype": (
        "checkpoint",
        _header({"w": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ),
    "a tensor that is a list": ("checkpoint", _header({"w": [1]}, bytes(4))),
    "weights that are not finite": ("transformer.h.0.mlp.c_fc.weight", _tensors(_nan)),
    "a weight too few": ("transformer.wpe.weight", _tensors(_pop)),
    "a weight of another shape": ("transformer.wpe.weight", _tensors(_reshape)),
    "a weight twice": ("transformer.wpe.weight", _tensors(_twice)),
    "an adapter's weight with an escape": ("‹U+001B›", _tensors(_escape)),
    "pickled weights": ("a pickle, which is never loaded", _pickled("pytorch_model.bin")),
    "pickled weights under another name": ("never loaded", _pickled("model.pt")),
    "a pickle named safetensors": ("checkpoint", lambda room: room.write(WEIGHTS, room.pickle()) and None),
    "an index of a pickle": ("as a shard", _index("pytorch_model-00001.bin")),
    "an index beyond the folder": ("as a shard", _index("../outside.safetensors")),
    "an index of an absolute path": ("as a shard", _index("/etc/passwd")),
    "an index of another folder": ("as a shard", _index("./../checkpoint/../outside.safetensors")),
    "an index of a link to a pickle": ("checkpoint", _linked_index),
    "an index of numbers": ("as a shard", _index(3, 4)),
    "an index of lists": ("as a shard", _index(["a"])),
    "an index of nothing": ("model.safetensors", _index()),
    "an index of what is not there": ("model-9.safetensors", _index("model-9.safetensors")),
    "an index with an escape": ("‹U+001B›", _index("\x1b[31m.safetensors")),
    "an index with a NUL": ("as a shard", _index("a\0.safetensors")),
    "an index that is a list": ("index", lambda room: (_index()(room), room.write(INDEX, "[]"), None)[2]),
    "an index nested deeply": ("index", lambda room: (_index()(room), room.write(INDEX, "[" * 100_000), None)[2]),
    "a tokenizer that is a number": ("tokenizer", _file("tokenizer.json", "3")),
    "a tokenizer nested deeply": ("tokenizer", _file("tokenizer.json", "[" * 100_000)),
    "a tokenizer's configuration of noise": ("tokenizer", _file("tokenizer_config.json", bytes(range(256)))),
    "a tokenizer's configuration that is a list": ("tokenizer", _file("tokenizer_config.json", "[]")),
    "end tokens that are text": ("generation_config.json", _file("generation_config.json", '{"eos_token_id": "x"}')),
    "end tokens that are negative": ("generation_config.json", _file("generation_config.json", '{"eos_token_id": -3}')),
    "end tokens that are truth": ("generation_config.json", _file("generation_config.json", '{"eos_token_id": true}')),
    "end tokens that are nested": (
        "generation_config.json",
        _file("generation_config.json", '{"eos_token_id": [[1]]}'),
    ),
    "a generation configuration of noise": ("checkpoint", _file("generation_config.json", bytes(range(256)))),
    "a generation configuration nested deeply": ("checkpoint", _file("generation_config.json", "[" * 100_000)),
    "a generation configuration that is a list": ("checkpoint", _file("generation_config.json", "[3]")),
    "a generation configuration of 5,000 digits": (
        "checkpoint",
        _file("generation_config.json", '{"eos_token_id": ' + "9" * 5000 + "}"),
    ),
    "shards of DeepSpeed": (
        "DeepSpeed",
        lambda room: (_gone("optimizer.pt")(room), _file("zero_to_fp32.py", "")(room))[1],
    ),
}

CASES = [Case(f"checkpoint: {name}", said, make) for name, (said, make) in _SPOILED.items()]
