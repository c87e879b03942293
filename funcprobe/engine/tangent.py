"""Is the tangent the derivative? One directional derivative of a policy against a finite difference, once.

A compiled block can lose its tangents, a custom function can have a wrong rule, and a module can detach what its output
depends on (the norm of DoRA): all of them without a word. So the first derivative that is asked of the copy of a module
is held against `s(θ + hv) − s(θ − hv)`, on the few tokens on which the copy was tried, along the very direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.data.rollouts import rollouts_from_lists, to_device
from funcprobe.engine.kernels import arithmetic, differentiable_attention
from funcprobe.errors import percent
from funcprobe.policy.checks import Checks
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Params, Rollouts, TokenScores

#: The larger of two steps, as a part of the leaves that move and in nats of the score that moves most, whichever is
#: less; the smaller one is a quarter of it. So what is seen is some 1e-3 nats, of scores that float32 rounds at 1e-7.
STEP, STEP_OF_SCORES = 1e-2, 1e-2

#: What a tangent may be off beside rounding, relative to the difference: what is lost is some per cent at least.
SLACK = 5e-3

#: Between the steps, what a difference itself is off by falls to about a quarter or less (kinks, curvature), and what a
#: jump adds to it grows fourfold; a tangent that is wrong is as far off at either, within this factor.
STEADY = 1.25

#: Rounding of one score in units of eps·(1 + |s|), as far as a sum of some of them goes.
ROUNDING_UNITS = 4.0

#: Arithmetic coarser than this has no finite difference to speak of.
COARSEST = 1e-4

#: Two tangents are different ones above this fraction: float32 forward passes round theirs by some 1e-6.
DETACHED = 1e-4

#: ṡ of some rollouts along the direction in question, as `values` lays it out.
Tangent = Callable[[Rollouts], Tensor]


def hold(
    mode: str, policy: Policy, params: Params, direction: Params, tangent: Tangent, weights: Tensor | None = None
) -> bool:
    """Return whether the derivative that a mode takes of a policy is right, finding it out once.

    Where it is right only with what the module detaches taken along, it is taken so from now on, with a note. With
    `weights` the tangent is one number, that weighted sum of the scores'.
    """
    checks = policy.checks
    if checks is None:
        return True
    if mode not in checks.tangents:
        if not _can_be_told(policy, params, direction):
            return True  # nothing moves, or the arithmetic is too coarse: another direction may say more
        found = _tangents(checks, lambda: tangent(few(policy)))
        moves = float(found[0].abs().max() if weights is None else found[0].abs() / weights.abs().sum())
        held = difference(policy, params, direction, moves)
        if held is None:
            return True
        held = held if weights is None else held.weighted(weights)
        checks.tangents[mode] = _holds(mode, checks, held, found)
    return checks.tangents[mode]


class Difference(NamedTuple):
    """Central differences of scores at two steps."""

    coarse: Tensor  #: [n] at the larger step
    fine: Tensor  #: [n] at the smaller one
    rounding: float  #: the Euclidean error of the finer one by rounding

    def off(self, tangent: Tensor) -> float:
        """Return by how much a tangent is off, relative to the difference; 0 where that may be the difference's."""
        near, far = self.apart(tangent), float((tangent - self.coarse).norm())
        size = max(float(self.fine.norm()), float(tangent.norm()))
        if near <= self.rounding + SLACK * size or not far / STEADY <= near <= far * STEADY:
            return 0.0
        return near / size

    def apart(self, tangent: Tensor) -> float:
        """Return the Euclidean distance of a tangent from the finer difference."""
        return float((tangent - self.fine).norm())

    def weighted(self, c: Tensor) -> Difference:
        """Return the differences of one weighted sum of the scores; rounding is bounded by Cauchy and Schwarz."""
        # what sums to less than its terms is told to a tenth of their slack
        slack = 0.1 * SLACK * float((c * self.fine).norm())
        coarse, fine = ((c @ slope).reshape(1) for slope in (self.coarse, self.fine))
        return Difference(coarse, fine, float(c.norm()) * self.rounding + slack)


