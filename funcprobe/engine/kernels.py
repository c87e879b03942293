"""The needs of forward mode in the stack: kernels that have forward derivatives, and words for those that have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from funcprobe.engine import attention
from funcprobe.errors import ForwardModeError
from funcprobe.policy.module import Policy
from funcprobe.policy.running import Watch, first_sentence, running_module
from funcprobe.types import Params

#: What torch says, in one way or another, where an operation has no forward derivative.
_MARKS = ("forward AD", "forward mode AD", "jvp", "setup_context", "functorch transforms")

#: The most entries of attention matrices that are made at once in forward mode (64 MiB in float32; every tangent and
#: every order adds arrays of that size), and the least number of queries that keeps their product efficient.
ATTENTION_BUDGET, SMALLEST_BLOCK = 2**24, 16


_attend: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention


def math_attention() -> AbstractContextManager[None]:
    """Return a context in which scaled-dot-product attention uses the kernel that has forward derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def differentiable_attention(policy: Policy) -> Iterator[None]:
    """Hold a policy's attention to that kernel, also where the model was set to flex or flash attention.

    The kernel makes the attention matrices, of the square of the length; here it does so a block of queries at a time.
    """
    with policy.plain_kernels(), math_attention(), _QueryBlocks(), EveryRow():
        yield


class EveryRow(TorchFunctionMode):
    """A context in which the backward pass of `embedding` leaves no row out.

    torch's skips the row `padding_idx`, forward mode does not. A training loop's gradient is to skip it; the derivative
    of an observable is not, where the policy really reads that token.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, embeddings without a padding row."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding:
            args = (*args[:2], None, *args[3:]) if len(args) > 2 else args
            kwargs = {name: value for name, value in kwargs.items() if name != "padding_idx"}
        return func(*args, **kwargs)


class Undetached(TorchFunctionMode):
    """A context in which `detach` inside a module does nothing.

    Training leaves out what a module detaches (the norm of DoRA); the derivative of what the policy computes does not.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, unless it detaches."""
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def whole_derivative(policy: Policy) -> AbstractContextManager[Any]:
    """Return the context in which the derivative is that of the computed function, detached parts included."""
    return Undetached() if policy.checks is not None and policy.checks.undetached else nullcontext()


class TrainedRows(TorchFunctionMode):
    """A context in which reading the row `padding_idx` of an embedding has no forward derivative.

    A training loop's gradient leaves that row's reads out, so what is to be summed against such a gradient must too.
    (The row may still have a derivative elsewhere: a tied head multiplies with it.)
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, embeddings with their padding row held."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func is not torch.nn.functional.embedding:
            return found
        row = args[2] if len(args) > 2 else kwargs.get("padding_idx")
        if row is None:
            return found
        row = row if row >= 0 else row + args[1].shape[0]
        return torch.where((args[0] == row).unsqueeze(-1), found.detach(), found)


class _QueryBlocks(TorchFunctionMode):
    """A context in which attention matrices of more than `ATTENTION_BUDGET` entries are made block by block.

    Queries do not depend on one another: a block of them against all keys that it may see is a matrix product of its
    own. Where nothing is kept for a backward pass, what exists at once is one block; and under a causal mask the part
    above the diagonal is not computed.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, attention by blocks."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _by_query_blocks(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _by_query_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    (query, key, value, attn_mask), nothing_more = attention.as_autocast(query, key, value, attn_mask)
    attend = partial(_attend, dropout_p=dropout_p, **options)
    queries, keys = query.shape[-2], key.shape[-2]
    block = max(SMALLEST_BLOCK, ATTENTION_BUDGET // (math.prod(query.shape[:-2]) * keys))

    def rows(start: int) -> Tensor:
        stop = min(start + block, queries)
        # torch aligns a causal mask with the first query and the first key
        seen = min(stop, keys) if is_causal else keys
        mask: Tensor | None
        if is_causal:
            mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).tril(start)
        else:
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., start:stop, :]
        return attend(query[..., start:stop, :], key[..., :seen, :], value[..., :seen, :], attn_mask=mask)

    with nothing_more:
        if block >= queries:
            return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
        return torch.cat([rows(start) for start in range(0, queries, block)], dim=-2)


class Arithmetic(NamedTuple):
    """The arithmetic of a policy's forward pass: dtypes, autocast and kernels."""

    eps: float  #: of the coarsest dtype in which anything that depends on the leaves is computed
    fused_attention: bool  #: whether attention runs in fused kernels, which have no forward derivative
    grouped_experts: bool = False  #: whether experts run as grouped products, which have none either


