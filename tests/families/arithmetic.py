"""Which arithmetic a model computes in, and a context in which it is float64 throughout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Wide(TorchFunctionMode):
    """A context in which what a model casts to float32 is cast to float64: its function, without its rounding."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with float64 wherever float32 is asked for by name."""
        func = Tensor.double if func is Tensor.float else func
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


class _Coarsest(TorchDispatchMode):
    """A context that notes the coarsest floating-point type that is computed."""

    eps = torch.finfo(torch.float64).eps

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and look at its results."""
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1:
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        return found


def coarsest(module: nn.Module, ids: Tensor) -> float:
    """Return the eps of the coarsest arithmetic inside a forward pass."""
    with torch.no_grad(), _Coarsest() as watch:
        module(ids)
    return watch.eps
