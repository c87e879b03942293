"""Sharded and quantised checkpoints: the table of contents, the items, the rank files, the codes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.room import Case, Room

Spoil = Callable[[Room], object]


def _distributed(spoil: Spoil) -> Callable[[Room], None]:
    """Return a room whose checkpoint is a folder of torch.distributed.checkpoint, spoiled."""

    def make(room: Room) -> None:
        from torch.distributed import checkpoint as dcp

        weights, saved = _taken(room)
        dcp.save({"model": weights, "optimizer": saved}, checkpoint_id=room.folder / "checkpoint", no_dist=True)
        spoil(room)

    return make


def _ranks(spoil: Spoil) -> Callable[[Room], None]:
    """Return a room whose checkpoint is that of verl with one process, spoiled."""

    def make(room: Room) -> None:
        import torch

        for kind, content in zip(("model", "optim"), _taken(room), strict=True):
            torch.save(content, _rank(room, kind))
        spoil(room)

    return make


def _taken(room: Room) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take weights and state, by name, out of the checkpoint."""
    import torch
    from safetensors.torch import load_file

    from funcprobe.checkpoints import map_ids_to_names

    folder = room.folder / "checkpoint"
    weights, saved = load_file(folder / "model.safetensors"), torch.load(folder / "optimizer.pt", weights_only=True)
    names = map_ids_to_names(_in_order(weights, folder), saved)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).unlink()
    state = {names[i]: entries for i, entries in saved["state"].items()}
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    return weights, {"state": state, "param_groups": groups}


def _in_order(weights: dict[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, GPT2LMHeadModel

    module = GPT2LMHeadModel(AutoConfig.from_pretrained(folder))
    return {name: tuple(weights[name].shape) for name, _ in module.named_parameters()}


def _rank(room: Room, kind: str) -> Path:
    return room.folder / "checkpoint" / f"{kind}_world_size_1_rank_0.pt"


def _table(change: Callable[[Any], object]) -> Spoil:
    """Change the table as torch's own reader has it; what is returned, if anything, stands in its place."""

    def spoil(room: Room) -> None:
        path = room.folder / "checkpoint" / ".metadata"
        found = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(found) or found))

    return spoil


def _bytes(content: bytes) -> Spoil:
    return lambda room: room.write("checkpoint/.metadata", content)


def _places(found: Any, ending: str) -> Any:
    return next(info for index, info in found.storage_data.items() if index.fqn.endswith(ending))


def _item(ending: str) -> Spoil:
    """Write a payload over an item."""

    def spoil(room: Room) -> None:
        info = _places(pickle.loads((room.folder / "checkpoint" / ".metadata").read_bytes()), ending)
        with (room.folder / "checkpoint" / info.relative_path).open("r+b") as stream:
            stream.seek(info.offset)
            stream.write(room.pickle().ljust(info.length, b"\0"))

    return spoil


def _payload(kind: str) -> Spoil:
    return lambda room: _rank(room, kind).write_bytes(room.pickle())


def _moved(**fields: Any) -> Spoil:
    return _table(lambda found: vars(_places(found, "wte.weight")).update(fields))


def _grown(found: Any) -> None:
    import torch

    entry = found.state_dict_metadata["model.transformer.wte.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size((2**30, 2**20))


def _quantised(**changes: Any) -> Callable[[Room], None]:
    """Return a room whose optimizer is an 8-bit one of bitsandbytes, with codes that do not fit."""

    def change(saved: dict[str, Any]) -> None:
        import torch

        for entries in saved["state"].values():
            shape = entries.pop("exp_avg").shape
            blocks = -(-entries.pop("exp_avg_sq").numel() // 256)
            for n in "12":
                entries |= {f"state{n}": torch.zeros(shape, dtype=torch.uint8), f"qmap{n}": torch.zeros(256)}
                entries |= {f"absmax{n}": torch.zeros(blocks)}
            entries |= changes
        options = ("lr", "betas", "eps", "weight_decay", "params")
        saved["param_groups"] = [{key: group[key] for key in options} for group in saved["param_groups"]]

    return lambda room: room.optimizer(change)


def _payload_in_the_table(room: Room) -> None:
    room.write("checkpoint/.metadata", room.pickle())


def _megatron(room: Room) -> None:
    _taken(room)
    room.write("checkpoint/latest_checkpointed_iteration.txt", "10")
    room.write("checkpoint/iter_0000010/mp_rank_00/model_optim_rng.pt", room.pickle())


_SPOILED: dict[str, tuple[str, Callable[[Room], None]]] = {
    "a payload in the table": ("system", _distributed(_payload_in_the_table)),
    "a payload in an item of the weights": ("nothing else is unpickled", _distributed(_item("wte.weight"))),
    "a payload in an item of the state": ("nothing else is unpickled", _distributed(_item("wpe.weight.exp_avg"))),
    "a payload in a group of the state": ("nothing else is unpickled", _distributed(_item("param_groups.0.betas"))),
    "an empty table": (".metadata", _distributed(_bytes(b""))),
    "a table of a word": (".metadata", _distributed(_bytes(b"hello"))),
    "a table of 2**40 bytes": (".metadata", _distributed(_bytes(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little")))),
    "a table nested deeply": (".metadata", _distributed(_bytes(b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."))),
    "a table that is a function": ("torch.load", _distributed(_bytes(b"ctorch\nload\n."))),
    "a table that is a number": (".metadata", _distributed(_table(lambda _: 3))),
    "a path out of the folder": ("../../outside", _distributed(_moved(relative_path="../../outside.distcp"))),
    "an absolute path": ("/etc/passwd", _distributed(_moved(relative_path="/etc/passwd"))),
    "a path with an escape": ("beside the table", _distributed(_moved(relative_path="\x1b[31m\u202e.pt"))),
    "an item beyond the file": ("beyond the end", _distributed(_moved(length=2**50))),
    "an item before the file": ("beyond the end", _distributed(_moved(offset=-5))),
    "an item through transforms": ("transform_descriptors", _distributed(_moved(transform_descriptors=["evil"]))),
    "a tensor of a huge shape": ("its bytes do not hold", _distributed(_table(_grown))),
    "a payload in a rank's weights": ("nothing else is unpickled", _ranks(_payload("model"))),
    "a payload in a rank's state": ("nothing else is unpickled", _ranks(_payload("optim"))),
    "a rank of a larger world": (
        "lacks 'model_world_size_999999_rank_0.pt'",
        _ranks(lambda room: _rank(room, "model").rename(room.path("checkpoint/model_world_size_999999_rank_7.pt"))),
    ),
    "codes without sizes": ("absmax1", _quantised(absmax1=None)),
    "codes beyond their type": ("state2", _quantised(qmap2=3)),
    "shards of Megatron": ("Megatron", _megatron),
}

CASES = [Case(f"shards: {name}", said, make) for name, (said, make) in _SPOILED.items()]