def arithmetic(policy: Policy, params: Params) -> Arithmetic:
    """Return the arithmetic that a policy's forward pass over two tokens shows, autocast and casts inside included."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=policy.device)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), Watch() as watch:
        features = policy.features(leaves, ids, torch.ones_like(ids, dtype=torch.bool))
        policy.readout(policy.readout_leaves(leaves), features[0])
    eps = max(watch.eps, *(torch.finfo(x.dtype).eps for x in (features, *params.values())))
    return Arithmetic(eps, watch.fused_attention or policy.substitutes.attention, policy.substitutes.experts)


class OnceDifferentiable(TorchFunctionMode):
    """A context in which a frozen linear layer has one tangent product, and not two.

    torch gives a weight that does not move a tangent of zeros, and multiplies with it. Under LoRA, where nearly all
    weights are frozen, forward mode then costs three passes; so it costs two. Not to be nested: torch 2.13 does not
    differentiate a custom function's `jvp` again.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, frozen linear layers by their own rule."""
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # what moves is handed to the module as a plain tensor; what is still its own Parameter is frozen
    if isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter)):
        return _FrozenLinear.apply(input, weight.detach(), None if bias is None else bias.detach())
    return torch.nn.functional.linear(input, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """`x Wᵀ + b` with the forward derivative `ẋ Wᵀ`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return torch.nn.functional.linear(tangent, ctx.saved_tensors[0])


class FusedAttention(TorchFunctionMode):
    """A context in which attention runs in a fused kernel and has a forward derivative, by a rule of its own.

    Where the rule does not hold, and in nested forward mode, which would lose a term in silence, attention is left to
    the math kernel. It is part of the arithmetic of forward mode, so that scores at one θ are subtracted from scores
    at another that came from the same kernel.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, attention by its own rule."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        attended = attention.attend(*args, **kwargs)
        return func(*args, **kwargs) if attended is None else attended


class TwiceDifferentiable(TorchFunctionMode):
    """A context in which `layer_norm` is spelled out in elementary operations.

    torch's own forward derivative of `layer_norm` cannot be differentiated again: it treats its saved statistics as
    constants, so a nested derivative loses a term in silence (found in torch 2.13; tests/test_stack.py holds it). And
    grad mode stays on: without it `silu` takes a fused formula for its first derivative that has none of its own.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or its substitute."""
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
def forward_arithmetic(policy: Policy, order: Literal[1, 2] = 1) -> Iterator[None]:
    """Hold a policy to kernels and formulas that have forward derivatives up to an order."""
    with differentiable_attention(policy), TwiceDifferentiable() if order == 2 else FusedAttention():
        yield


def transform_errors() -> AbstractContextManager[None]:
    """Return a context that turns torch's errors about code opaque to function transforms into one sentence."""
    return _in_our_words(
        "an operation that function transforms do not see through",
        "so torch.func cannot differentiate it",
        "probe(...) does, by plain autograd",
    )


def forward_mode_errors() -> AbstractContextManager[None]:
    """Return a context in which torch's ways of saying 'no forward derivative' become one, which names the module."""
    return _in_our_words("an operation without a forward derivative", None, 'use mode="reverse"')


@contextmanager
def _in_our_words(what: str, so: str | None, hint: str) -> Iterator[None]:
    """Return torch's error in our words: the module that was running, the message, its consequence, and the remedy.

    Raises:
        ForwardModeError: In place of what torch says of such operations.
        RuntimeError: Any other one, as it came.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(mark in str(error) for mark in _MARKS):
            raise
        follows = "" if so is None else f", {so}"
        text = f'{running_module(error.__traceback__)} has {what} ("{first_sentence(error)}"){follows}'
        raise ForwardModeError(text, hint=hint, kind="no derivative") from error


def without_batching_rule(error: RuntimeError) -> bool:
    """Return whether torch says that vmap cannot run something: it has no batching rule, or looks at values."""
    return "vmap" in str(error)
