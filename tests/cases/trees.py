"""Trees of tensors: leaves of every kind, gradients for them, copies, and comparisons bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcprobe.types import OptState, Params


def leaves(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Params:
    """A tree with a matrix, a vector, a transposed (non-contiguous) matrix and a scalar leaf."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"layer.10.weight": (5, 7), "layer.2.bias": (3,), "head": (4, 6), "gain": ()}
    made = {name: (scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for name, s in shapes.items()}
    return {**made, "head": made["head"].T}


def clone(tree: Any) -> Any:
    """A deep copy of a tree of tensors."""
    return {k: clone(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare two trees bit for bit, structure first; a difference is told with its place and both values."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), f"{where}: keys {list(found)} against {list(expected)}"
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), f"{where}: {len(found)} entries against {len(expected)}"
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}/{number}")
    elif isinstance(expected, Tensor | np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        same = torch.equal(found, expected) if isinstance(expected, Tensor) else np.array_equal(found, expected)
        assert same, f"{where}: {found} against {expected}, ratio {found / expected}"
    else:
        assert found == expected, f"{where}: {found} against {expected}"


def assert_same_state(found: OptState, expected: OptState) -> None:
    """Compare two optimizer states bit for bit: leaves in their order, the entries of a leaf in any."""
    assert_same(*({name: dict(sorted(entries.items())) for name, entries in s.items()} for s in (found, expected)))


def gradients(params: Params, seed: int) -> Params:
    """A random gradient like the parameters, with one entry exactly zero."""
    found = leaves(torch.float64, seed + 1000)
    found["layer.2.bias"][0] = 0.0  # as in an embedding row that no token reads
    return {name: found[name].to(p.dtype) for name, p in params.items()}


def live_state(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], names: list[str]) -> OptState:
    """The state of a live torch optimizer by name, without funcprobe's own reader."""
    return {
        name: {k: v for k, v in optimizer.state.get(p, {}).items() if v is not None}
        for name, p in zip(names, params, strict=True)
    }


def random_like(params: Params, seed: int = 7) -> Params:
    """Return leaves of the same names, shapes and dtypes with normal entries."""
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}
