"""Forward mode: scores with their tangents, once or twice, and derivatives of functions of scores made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcprobe import tree
from funcprobe.data.rollouts import to_device
from funcprobe.engine.batches import Stats, detached, each, finite, gather, of_rows, pieces
from funcprobe.engine.constants import ConstantOperands
from funcprobe.engine.kernels import (
    OnceDifferentiable,
    TrainedRows,
    forward_arithmetic,
    forward_mode_errors,
    whole_derivative,
)
from funcprobe.engine.tangent import hold, values
from funcprobe.errors import ForwardModeError
from funcprobe.parallel.phases import phase
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Leaves, Microbatch, Params, Progress, Rollouts, TokenScores

#: A scalar function of the scores of a batch.
Functional = Callable[[TokenScores], Tensor]


class Directional(NamedTuple):
    """The scores of a batch along a line of parameter space, `s(θ + εv) = s + ε ṡ + ½ε² s̈ + …`."""

    scores: TokenScores  #: [B, T], s
    tangents: TokenScores  #: [B, T], ṡ
    curvatures: TokenScores | None = None  #: [B, T], s̈, where the second order was asked for

    def scaled(self, c: float) -> Directional:
        """Return the same along `c·v`."""
        tangents = each(lambda x: c * x, self.tangents)
        curved = None if self.curvatures is None else each(lambda x: c * c * x, self.curvatures)
        return Directional(self.scores, tangents, curved)


def directional(
    policy: Policy,
    params: Leaves,
    direction: Leaves,
    rollouts: Rollouts,
    *,
    order: Literal[1, 2] = 1,
    as_training: bool = False,
    leaves: Collection[str] | None = None,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "forward-mode derivative",
) -> Directional:
    """Return the scores of a batch and their tangents along `direction`, by one forward-mode pass.

    `ṡ = (∂s/∂θ) v`, with v taken in the dtype of the parameters, and with `order=2` also `s̈ = (∂²s/∂θ²)[v, v]` by
    nesting. Nothing is stored for a backward pass. Attention runs in a fused kernel with tangents by blocks, at order 2
    in torch's math kernel a block of queries at a time: its memory does not grow with the square of the length.
    `as_training` leaves out what reading the row `padding_idx` of an embedding contributes, as torch's backward pass
    does: the tangents are then the transpose of a training loop's gradient. With `leaves` only these move, which costs
    less: what does not move has no tangent product.

    Raises:
        InputError: If `leaves` names a leaf that is not there.
        ForwardModeError: If an operation of the model has no forward derivative; the message names the module.
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    whole = tree.map_(Tensor.detach, params)
    moving, run = _moving(policy, whole, leaves, stats)
    direction = direction if leaves is None else tree.select(direction, moving)
    halves = any(p.dtype == torch.float16 for p in moving.values())
    size = _binary_size(direction) if halves else 1.0
    direction = tree.map_(lambda v, p: (v if size == 1.0 else v / size).to(p.device, p.dtype), direction, moving)
    if not as_training:
        _check_tangent(policy, whole, direction)
    found: list[tuple[Tensor, Directional]] = []
    with _pushing(policy, order, as_training):
        with phase(what):
            for rows, part in pieces(policy, rollouts, microbatch, progress, what):
                along = of_rows(_push(partial(run, rollouts=part), moving, direction, order), rows)
                finite(along.scores, rows, what)
                found.append((rows, along))
        fields = Directional._fields[: 1 + order]
        unit = Directional(*(gather([(rows, getattr(a, f)) for rows, a in found], rollouts) for f in fields))
        return unit if size == 1.0 else unit.scaled(size)


def directional_of_many(
    policy: Policy,
    params: Leaves,
    directions: Sequence[Leaves],
    rollouts: Rollouts,
    *,
    as_training: bool = False,
    leaves: Collection[str] | None = None,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "forward-mode derivatives",
) -> list[Directional]:
    """Return the result of `directional` for each of K directions, from one pass: vmap over the tangents.

    The scores at θ are computed once, and the weights read once, for all of them: 1 + 2K forward passes in place of 3K.
    Tangents of activations and directions take K times the memory. A float16 model goes one direction at a time.

    Raises:
        InputError: If `leaves` names a leaf that is not there.
        ForwardModeError: If an operation of the model has no forward derivative; the message names the module.
        NumericsError: If a score is not finite; the message names the sequences.
    """
    given: dict[str, Any] = {"as_training": as_training, "leaves": leaves, "stats": stats, "microbatch": microbatch}
    given |= {"progress": progress, "what": what}
    if len(directions) == 1 or any(p.dtype == torch.float16 for p in params.values()):
        return [directional(policy, params, v, rollouts, **given) for v in directions]
    rollouts = to_device(rollouts, policy.device)
    whole = tree.map_(Tensor.detach, params)
    moving, run = _moving(policy, whole, leaves, stats)
    stacked = {n: torch.stack([v[n].to(device=p.device, dtype=p.dtype) for v in directions]) for n, p in moving.items()}
    if not as_training:
        _check_tangent(policy, whole, {name: each[0] for name, each in stacked.items()})
    found: list[list[tuple[Tensor, Directional]]] = [[] for _ in directions]
    with _pushing(policy, 1, as_training):
        with phase(what):
            for rows, part in pieces(policy, rollouts, microbatch, progress, what):
                at = partial(run, rollouts=part)

                def push(v: Params, at: Callable[..., TokenScores] = at) -> tuple[TokenScores, TokenScores]:
                    return torch.func.jvp(at, (moving,), (v,))  # type: ignore[return-value]  # v -> s, ṡ

                s, tangents = torch.vmap(push, out_dims=(None, 0))(stacked)  # type: ignore[arg-type]
                s = finite(of_rows(s, rows), rows, what)
                for k, own in enumerate(found):
                    own.append((rows, Directional(s, of_rows(each(lambda x, k=k: x[k], tangents), rows))))
        scored = gather([(rows, along.scores) for rows, along in found[0]], rollouts)
        return [Directional(scored, gather([(rows, a.tangents) for rows, a in own], rollouts)) for own in found]


