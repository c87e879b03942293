"""A policy small enough to list every completion, with exact values and derivatives by explicit loops and autograd."""

from __future__ import annotations

import math

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


#: Distributions of the next symbol by what stands before it.
Seen = dict[tuple[int, ...], Tensor]


def walk(module: nn.Module, completion: list[int], seen: Seen) -> tuple[list[Tensor], list[Tensor]]:
    """Return the log-probability and the conditional entropy of every token, one forward pass per beginning."""
    logps, entropies = [], []
    for t, symbol in enumerate(completion):
        before = tuple(completion[:t])
        if before not in seen:
            out = module(torch.tensor([[*PROMPT, *before]]))
            logits = getattr(out, "logits", out)[0, -1]
            seen[before] = torch.softmax(logits / TEMPERATURE, dim=-1)
        p = seen[before]
        logps.append(torch.log(p[symbol]))
        entropies.append(-(p * torch.log(p)).sum())
    return logps, entropies


def exact(module: nn.Module) -> dict[str, Tensor]:
    """Return exact functionals by summing over every completion; differentiable in the module's parameters.

    E[Σ h] ("sequence"), E[Σ h] / E[T] ("token"), E[R] ("reward") and E[T] ("length").
    """
    total, length, earned = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    seen: Seen = {}
    for completion in completions():
        logps, entropies = walk(module, completion, seen)
        probability = torch.exp(torch.stack(logps).sum())
        total = total + probability * torch.stack(entropies).sum()
        length = length + probability * len(completion)
        earned = earned + probability * reward(completion)
    return {"sequence": total, "token": total / length, "reward": earned, "length": length}


def divergences(module: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    """Return KL(module‖before) and KL(before‖module) over completions, both differentiable in the module alone."""
    of_after, of_before = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    seen: Seen = {}
    seen_before: Seen = {}
    for completion in completions():
        logp = torch.stack(walk(module, completion, seen)[0]).sum()
        with torch.no_grad():
            reference = torch.stack(walk(before, completion, seen_before)[0]).sum()
        of_after = of_after + torch.exp(logp) * (logp - reference)
        of_before = of_before + torch.exp(reference) * (reference - logp)
    return {"kl(after‖before)": of_after, "kl(before‖after)": of_before}


def reward(completion: list[int]) -> float:
    """Return a reward without any symmetry: every symbol counts by where it stands, and nothing averages to 0."""
    return sum(0.3 * symbol * (position + 1) ** 2 - 0.4 for position, symbol in enumerate(completion)) + 0.7


def probabilities(module: nn.Module) -> list[float]:
    """Return the exact probability of every completion."""
    seen: Seen = {}
    with torch.no_grad():
        return [math.exp(float(torch.stack(walk(module, c, seen)[0]).sum())) for c in completions()]


def rollouts(weight: list[float] | None = None) -> fp.Rollouts:
    """Return every completion once, with base weights and rewards."""
    listed, earned = completions(), [reward(completion) for completion in completions()]
    prompts = [PROMPT] * len(listed)
    return fp.rollouts_from_lists(prompts, listed, temperature=TEMPERATURE, weight=weight, rewards=earned)


def derivatives(value: Tensor, module: nn.Module, direction: dict[str, Tensor]) -> tuple[float, float]:
    """Return the first and second derivative of value along a direction, by plain autograd over the explicit sum."""

    def along(x: Tensor) -> Tensor:
        named = dict(module.named_parameters())
        gradients = torch.autograd.grad(x, list(named.values()), create_graph=True, allow_unused=True)
        pairs = zip(named, gradients, strict=True)
        return sum((g * direction[name]).sum() for name, g in pairs if g is not None)  # type: ignore[return-value]

    first = along(value)
    return first.item(), along(first).item()