def difference(policy: Policy, params: Params, direction: Params, moves: float) -> Difference | None:
    """Return central differences of the scores of a few tokens along a direction; None where one end is not finite.

    `moves` is how fast the fastest of these scores moves, by the tangent that is to be held: it sizes the steps.
    """
    size, length = float(tree.norm(tree.select(params, direction))), float(tree.norm(direction))
    largest = STEP * size / length
    h = min(largest, STEP_OF_SCORES / moves) if moves > 0 else largest
    rollouts, found, scores = few(policy), [], 0.0
    for step in (h, h / 4):
        ends = [_end(policy, params, direction, rollouts, sign * step) for sign in (1, -1)]
        if not all(bool(torch.isfinite(end).all()) for end in ends):
            return None
        scores = float(ends[0].abs().max())
        found.append((ends[0] - ends[1]) / (2 * step))
    rounding = ROUNDING_UNITS * arithmetic(policy, params).eps * (1 + scores) * math.sqrt(len(found[1])) / (h / 4)
    return Difference(found[0], found[1], rounding)


def _tangents(checks: Checks, take: Callable[[], Tensor]) -> list[Tensor]:
    """Return the tangent as training takes it, and, where the module detaches something, with that taken along."""
    known, found = checks.undetached, []
    try:
        for undetached in (False, True) if checks.detaches and not known else (known,):
            checks.undetached = undetached
            found.append(take())
    finally:
        checks.undetached = known
    return found


def _can_be_told(policy: Policy, params: Params, direction: Params) -> bool:
    """Return whether anything moves, in arithmetic that has differences to speak of."""
    moves = 0 < float(tree.norm(direction)) < math.inf and float(tree.norm(tree.select(params, direction))) > 0
    return moves and arithmetic(policy, params).eps <= COARSEST


def values(scores: TokenScores, mask: Tensor) -> Tensor:
    """Return the log-probabilities and entropies of the completion tokens as one vector."""
    return torch.cat([scores.logp[mask], scores.entropy[mask]]).detach()


def zeros_of(rollouts: Rollouts) -> TokenScores:
    """Return scores of 0 for some rollouts."""
    zero = torch.zeros(rollouts.completion_mask.shape, dtype=torch.float64, device=rollouts.ids.device)
    return TokenScores(zero, zero)


def few(policy: Policy) -> Rollouts:
    """Return two rows of a few small ids, none of them 0."""
    ids, longest = max(1, min(policy.vocab_size, 64) - 1), policy.max_length or 4
    rows = [[1 + k % ids for k in range(max(2, min(n, longest)))] for n in (4, 3)]
    made = rollouts_from_lists([row[:1] for row in rows], [row[1:] for row in rows], temperature=1.0)
    return to_device(made, policy.device)


def _holds(mode: str, checks: Checks, held: Difference, found: Sequence[Tensor]) -> bool:
    """Return whether a derivative holds, as training takes it or, where there are two, with the detached part included.

    The two are told apart by which is nearer, however small their distance: what is detached may be a per cent.
    """
    trained, whole = found[0], found[-1]
    nearer = held.off(whole) == 0.0 and held.apart(whole) < held.apart(trained)
    if nearer and _share(trained, whole) > DETACHED:
        checks.undetached = True
        checks.found(
            "tangent",
            f"the module detaches what its output depends on ({percent(_share(trained, whole))} of a derivative): on "
            "E that is taken along, in the gradient on U it is left out, as training does",
        )
    off = held.off(whole if checks.undetached else trained)
    checks.results[f"the {mode} derivative is the derivative"] = f"no: off by {percent(off)}" if off else "yes"
    return off == 0.0


def _share(trained: Tensor, whole: Tensor) -> float:
    return float((trained - whole).norm() / whole.norm().clamp(min=torch.finfo(whole.dtype).tiny))


def _end(policy: Policy, params: Params, direction: Params, rollouts: Rollouts, step: float) -> Tensor:
    moved = {n: tree.axpy(step, {n: direction[n]}, {n: params[n]})[n] for n in direction}
    with torch.no_grad(), differentiable_attention(policy):
        return values(score(policy, {**params, **moved}, rollouts), rollouts.completion_mask)
