"""The kernels that a transformers model is set to, and those with forward derivatives that stand in for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import nn


class Substitutes(NamedTuple):
    """The operations of a copy that run otherwise in forward mode."""

    attention: bool = False  #: attention is torch's own `scaled_dot_product_attention`, not a package's or flex
    experts: bool = False  #: experts run one by one, because grouped products have no forward derivative
    context: Callable[[], AbstractContextManager[None]] = nullcontext  #: in which they do


class _Setting(NamedTuple):
    """One setting of one configuration."""

    config: Any
    name: str
    own: str
    instead: str


def substitutes(skeleton: nn.Module) -> Substitutes:
    """Return the stand-ins for the kernels of a copy that have no forward derivative."""
    configs = {id(c): c for m in skeleton.modules() if (c := getattr(m, "config", None)) is not None}
    attention = list(_set_to(configs, "_attn_implementation", "sdpa", keep=(None, "eager", "sdpa")))
    experts = list(_set_to(configs, "_experts_implementation", "eager", keep=(None, "eager", "batched_mm")))
    experts = experts if any("Experts" in type(m).__name__ for m in skeleton.modules()) else []
    settings = [*attention, *experts]
    return Substitutes(bool(attention), bool(experts), _switch(settings)) if settings else Substitutes()


def _set_to(configs: dict[int, Any], name: str, instead: str, keep: tuple[str | None, ...]) -> Iterator[_Setting]:
    for config in configs.values():
        if (own := getattr(config, name, None)) not in keep:
            yield _Setting(config, name, str(own), instead)


def _switch(settings: list[_Setting]) -> Callable[[], AbstractContextManager[None]]:
    lock, inside = threading.Lock(), [0]

    def move(by: int) -> None:
        with lock:  # the first one in switches, and the last one out switches back
            inside[0] += by
            if inside[0] == max(by, 0):
                for setting in settings:
                    setattr(setting.config, setting.name, setting.instead if by > 0 else setting.own)

    @contextmanager
    def substituted() -> Iterator[None]:
        move(1)
        try:
            yield
        finally:
            move(-1)

    return substituted
