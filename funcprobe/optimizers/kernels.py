"""The arithmetic of SGD and Adam twice: torch's own kernels for the stored result, float64 terms for Δθ.

A step is `Δθ = scale ⊙ g + momentum + decay` with the denominators held at their actual values. The terms are built
from parameters, state, gradient and hyperparameters, so nothing nearly equal is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as _adam_kernel
from torch.optim.sgd import sgd as _sgd_kernel

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


class Terms(NamedTuple):
    """One leaf's step in float64: `Δθ = scale ⊙ g + momentum + decay`."""

    scale: Tensor  #: what multiplies the gradient, leaf-shaped or a scalar
    momentum: Tensor  #: the part that comes from the optimizer's state
    decay: Tensor  #: the part that comes from weight decay


def still(leaf: Tensor) -> Terms:
    """Return the terms of a leaf that does not step."""
    zero = torch.zeros_like(leaf, dtype=torch.float64)
    return Terms(zero, zero, zero)


class Kernel(NamedTuple):
    """The functions that a built-in optimizer is made of."""

    init: Callable[[Tensor, Hyper], State]  #: the state of a leaf before its first step
    keys: Callable[[Hyper], tuple[str, ...]]  #: the names of the state of a leaf that has stepped
    run: Callable[[list[Tensor], list[Tensor], list[State], Hyper], None]  #: torch's step, in place on copies
    terms: Callable[[Tensor, Tensor, State, Hyper], Terms]  #: the same step as float64 terms


def _sgd_init(leaf: Tensor, hyper: Hyper) -> State:
    """Return no state: torch sets the momentum buffer to the first gradient, undamped."""
    return {}


def _sgd_keys(hyper: Hyper) -> tuple[str, ...]:
    return ("momentum_buffer",) if hyper["momentum"] != 0 else ()


def _sgd_run(params: list[Tensor], grads: list[Tensor], states: list[State], hyper: Hyper) -> None:
    buffers = [state.get("momentum_buffer") for state in states]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
    _sgd_kernel(params, grads, buffers, has_sparse_grad=False, **{name: hyper[name] for name in names})
    for state, buffer in zip(states, buffers, strict=True):
        if buffer is not None:
            state["momentum_buffer"] = buffer


def _sgd_terms(leaf: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> Terms:
    """Return the terms of `Δθ = −η (c_d d + c_b buf)` with `d = ±g + λθ`.

    Plain: c_d = 1. First step with momentum: buf' = d. Later: buf' = μ buf + (1 − damp) d. Nesterov steps along
    d + μ buf', otherwise along buf'.
    """
    mu, eta = hyper["momentum"], hyper["lr"]
    buffer = state.get("momentum_buffer") if mu != 0 else None
    c_d, c_b = (1.0, 0.0) if mu == 0 or buffer is None else (1.0 - hyper["dampening"], mu)
    if mu != 0 and hyper["nesterov"]:
        c_d, c_b = 1.0 + mu * c_d, mu * c_b
    theta = leaf.double()
    sign = -1.0 if hyper["maximize"] else 1.0
    momentum = torch.zeros_like(theta) if buffer is None else buffer.double() * (-eta * c_b)
    return Terms(torch.full_like(theta, -eta * c_d * sign), momentum, theta * (-eta * c_d * hyper["weight_decay"]))


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


def _adam_terms(leaf: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> Terms:
    """Return the terms of `Δθ = −η (β₁ m + (1 − β₁) d) / (bc₁ denom)`, d = ±g, plus λθ where decay is coupled.

    `denom = √(v′ / bc₂) + ε` with `v′ = β₂ v + (1 − β₂) d²`, or its running maximum (amsgrad), and `bc = 1 − β^t`.
    Decoupled decay adds `−ηλθ`.
    """
    (beta1, beta2), eta, decay = hyper["betas"], hyper["lr"], hyper["weight_decay"]
    theta, m, v = leaf.double(), state["exp_avg"].double(), state["exp_avg_sq"].double()
    sign, decoupled = (-1.0 if hyper["maximize"] else 1.0), hyper["decoupled_weight_decay"]
    d = gradient.double() if sign == 1.0 else gradient.double() * sign
    d = d if decoupled or decay == 0 else d + decay * theta
    v = ((1 - beta2) * d * d).add_(beta2 * v)
    v = torch.maximum(v, state["max_exp_avg_sq"].double()) if hyper["amsgrad"] else v
    t = float(state["step"]) + 1
    denom = (_sqrt(v) / (1 - beta2**t) ** 0.5).add_(hyper["eps"])
    base = (-eta / (1 - beta1**t)) / denom
    scale = base * (1 - beta1)
    return Terms(
        scale if sign == 1.0 else scale * sign,
        base * (beta1 * m),
        (-eta * decay) * theta if decoupled else scale * (decay * theta),
    )


def _sqrt(v: Tensor) -> Tensor:
    """Return √v with derivative 0 at v = 0: a leaf entry that never had a gradient would give 0 · ∞ there."""
    if not (v.requires_grad or torch._C._are_functorch_transforms_active()):
        return torch.sqrt(v)
    zero = v == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, v)))


SGD = Kernel(_sgd_init, _sgd_keys, _sgd_run, _sgd_terms)
ADAM = Kernel(_adam_init, _adam_keys, _adam_run, _adam_terms)
