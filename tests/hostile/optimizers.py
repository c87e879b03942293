"""The optimizer's state: pickles, hyperparameters, moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.hostile.room import Case, Room

NAN = float("nan")


def _option(name: str, value: Any) -> Callable[[Room], None]:
    def change(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            group[name] = value

    return lambda room: room.optimizer(change)


def _entry(name: str, make: Callable[[Any], Any]) -> Callable[[Room], None]:
    """Return a state with another entry for the first parameter."""

    def change(saved: dict[str, Any]) -> None:
        entry = saved["state"][0]
        entry[name] = make(entry.get(name))

    return lambda room: room.optimizer(change)


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Room], None]:
    return lambda room: room.optimizer(change)


def _file(content: bytes) -> Callable[[Room], None]:
    return lambda room: room.write("checkpoint/optimizer.pt", content) and None


def _saved(make: Callable[[], Any]) -> Callable[[Room], None]:
    def prepare(room: Room) -> None:
        import torch

        (room.folder / "checkpoint" / "optimizer.pt").unlink()
        torch.save(make(), room.folder / "checkpoint" / "optimizer.pt")

    return prepare


def _tensor(*values: Any) -> Any:
    import torch

    return torch.tensor(*values)


_FILES: dict[str, tuple[str, Callable[[Room], None]]] = {
    "gone": ("optimizer.pt", lambda room: (room.folder / "checkpoint" / "optimizer.pt").unlink()),
    "empty": ("optimizer.pt", _file(b"")),
    "a word": ("optimizer.pt", _file(b"hello")),
    "a pickle": (
        "nothing else is unpickled",
        lambda room: room.write("checkpoint/optimizer.pt", room.pickle()) and None,
    ),
    "a zip of nothing": ("optimizer.pt", _file(b"PK\x05\x06" + bytes(18))),
    "a list": ("optimizer.pt", _saved(lambda: [1])),
    "a number": ("optimizer.pt", _saved(lambda: 3)),
    "an empty map": ("optimizer.pt", _saved(dict)),
    "groups that are a number": ("optimizer.pt", _saved(lambda: {"state": {}, "param_groups": 3})),
    "groups of numbers": ("optimizer.pt", _saved(lambda: {"state": {}, "param_groups": [3]})),
    "groups without params": ("optimizer.pt", _saved(lambda: {"state": {}, "param_groups": [{"lr": 1.0}]})),
    "no groups": ("optimizer.pt", _saved(lambda: {"state": {}, "param_groups": []})),
    "params that are a number": ("optimizer.pt", _option("params", 3)),
    "params that are lists": ("optimizer.pt", _option("params", [[0]])),
    "state that is a list": (
        "optimizer.pt",
        _saved(lambda: {"state": [], "param_groups": [{"params": [0], "lr": 1.0}]}),
    ),
    "state of a parameter that is none": ("optimizer.pt", _changed(lambda s: s["state"].update({99: {}}))),
    "state of a number": ("optimizer.pt", _changed(lambda s: s["state"].update({0: 3}))),
    "a parameter too few": ("optimizer.pt", _changed(lambda s: s["param_groups"][0]["params"].pop())),
    "names that are numbers": ("optimizer.pt", _option("param_names", 3)),
    "names that are lists": ("optimizer.pt", _option("param_names", [["a"]] * 30)),
}

_OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("lr", "text", "fast"),
    ("lr", "a list", [1e-3]),
    ("lr", "NaN", NAN),
    ("lr", "infinite", float("inf")),
    ("lr", "negative", -1e-3),
    ("lr", "complex", 1 + 2j),
    ("lr", "None", None),
    ("lr", "2**2000", 2**2000),
    ("betas", "one", (1.0, 1.0)),
    ("betas", "negative", (-0.1, 0.9)),
    ("betas", "a number", 0.9),
    ("betas", "three", (0.9, 0.99, 0.999)),
    ("betas", "texts", ("a", "b")),
    ("betas", "NaN", (NAN, 0.9)),
    ("betas", "None", None),
    ("eps", "negative", -1e-8),
    ("eps", "text", "small"),
    ("eps", "NaN", NAN),
    ("eps", "a list", [1e-8]),
    ("weight_decay", "negative", -0.1),
    ("weight_decay", "text", "much"),
    ("weight_decay", "NaN", NAN),
    ("weight_decay", "infinite", float("inf")),
    ("amsgrad", "text", "maybe"),
    ("maximize", "text", "maybe"),
    ("maximize", "a list", [1]),
    ("capturable", "text", "maybe"),
)

_TENSORS: dict[str, tuple[str, Callable[[Room], None]]] = {
    "lr as a vector": ("lr", lambda r: _option("lr", _tensor([1e-3, 1e-3]))(r)),
    "lr as a tensor of NaN": ("lr", lambda r: _option("lr", _tensor(NAN))(r)),
    "a step that is negative": ("step", _entry("step", lambda x: x * 0 - 1)),
    "a step that is NaN": ("step", _entry("step", lambda x: x * NAN)),
    "a step that is infinite": ("step", _entry("step", lambda x: x / 0)),
    "a step that is a vector": ("step", _entry("step", lambda x: x.repeat(3))),
    "a step that is a half": ("step", _entry("step", lambda x: x * 0 + 0.5)),
    "a step that is text": ("step", _entry("step", lambda x: "three")),
    "a step that is a list": ("step", _entry("step", lambda x: [1])),
    "a step that is complex": ("step", _entry("step", lambda x: x.to(_complex()))),
    "a step of 2**2000": ("step", _entry("step", lambda x: 2**2000)),
    "moments of NaN": ("exp_avg", _entry("exp_avg", lambda x: x * NAN)),
    "moments of infinity": ("exp_avg_sq", _entry("exp_avg_sq", lambda x: x + float("inf"))),
    "a negative second moment": ("exp_avg_sq", _entry("exp_avg_sq", lambda x: -x.abs() - 1)),
    "sparse moments": ("exp_avg", _entry("exp_avg", lambda x: x.to_sparse())),
    "complex moments": ("exp_avg", _entry("exp_avg", lambda x: x.to(_complex()))),
    "moments of integers": ("exp_avg", _entry("exp_avg", lambda x: x.long())),
    "moments of truths": ("exp_avg", _entry("exp_avg", lambda x: x.bool())),
    "moments of another shape": ("shape", _entry("exp_avg", lambda x: x[:1])),
    "moments that are text": ("exp_avg", _entry("exp_avg", lambda x: "big")),
    "moments that are missing": ("transformer.wte.weight", _changed(lambda s: s["state"][0].pop("exp_avg"))),
    "moments on meta": ("optimizer.pt", _entry("exp_avg", lambda x: x.to("meta"))),
    "an entry more": ("optimizer.pt", _entry("\x1b[31mevil", lambda x: _tensor(1.0))),
}


def _complex() -> Any:
    import torch

    return torch.complex64


CASES = [
    *(Case(f"optimizer: {name}", said, make) for name, (said, make) in (_FILES | _TENSORS).items()),
    *(Case(f"optimizer: {name} is {what}", name, _option(name, value)) for name, what, value in _OPTIONS),
]
