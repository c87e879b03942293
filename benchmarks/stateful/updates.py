"""The RL step on U, taken by a live optimizer on a live module, and the step as a buffer keyed by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from funcprobe.errors import InputError
from funcprobe.types import Microbatch, Rollouts

from .losses import targets, token_losses
from .scoring import gathered, pieces, token_log_probs, token_logp

#: How many entries of a leaf are widened to float64 at once.
CHUNK = 2**22


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a step moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def accumulate_loss_gradient(module: nn.Module, rollouts: Rollouts, objective: str, microbatch: Microbatch) -> None:
    """Add the gradient of the loss to `.grad`, a backward pass per microbatch.

    The weights of the whole batch's tokens scale the loss, so the sum over microbatches is the loss of the batch.
    """
    advantages, weights, old_logps = targets(objective, rollouts)
    for rows, part in pieces(rollouts, microbatch):
        logp = token_logp(token_log_probs(module, part), part)
        old = None if old_logps is None else gathered(old_logps, rows, part)
        losses = token_losses(objective, logp, gathered(advantages, rows, part), old)
        (gathered(weights, rows, part) * losses).sum().backward()


def optimizer_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, lr: float | None
) -> float:
    """Clip `.grad`, take one step, and return the learning rate used (the first group's, where groups differ).

    `lr` takes the place of every group's for this step and is put back, whatever happens.

    Raises:
        InputError: If the learning rate is no usable number, or 0 in every group: the step would then be none.
    """
    _check_lr(optimizer, lr)
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(trainable(module).values(), max_grad_norm)
    backup = [group["lr"] for group in optimizer.param_groups]
    try:
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = float(lr)
        optimizer.step()
        return float(optimizer.param_groups[0]["lr"])
    finally:
        for group, before in zip(optimizer.param_groups, backup, strict=True):
            group["lr"] = before


def param_update(module: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Δθ = after − before by name over the trainable leaves, where `before` is, in float32 or wider."""
    found = {}
    with torch.no_grad():
        for name, p in trainable(module).items():
            wide = torch.promote_types(p.dtype, torch.float32)
            found[name] = p.detach().to(before[name].device, wide) - before[name].to(wide)
    return found


def dot(module: nn.Module, buffer: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return `⟨.grad, buffer⟩` and `Σ |.grad ⊙ buffer|`, in float64 on the module's device.

    Raises:
        InputError: If the buffer does not hold exactly the trainable leaves.
    """
    leaves = trainable(module)
    if leaves.keys() != buffer.keys():
        raise InputError(
            f"The buffer and the module differ in {sorted(leaves.keys() ^ buffer.keys())[:4]}; a buffer holds every "
            "trainable parameter under its name in named_parameters()."
        )
    signed, absolute = 0.0, 0.0
    for name, p in leaves.items():
        if p.grad is not None:
            total, size = _sums(p.grad, buffer[name])
            signed, absolute = signed + total, absolute + size
    return signed, absolute


def l2(buffer: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of a buffer, accumulated in float64."""
    return math.sqrt(sum(_sums(x, x)[0] for x in buffer.values()))


def _sums(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return (Σ x y, Σ |x y|) of one leaf."""
    signed, absolute = [], []
    for p, q in zip(x.flatten().split(CHUNK), y.to(x.device).flatten().split(CHUNK), strict=True):
        product = p.double() * q.double()
        signed.append(product.sum())
        absolute.append(product.abs().sum())
    return float(torch.stack(signed).sum()), float(torch.stack(absolute).sum())


def _check_lr(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    if lr is not None and not (math.isfinite(lr) and lr >= 0):
        raise InputError(f"The learning rate is {lr}; it must be finite and not negative.")
    if lr is None and all(float(group["lr"]) == 0 for group in optimizer.param_groups):
        raise InputError(
            "The optimizer's learning rate is 0 in every group, as schedules leave it at their end, and the step would "
            "move nothing; pass the learning rate to probe with as lr."
        )
