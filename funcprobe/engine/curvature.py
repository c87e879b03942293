"""Forward over reverse: second derivatives of scores along a line, weighed and summed, by another way than nesting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.data.rollouts import to_device
from funcprobe.engine.batches import Stats, each, fields, of_rows, pieces
from funcprobe.engine.forward import rows_of
from funcprobe.engine.kernels import differentiable_attention, forward_mode_errors, whole_derivative
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Leaves, Microbatch, Params, Progress, Rollouts, TokenScores


def curvature_by_reverse(
    fixed: TokenScores,
    policy: Policy,
    params: Params,
    direction: Leaves,
    rollouts: Rollouts,
    *,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "curvature",
) -> Tensor:
    """Return `Σ c·s̈` for fixed cotangents c, as `D_v ⟨v, (∂s/∂θ)ᵀ c⟩`: forward over reverse.

    It shares no derivative formula of second order with the nested forward mode of `directional`, which it checks, and
    stands in for it where that is wrong. It keeps a microbatch's graph, and no gradient: each leaf's goes into the one
    number as soon as it is there.

    Raises:
        ForwardModeError: If an operation of the model has no forward derivative.
    """
    rollouts = to_device(rollouts, policy.device)
    direction = tree.like(direction, params)
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    nothing = torch.zeros_like(total)
    with differentiable_attention(policy), whole_derivative(policy), forward_mode_errors(), phase(what):
        for rows, part in pieces(policy, rollouts, microbatch, progress, what):
            mine = rows_of(fixed, rows, part)

            def paired(
                amount: Tensor, at: Params, rows: Tensor = rows, part: Rollouts = part, mine: TokenScores = mine
            ) -> Tensor:
                moved = {name: _Moved.apply(amount, leaf, direction[name]) for name, leaf in at.items()}
                return fields(each(torch.mul, of_rows(score(policy, moved, part, stats), rows), mine)).sum()

            def slope(at: Params, paired: Callable[[Tensor, Params], Tensor] = paired) -> Tensor:
                return torch.func.grad(paired)(nothing, at)

            _, turned = torch.func.jvp(slope, (params,), (direction,))  # type: ignore[misc]
            total = total + turned.detach()
    # of parts a sum over entries is that of all processes; of whole leaves each has its own rows
    return tree.over_processes(total, params) if policy.is_sharded else world().sum_of(total)


class _Moved(torch.autograd.Function):
    """θ + x·v at x = 0, as a function of x: its value is θ, and a gradient of θ comes back as ⟨v, gradient⟩."""

    @staticmethod
    def forward(amount: Tensor, leaf: Tensor, direction: Tensor) -> Tensor:
        return leaf.view_as(leaf)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (direction,) = ctx.saved_tensors
        with torch.no_grad():  # its own graph, for a third order, would keep every gradient in float64
            return tree.dot({"": gradient}, {"": direction}), None, None

    @staticmethod
    def jvp(ctx: Any, amount: Tensor | None, leaf: Tensor, direction: Tensor | None) -> Tensor:
        return leaf.view_as(leaf)
