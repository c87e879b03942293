"""The arithmetic of SGD and Adam twice: torch's own kernels for the stored result, a closed form in float64 for Δθ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as _adam_kernel
from torch.optim.sgd import sgd as _sgd_kernel

from funcprobe.optimizers.affine import Form

State = dict[str, Tensor]
Hyper = Mapping[str, Any]


def dense(x: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Return a contiguous copy without a graph, whatever the strides of x are.

    Kernels pair the entries of parameter, gradient and state: torch's fused ones by their place in memory, and
    reductions over entries (Adafactor, Muon) in the order of memory. One layout for all makes a step a function of
    values alone.
    """
    source = x.detach()
    moved = source.to(device=device or x.device, dtype=dtype or x.dtype)
    fresh = moved is not source and moved.is_contiguous()  # a copy already
    return moved if fresh else moved.clone(memory_format=torch.contiguous_format)


def laid_out_as(x: Tensor, leaf: Tensor) -> Tensor:
    """Return contiguous x in the memory order of a leaf (transposed, channels_last), without gaps or overlaps.

    A stepped parameter then goes through the same matrix kernels as the parameter did, and differs by the step alone.
    """
    like = torch.empty_like(leaf.detach(), dtype=x.dtype)
    return x if like.stride() == x.stride() else like.copy_(x)


class Kernel(NamedTuple):
    """The functions that a built-in optimizer is made of."""

    init: Callable[[Tensor, Hyper], State]  #: the state of a leaf before its first step
    keys: Callable[[Hyper], tuple[str, ...]]  #: the names of the state of a leaf that has stepped
    run: Callable[
        [list[Tensor], list[Tensor], list[State], Hyper], None
    ]  #: torch's step, in place; gradients stay as they are
    form: Callable[
        [Tensor, Tensor, State, Hyper], Form
    ]  #: the same step in closed form: of leaf, gradient (float64), state


def _sgd_init(leaf: Tensor, hyper: Hyper) -> State:
    """Return no state: torch sets the momentum buffer to the first gradient, undamped."""
    return {}


def _sgd_keys(hyper: Hyper) -> tuple[str, ...]:
    return ("momentum_buffer",) if hyper["momentum"] != 0 else ()


def _sgd_run(params: list[Tensor], grads: list[Tensor], states: list[State], hyper: Hyper) -> None:
    buffers = [state.get("momentum_buffer") for state in states]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
    grads = [g.clone() for g in grads]  # with Nesterov's momentum torch writes on them
    _sgd_kernel(params, grads, buffers, has_sparse_grad=False, **{name: hyper[name] for name in names})
    for state, buffer in zip(states, buffers, strict=True):
        if buffer is not None:
            state["momentum_buffer"] = buffer


def _sgd_form(leaf: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> Form:
    """Return the form of `Δθ = −η (c_d d + c_b buf)` with `d = ±g + λθ`.

    Plain: c_d = 1. First step with momentum: buf' = d. Later: buf' = μ buf + (1 − damp) d. Nesterov steps along
    d + μ buf', otherwise along buf'.
    """
    mu, eta = hyper["momentum"], hyper["lr"]
    buffer = state.get("momentum_buffer") if mu != 0 else None
    c_d, c_b = (1.0, 0.0) if mu == 0 or buffer is None else (1.0 - hyper["dampening"], mu)
    if mu != 0 and hyper["nesterov"]:
        c_d, c_b = 1.0 + mu * c_d, mu * c_b
    sign = -1.0 if hyper["maximize"] else 1.0
    return Form(-eta * c_d * sign, -eta * c_b, decay=-eta * c_d * hyper["weight_decay"], buffer=buffer)


def step_dtype(hyper: Hyper) -> torch.dtype:
    """Return the dtype in which torch counts steps."""
    wide = torch.get_default_dtype() == torch.float64 and not hyper.get("fused")
    return torch.float64 if wide else torch.float32


def _adam_init(leaf: Tensor, hyper: Hyper) -> State:
    """Return zero moments and a zero step count, typed and placed as torch does."""
    on_device = hyper["fused"] or hyper["capturable"]
    step = torch.zeros((), dtype=step_dtype(hyper), device=leaf.device if on_device else torch.device("cpu"))
    moments = (key for key in _adam_keys(hyper) if key != "step")
    return {"step": step} | {k: torch.zeros_like(leaf, memory_format=torch.contiguous_format) for k in moments}


def _adam_keys(hyper: Hyper) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if hyper["amsgrad"] else ()))


def _adam_run(params: list[Tensor], grads: list[Tensor], states: list[State], hyper: Hyper) -> None:
    beta1, beta2 = hyper["betas"]
    names = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
    _adam_kernel(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if hyper["amsgrad"] else [],
        [state["step"] for state in states],
        beta1=beta1,
        beta2=beta2,
        decoupled_weight_decay=hyper["decoupled_weight_decay"],
        **{name: hyper[name] for name in names},
    )


def _adam_form(leaf: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> Form:
    """Return the form of `Δθ = −η (β₁ m + (1 − β₁) d) / (bc₁ denom)`, d = ±g, plus λθ where decay is coupled.

    `denom = √(v′ / bc₂) + ε` with `v′ = β₂ v + (1 − β₂) d²`, or its running maximum (amsgrad), and `bc = 1 − β^t`.
    Decoupled decay adds `−ηλθ`.
    """
    (beta1, beta2), eta, decay = hyper["betas"], hyper["lr"], hyper["weight_decay"]
    sign, coupled = (-1.0 if hyper["maximize"] else 1.0), 0.0 if hyper["decoupled_weight_decay"] else decay
    t = float(state["step"]) + 1
    bc1, bc2 = 1 - beta1**t, 1 - beta2**t
    # d² alone is read, so d may be taken with the other sign
    d = gradient if coupled == 0 else gradient.add(leaf, alpha=sign * coupled)
    v = (d * d).mul_((1 - beta2) / bc2).add_(state["exp_avg_sq"], alpha=beta2 / bc2)
    if hyper["amsgrad"]:
        v = torch.maximum(v, state["max_exp_avg_sq"].double() / bc2)
    rate = -eta / bc1
    return Form(
        gradient=rate * (1 - beta1) * sign,
        momentum=rate * beta1,
        coupled=rate * (1 - beta1) * coupled,
        decay=0.0 if coupled else -eta * decay,
        buffer=state["exp_avg"],
        denominator=_root(v, hyper["eps"]),
    )


def _root(v: Tensor, eps: float) -> Tensor:
    """Return √v + ε, its derivative 0 at v = 0: a leaf entry that never had a gradient would give 0 · ∞ there."""
    if not (v.requires_grad or torch._C._are_functorch_transforms_active()):
        return v.sqrt_().add_(eps)
    zero = v == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, v))) + eps


SGD = Kernel(_sgd_init, _sgd_keys, _sgd_run, _sgd_form)
ADAM = Kernel(_adam_init, _adam_keys, _adam_run, _adam_form)
