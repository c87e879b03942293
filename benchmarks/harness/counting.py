"""FLOPs of a run, those of torch's fused attention on a processor among them, which torch itself does not count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.utils.flop_counter import FlopCounterMode


def flops(run: Callable[[], Any], more: Mapping[Any, Callable[..., int]] | None = None) -> int:
    """Return the FLOPs of a run, exactly; fused attention counts as the two whole products that the math kernel has.

    `more` counts further operations that torch does not: by operation, functions of the shapes of its arguments.
    """
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _two_products, **(more or {})}
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        run()
    return counter.get_total_flops()


class _NoModules:
    """No count by module: torch's hooks fail on a module that is called inside a custom function, as a readout is."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


def _two_products(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, queries, features = query
    return 2 * batch * heads * queries * key[-2] * (features + value[-1])
