"""A policy small enough to list every completion, with exact values and derivatives by explicit loops and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import funcprobe as fp

END, SYMBOLS, LONGEST = 0, 3, 4
PROMPT = [2, 1]
TEMPERATURE = 0.7


def completions() -> list[list[int]]:
    """Return every completion: it ends with the end symbol or at the greatest length. Their probabilities sum to 1."""
    found, open_ = [], [[]]
    while open_:
        prefix = open_.pop()
        for symbol in range(SYMBOLS):
            grown = [*prefix, symbol]
            (found if symbol == END or len(grown) == LONGEST else open_).append(grown)
    return found


def walk(module: nn.Module, completion: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the log-probability and the conditional entropy of every token, one forward pass per token."""
    logps, entropies = [], []
    for t, symbol in enumerate(completion):
        out = module(torch.tensor([PROMPT + completion[:t]]))
        logits = getattr(out, "logits", out)[0, -1]
        p = torch.softmax(logits / TEMPERATURE, dim=-1)
        logps.append(torch.log(p[symbol]))
        entropies.append(-(p * torch.log(p)).sum())
    return logps, entropies


def exact(module: nn.Module) -> dict[str, Tensor]:
    """Return E[Σ h] and E[Σ h] / E[T] by summing over every completion; differentiable in the module's parameters."""
    total, length = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for completion in completions():
        logps, entropies = walk(module, completion)
        probability = torch.exp(torch.stack(logps).sum())
        total = total + probability * torch.stack(entropies).sum()
        length = length + probability * len(completion)
    return {"sequence": total, "token": total / length}


def probabilities(module: nn.Module) -> list[float]:
    """Return the exact probability of every completion."""
    with torch.no_grad():
        return [math.exp(float(torch.stack(walk(module, c)[0]).sum())) for c in completions()]


def rollouts(weight: list[float] | None = None) -> fp.Rollouts:
    """Return every completion once, with base weights."""
    listed = completions()
    return fp.rollouts_from_lists([PROMPT] * len(listed), listed, temperature=TEMPERATURE, weight=weight)


def directional(value: Callable[[], Tensor], module: nn.Module, direction: dict[str, Tensor]) -> float:
    """Return the derivative of value() along a direction, by plain autograd over the explicit sum."""
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(value(), list(named.values()), allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return sum(float((g * direction[name]).sum()) for name, g in pairs if g is not None)
