"""Adapter folders: the base that they name, and what their files hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.room import Case, Room

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 2,
    "target_modules": ["c_attn"],
    "fan_in_fan_out": True,
    "base_model_name_or_path": "../checkpoint",
}


def _adapter(room: Room, plain: Any, *, tensors: bool = True) -> None:
    import torch
    from safetensors.torch import save_file

    text = plain if isinstance(plain, str | bytes) else json.dumps({k: v for k, v in plain.items() if v is not ...})
    room.write("adapter/adapter_config.json", text)
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    if tensors:
        found = {f"{stem}.lora_A.weight": torch.zeros(2, 8), f"{stem}.lora_B.weight": torch.zeros(24, 2)}
        save_file(found, room.folder / "adapter" / "adapter_model.safetensors")
    room.write("adapter/optimizer.pt", (room.folder / "checkpoint" / "optimizer.pt").read_bytes())
    room.config(checkpoint="adapter")


def _changed(**changes: Any) -> Callable[[Room], None]:
    return lambda room: _adapter(room, {**CONFIG, **changes})


def _text(text: str | bytes) -> Callable[[Room], None]:
    return lambda room: _adapter(room, text)


def _no_tensors(room: Room) -> None:
    _adapter(room, CONFIG, tensors=False)


def _pickled(room: Room) -> None:
    _adapter(room, CONFIG, tensors=False)
    room.write("adapter/adapter_model.bin", room.pickle())


def _other_tensors(room: Room) -> None:
    import torch
    from safetensors.torch import save_file

    _adapter(room, CONFIG)
    save_file({"\x1b[31mx": torch.zeros(1)}, room.folder / "adapter" / "adapter_model.safetensors")


_SPOILED: dict[str, tuple[str, Callable[[Room], None]]] = {
    "a base on the network": ("base_model", _changed(base_model_name_or_path="openai-community/gpt2")),
    "a base at an address": ("base_model", _changed(base_model_name_or_path="https://example.com/model")),
    "a base that is not there": ("base_model", _changed(base_model_name_or_path="/nowhere/base")),
    "a base of an unknown user": ("no-such-user", _changed(base_model_name_or_path="~no-such-user/base")),
    "a base with a NUL": ("NUL", _changed(base_model_name_or_path="ba\0se")),
    "a base with an escape": ("‹U+001B›", _changed(base_model_name_or_path="\x1b[31mbase\u202e")),
    "a base of a megabyte": ("base", _changed(base_model_name_or_path="b" * 1_000_000)),
    "a base that is a number": ("base", _changed(base_model_name_or_path=3)),
    "a base that is a list": ("base", _changed(base_model_name_or_path=["a"])),
    "no base": ("names no base model", _changed(base_model_name_or_path=None)),
    "an adapter as its own base": ("base", _changed(base_model_name_or_path=".")),
    "another kind": ("adapter_config.json", _changed(peft_type="NO_SUCH")),
    "no kind": ("adapter_config.json", _changed(peft_type=...)),
    "a kind that is a list": ("adapter_config.json", _changed(peft_type=["LORA"])),
    "a rank of 1e12": ("adapter", _changed(r=10**12)),
    "a rank of nothing": ("adapter", _changed(r=0)),
    "a rank of text": ("adapter", _changed(r="two")),
    "a module that is not there": ("adapter", _changed(target_modules=["no_such"])),
    "a pattern without an end": ("adapter", _changed(target_modules="(((((")),
    "empty": ("adapter_config.json", _text("")),
    "a list": ("adapter_config.json", _text("[]")),
    "nested deeply": ("adapter_config.json", _text("[" * 100_000)),
    "noise": ("adapter_config.json", _text(bytes(range(256)))),
    "no tensors": ("adapter_model.safetensors", _no_tensors),
    "pickled tensors": ("a pickle, which is never loaded", _pickled),
    "other tensors": ("adapter", _other_tensors),
}

CASES = [Case(f"adapter: {name}", said, make) for name, (said, make) in _SPOILED.items()]
