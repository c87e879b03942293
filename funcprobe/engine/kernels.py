"""What forward mode needs of the stack: kernels that have forward derivatives, and words for those that have none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from funcprobe.errors import ForwardModeError
from funcprobe.policy.module import Policy
from funcprobe.types import Params

#: What torch says, in one way or another, where an operation has no forward derivative.
_MARKS = ("forward AD", "forward mode AD", "jvp", "setup_context", "functorch transforms")


def math_attention() -> AbstractContextManager[None]:
    """Return a context in which scaled-dot-product attention uses the kernel that has forward derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


class Arithmetic(NamedTuple):
    """What a policy's forward pass is made of."""

    eps: float  #: of the coarser dtype among features and trainable leaves
    fused_attention: bool  #: whether it calls scaled_dot_product_attention, whose fused kernels have no derivative


def arithmetic(policy: Policy, params: Params) -> Arithmetic:
    """Return what a forward pass over two tokens shows of a policy's arithmetic."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=policy.device)
    with torch.no_grad(), _Watch() as watch:
        features = policy.features(params, ids, torch.ones_like(ids, dtype=torch.bool))
    return Arithmetic(max(torch.finfo(x.dtype).eps for x in (features, *params.values())), watch.seen)


class _Watch(TorchFunctionMode):
    """A context that notices whether attention goes through torch's fused function."""

    seen = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen |= func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class TwiceDifferentiable(TorchFunctionMode):
    """A context in which `layer_norm` is spelled out in elementary operations.

    torch's own forward derivative of `layer_norm` cannot be differentiated again: it treats its saved statistics as
    constants, so a nested derivative loses a term in silence (found in torch 2.13; tests/test_stack.py holds it). And
    grad mode stays on: without it `silu` takes a fused formula for its first derivative that has none of its own.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands in for it."""
        if func is torch.nn.functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@contextmanager
def forward_mode_errors() -> Iterator[None]:
    """Turn torch's ways of saying 'no forward derivative' into one of ours, which names the module.

    Raises:
        ForwardModeError: In their place.
        RuntimeError: Any other one, as it came.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        said = str(error)
        if not any(mark in said for mark in _MARKS):
            raise
        raise ForwardModeError(
            f"{_where(error.__traceback__)} has an operation without a forward derivative "
            f'("{said.strip().splitlines()[0]}"); use mode="reverse".'
        ) from error


def _where(traceback: TracebackType | None) -> str:
    """Return the innermost module that was running, by its name within the outermost one."""
    running = []
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        running += [owner] if isinstance(owner, nn.Module) else []
        traceback = traceback.tb_next
    if not running:
        return "The model"
    names = {id(module): name for root in reversed(running) for name, module in root.named_modules()}
    innermost = running[-1]
    name, kind = names[id(innermost)], type(innermost).__name__
    return f"The module '{name}' ({kind})" if name else f"The module {kind}"
