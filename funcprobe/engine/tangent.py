"""Is the tangent the derivative? One directional derivative of a policy against a finite difference, once.

A compiled block can lose its tangents, a custom function can have a wrong rule, and a module can detach what its output
depends on (the norm of DoRA): all of them without a word. So the first derivative that is asked of the copy of a module
is held against `s(θ + hv) − s(θ − hv)`, on the few tokens on which the copy was tried, along the very direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.data.rollouts import rollouts_from_lists, to_device
from funcprobe.engine.kernels import arithmetic, differentiable_attention
from funcprobe.policy.checks import Checks
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Params, Rollouts, TokenScores

#: The size of the two steps relative to the leaves that move: small enough for the second difference to vanish, large
#: enough for float32 (a change of some 1e-2 of scores that are rounded at 1e-7).
STEP = 1e-2

#: What a tangent may be off beside the error of the difference, relative to it: half a per cent is the third order at
#: such a step; what is lost or detached is some per cent at least.
SLACK = 5e-3

#: Rounding of one score, at most, in units of eps·(1 + |s|).
ROUNDING_UNITS = 8.0

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
        held = difference(policy, params, direction)
        if held is None:
            return True  # nothing moves, or the arithmetic is too coarse to tell: another direction may say more
        held = held if weights is None else held.weighted(weights)
        checks.tangents[mode] = _holds(mode, checks, held, tangent)
    return checks.tangents[mode]


class Difference(NamedTuple):
    """A central difference of scores, and how far it can be trusted."""

    rollouts: Rollouts
    slope: Tensor  #: [n] of every completion token
    error: float  #: its Euclidean error

    def off(self, tangent: Tensor) -> float:
        """Return by how much a tangent is off, relative to the difference; 0 within its error."""
        size = max(float(self.slope.norm()), float(tangent.norm()))
        return 0.0 if self.apart(tangent) <= self.error + SLACK * size else self.apart(tangent) / size

    def apart(self, tangent: Tensor) -> float:
        """Return the Euclidean distance of a tangent from the difference."""
        return float((tangent - self.slope).norm())

    def weighted(self, c: Tensor) -> Difference:
        """Return the difference of one weighted sum of the scores; its error is bounded by Cauchy and Schwarz."""
        # what sums to less than a tenth of its terms is told to a tenth of the slack only
        slack = 0.1 * SLACK * float((c * self.slope).norm())
        return self._replace(slope=(c @ self.slope).reshape(1), error=float(c.norm()) * self.error + slack)


def difference(policy: Policy, params: Params, direction: Params) -> Difference | None:
    """Return the central difference of the scores of a few tokens along a direction; None where there is none to take.

    Its error is thrice that between two steps, one of them half the other, and the rounding of their ends: where a
    token changes experts between the ends of the shorter one, the two differ by half of what the jump adds.
    """
    size, length = float(tree.norm(tree.select(params, direction))), float(tree.norm(direction))
    eps = arithmetic(policy, params).eps
    if not (0 < length < math.inf and size > 0) or eps > COARSEST:
        return None
    rollouts, h = few(policy), STEP * size / length
    ends = [_end(policy, params, direction, rollouts, step) for step in (h, -h, h / 2, -h / 2)]
    if not all(bool(torch.isfinite(end).all()) for end in ends):
        return None
    full, half = (ends[0] - ends[1]) / (2 * h), (ends[2] - ends[3]) / h
    rounding = ROUNDING_UNITS * eps * (1 + float(ends[2].abs().max())) * math.sqrt(len(half)) / h
    return Difference(rollouts, half, 3 * float((full - half).norm()) + 2 * rounding)


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
    rows = [[1 + (3 * k) % ids for k in range(max(2, min(n, longest)))] for n in (4, 3)]
    made = rollouts_from_lists([row[:1] for row in rows], [row[1:] for row in rows], temperature=1.0)
    return to_device(made, policy.device)


def _holds(mode: str, checks: Checks, held: Difference, tangent: Tangent) -> bool:
    """Return whether a derivative holds, trying it without and with what the module detaches.

    The two are told apart by which is nearer, however small their distance: what is detached may be a per cent.
    """
    known = checks.undetached
    checks.undetached = False
    trained = tangent(held.rollouts)
    checks.undetached = True
    whole = tangent(held.rollouts)
    nearer = held.off(whole) == 0.0 and held.apart(whole) < held.apart(trained)
    checks.undetached = known or (nearer and _share(trained, whole) > DETACHED)
    off = held.off(whole if checks.undetached else trained)
    if checks.undetached and not known:
        checks.found(
            "tangent",
            f"the module detaches what its output depends on ({_share(trained, whole):.1%} of a derivative): on E that "
            "is taken along, in the gradient on U it is left out, as training does",
        )
    checks.results[f"the {mode} derivative is the derivative"] = f"no: off by {off:.1%}" if off else "yes"
    return off == 0.0


def _share(trained: Tensor, whole: Tensor) -> float:
    return float((trained - whole).norm() / whole.norm().clamp(min=torch.finfo(whole.dtype).tiny))


def _end(policy: Policy, params: Params, direction: Params, rollouts: Rollouts, step: float) -> Tensor:
    moved = {n: tree.axpy(step, {n: direction[n]}, {n: params[n]})[n] for n in direction}
    with torch.no_grad(), differentiable_attention(policy):
        return values(score(policy, {**params, **moved}, rollouts), rollouts.completion_mask)