def _moving(
    policy: Policy, params: Params, leaves: Collection[str] | None, stats: Stats | None
) -> tuple[Params, Callable[..., TokenScores]]:
    """Return the leaves that move, and the scores as a function of them."""
    if leaves is None:
        return params, partial(score, policy, stats=stats)
    moving = tree.select(params, leaves)
    # a Parameter is how a layer tells what is frozen (see kernels.OnceDifferentiable)
    fixed = {name: nn.Parameter(p, requires_grad=False) for name, p in params.items() if name not in moving}
    return moving, lambda at, rollouts: score(policy, {**params, **fixed, **at}, rollouts, stats)


@contextmanager
def _pushing(policy: Policy, order: Literal[1, 2], as_training: bool) -> Iterator[None]:
    """Hold a policy to forward mode of that order, with the settings of the stack that each order needs."""
    once = OnceDifferentiable() if order == 1 else nullcontext()
    trained = TrainedRows() if as_training else whole_derivative(policy)
    kernels = forward_arithmetic(policy, order)
    with ConstantOperands(), kernels, once, trained, torch.set_grad_enabled(order == 2), forward_mode_errors():
        yield


def _check_tangent(policy: Policy, params: Params, direction: Params) -> None:
    """Hold the first tangent that is asked of a policy against a finite difference.

    Raises:
        ForwardModeError: If it is not the derivative, or there is none.
    """

    def tangent(rollouts: Rollouts) -> Tensor:
        moving, run = _moving(policy, tree.map_(Tensor.detach, params), direction, None)
        with _pushing(policy, 1, as_training=False):
            along = _push(partial(run, rollouts=rollouts), moving, direction, 1)
        return values(along.tangents, rollouts.completion_mask)

    if not hold("forward", policy, params, direction, tangent):
        raise ForwardModeError(
            "The forward derivative of the model is not its derivative: on a few tokens it disagrees with a finite "
            "difference, so some operation loses or mistakes it (a compiled block, a custom function); use "
            'mode="reverse".'
        )


def _binary_size(direction: Leaves) -> float:
    """Return the power of 2 next to the largest entry: scaling by it is exact, and keeps float16 off its floor."""
    largest = max((float(v.abs().max()) for v in direction.values() if v.numel()), default=0.0)
    return 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _push(run: Callable[..., TokenScores], params: Params, direction: Params, order: int) -> Directional:
    def once(at: Params) -> tuple[TokenScores, TokenScores]:
        return torch.func.jvp(run, (at,), (direction,))  # type: ignore[return-value]  # θ -> s, ṡ

    if order == 1:
        return Directional(*once(params))
    (s, ds), (_, dds) = torch.func.jvp(once, (params,), (direction,))  # type: ignore[misc]
    return Directional(s, ds, dds)


def derivative(f: Functional, along: Directional) -> tuple[Tensor, Tensor]:
    """Return `f(s)` and `Df(s)[ṡ]` for scores and tangents that `directional` returned; no model is run."""
    with ConstantOperands():
        value, slope = torch.func.jvp(f, (along.scores,), (along.tangents,))  # type: ignore[misc]
    return value, slope


def second_derivative(f: Functional, along: Directional) -> Tensor:
    """Return `d²/dε² f(s(ε))` at 0, that is `f″[ṡ, ṡ] + f′·s̈`, from the result of `directional(order=2)`."""
    return derivatives(f, along)[1]


def derivatives(f: Functional, along: Directional) -> tuple[Tensor, Tensor]:
    """Return `f′·ṡ` and `f″[ṡ, ṡ] + f′·s̈`, the first and second derivative along the line, from one nested pass."""
    assert along.curvatures is not None, "the second order was not asked for"

    def slope(s: TokenScores, ds: TokenScores) -> Tensor:
        return torch.func.jvp(f, (s,), (ds,))[1]  # s, ṡ -> f′·ṡ

    at, toward = (along.scores, along.tangents), (along.tangents, along.curvatures)
    with ConstantOperands():
        first, second = torch.func.jvp(slope, at, toward)  # type: ignore[misc]
    return first, second


def cotangents(f: Functional, at: TokenScores) -> TokenScores:
    """Return `∂f/∂s` `[B, T]` at the scores; no model is run."""
    return torch.func.grad(f)(detached(at))


def contributions(f: Functional, along: Directional) -> TokenScores:
    """Return `∂f/∂s ⊙ ṡ`, token by token and field by field: all of them sum to `Df(s)[ṡ]`."""
    return each(torch.mul, cotangents(f, along.scores), along.tangents)


def rows_of(whole: TokenScores, rows: Tensor, part: Rollouts) -> TokenScores:
    """Return the slice of the whole batch's fields that belongs to the rows of a microbatch."""
    width = part.completion_mask.shape[1]
    return each(lambda x: x[rows.to(x.device), :width], whole)
