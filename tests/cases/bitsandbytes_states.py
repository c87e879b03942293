"""States of bitsandbytes, which is installed nowhere else: files that it wrote, and the step that it took from them.

    pip install bitsandbytes && python -m tests.cases.bitsandbytes_states

writes them anew. bitsandbytes 0.50.2 wrote those that lie here, on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent

#: Leaves: of 17 blocks, the last of them short, and too small to be quantised; alone where nothing is quantised.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AdamW8bit": {"matrix": (65, 64), "vector": (7,)},
    "PagedAdamW32bit": {"vector": (7,)},
}


def begun(cls: str) -> dict[str, Tensor]:
    """Return the leaves before the first step, numbers that every machine has exactly."""
    return {name: _numbers(shape, 97) / 1024 for name, shape in SHAPES[cls].items()}


def gradient(cls: str, step: int) -> dict[str, Tensor]:
    """Return the gradient of a step, whose sizes span the map."""
    return {name: _numbers(shape, 101 + 2 * step) ** 3 / 2**24 for name, shape in SHAPES[cls].items()}


def states(cls: str) -> dict[str, Any]:
    """Return {"saved": the state after three steps, "before": the leaves then, "after": those after a fourth}."""
    found: dict[str, Any] = torch.load(HERE / f"bitsandbytes_{cls}.pt", weights_only=True)
    return found


def _numbers(shape: tuple[int, ...], modulus: int) -> Tensor:
    count = torch.arange(torch.Size(shape).numel())
    return ((count * 37) % modulus - modulus // 2).float().reshape(shape)


def _write(cls: str) -> None:
    import bitsandbytes

    leaves = {name: torch.nn.Parameter(p) for name, p in begun(cls).items()}
    optimizer = getattr(bitsandbytes.optim, cls)(list(leaves.values()), lr=1e-3, weight_decay=0.1)
    for step in range(4):
        if step == 3:
            saved, before = optimizer.state_dict(), {name: p.detach().clone() for name, p in leaves.items()}
            saved = torch.load(_kept(saved), weights_only=True)
        for name, g in gradient(cls, step).items():
            leaves[name].grad = g
        optimizer.step()
    after = {name: p.detach() for name, p in leaves.items()}
    torch.save({"saved": saved, "before": before, "after": after}, HERE / f"bitsandbytes_{cls}.pt")


def _kept(saved: Any) -> Any:
    import io

    stream = io.BytesIO()
    torch.save(saved, stream)
    stream.seek(0)
    return stream


if __name__ == "__main__":
    for name in SHAPES:
        _write(name)
