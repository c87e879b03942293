"""Attribution without forward mode: per-sample gradients one at a time by plain autograd, and optimizers by hand.

A module is run on one sequence at a time, without padding; a part of the gradient is the gradient of the whole loss in
which one row's (or token's) log-probabilities alone are alive. Scales and offsets are the textbook formulas, written
out once more. Base weights are 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcprobe.types import Observable, Params, Rollouts, TokenScores

#: A loss as a function of log-probabilities and entropies `[B, T]`.
Loss = Callable[[Tensor, Tensor], Tensor]
State = Mapping[str, Tensor]


class Parts(NamedTuple):
    """One leaf's step, `Δθ = scale ⊙ g + momentum + decay`."""

    scale: Tensor | float
    momentum: Tensor | float
    decay: Tensor | float


def walk(module: nn.Module, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies `[B, T]` with their graph, a sequence at a time."""
    logps, entropies = [], []
    rows, width = rollouts.completion_mask.shape
    for b in range(rows):
        length, start = int(rollouts.attention_mask[b].sum()), int(rollouts.prompt_lengths[b])
        ids = rollouts.ids[b, :length]
        out = module(ids[None])
        logits = getattr(out, "logits", out)[0] / float(rollouts.temperature[b])
        logp, h = [torch.zeros((), dtype=torch.float64)] * width, [torch.zeros((), dtype=torch.float64)] * width
        for t in range(width):
            if bool(rollouts.completion_mask[b, t]):
                p = torch.softmax(logits[start + t - 1].double(), -1)
                logp[t] = torch.log(p[ids[start + t]])
                h[t] = -(p * torch.log(p)).sum()
        logps.append(torch.stack(logp))
        entropies.append(torch.stack(h))
    return torch.stack(logps), torch.stack(entropies)


def gradient(module: nn.Module, rollouts: Rollouts, loss: Loss, alive: Tensor | None = None) -> Params:
    """Return the gradient of the loss in which the scores `alive` `[B, T]` alone have a derivative; None for all."""
    logp, h = walk(module, rollouts)
    if alive is not None:
        logp, h = (torch.where(alive, x, x.detach()) for x in (logp, h))
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss(logp, h), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def one_row(rollouts: Rollouts, row: int, token: int | None = None) -> Tensor:
    """Return where `[B, T]` a sequence stands, or one token of it."""
    alive = torch.zeros_like(rollouts.completion_mask)
    alive[row, slice(None) if token is None else token] = True
    return alive


def clip(whole: Params, bound: float | None) -> float:
    """Return the factor of clipping by the global norm."""
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in whole.values()))
    return 1.0 if bound is None or norm + 1e-6 <= bound else bound / (norm + 1e-6)


def sgd(
    theta: Tensor,
    state: State,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    decay: float = 0.0,
) -> Parts:
    """SGD on `d = g + decay θ`: `buf′ = momentum buf + (1 − dampening) d`, and Nesterov's `d + momentum buf′`."""
    buffer = state["momentum_buffer"]
    of_d, of_buffer = 1 - dampening, momentum
    if nesterov:
        of_d, of_buffer = 1 + momentum * (1 - dampening), momentum * momentum
    return Parts(-lr * of_d, -lr * of_buffer * buffer, -lr * of_d * decay * theta)


def adam(
    theta: Tensor,
    clipped: Tensor,
    state: State,
    *,
    lr: float,
    decay: float = 0.0,
    coupled: bool = False,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Parts:
    """Adam, with decay coupled (in the gradient) or AdamW's; the denominator at its value after this gradient."""
    t = int(state["step"]) + 1
    d = clipped + (decay * theta if coupled else 0.0)
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2
    denominator = torch.sqrt(second / (1 - beta2**t)) + eps
    rate = lr / (1 - beta1**t)
    scale = -rate * (1 - beta1) / denominator
    momentum = -rate * beta1 * state["exp_avg"] / denominator
    return Parts(scale, momentum, scale * decay * theta if coupled else -lr * decay * theta)


def share(covector: Params, parts: Mapping[str, Parts], k: float, g: Params) -> float:
    """Return `Σ_n ⟨∇F_n, k · scale_n ⊙ g_n⟩`."""
    return sum(float((c * k * parts[n].scale * g[n]).sum()) for n, c in covector.items())


def cotangents(observable: Observable, at: TokenScores, rollouts: Rollouts) -> TokenScores:
    """Return ∂F/∂s by plain autograd on the scores."""
    leaves = [x.clone().requires_grad_() for x in (at.logp, at.entropy, *at.extra.values())]
    named = dict(zip(at.extra, leaves[2:], strict=True))
    value = observable(TokenScores(leaves[0], leaves[1], named), at, rollouts)
    c = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return TokenScores(c[0], c[1], dict(zip(at.extra, c[2:], strict=True)))


def richardson(f: Callable[[float], Tensor], h: float) -> Tensor:
    """Return f′(0) by central differences at h and h/2, extrapolated: the error is O(h⁴)."""
    wide, narrow = ((f(e) - f(-e)) / (2 * e) for e in (h, h / 2))
    return (4 * narrow - wide) / 3
