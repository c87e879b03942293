"""ΔF along the path from θ to θ + Δθ, an integral in which nothing cancels; and how far a subtraction is off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.engine.passes import Passes
from funcprobe.measurement.evidence import Evidence
from funcprobe.types import Observable, Params, TokenScores

#: Node counts of the rules that are tried in turn; the rule before the first is the left end alone, which is δF₁.
RULES = (1, 2, 3, 4, 6, 8, 12)

#: Rounding of the difference of two scores, at most, in units of eps·(1 + |s|): that of one is measured at up to 5 on
#: GPT-2 of 2 to 8 layers, with the kernels of AVX-512, of AVX2 and of neither.
ROUNDING_UNITS = 10.0

EPS64 = torch.finfo(torch.float64).eps


class Path(NamedTuple):
    """Scores at θ + Δθ, as an integral in which nothing cancels."""

    scores: TokenScores  #: [B, T]
    nodes: int  #: of the Gauss–Legendre rule that was used
    errors: dict[str, float]  #: |ΔF by this rule − ΔF by the one before|: that one's error, a cautious estimate
    reached: float  #: the largest of them, relative to Σ|terms|
    converged: bool  #: whether that is within the tolerance


def path(
    passes: Passes,
    params: Params,
    direction: Params,
    along: engine.Directional,
    observables: Mapping[str, Observable],
    tolerance: float,
    eps: float = EPS64,
) -> Path:
    """Return the scores at θ + Δθ by the first quadrature rule that agrees with the one before it.

    `s(θ + Δθ) = s(θ) + ∫₀¹ ṡ(θ + uΔθ) du`, with ṡ the tangents along Δθ: n nodes are n forward-mode passes over E. A
    change of a score is a sum of derivatives, as accurate relative to itself as these are, where a subtraction of two
    float32 evaluations is off by rounding of the scores themselves. What an observable makes of the scores is float64.
    Rules agree when, for every observable, they differ by at most `tolerance · Σ|terms|`. The first is compared with
    the tangent at θ, which the first order has paid for. `eps` is that of the model's arithmetic: a path is no better.
    """
    anchor = along.scores
    known = engine.each(torch.add, anchor, along.tangents)
    for n in RULES:
        found = engine.each(torch.add, anchor, _integral(n, passes, params, direction))
        evidence = [Evidence(passes.evaluation, anchor, after) for after in (known, found)]
        changes = {name: [float(e.change(o)) for e in evidence] for name, o in observables.items()}
        sizes = {name: evidence[1].magnitude(o) for name, o in observables.items()}
        # two rules may agree to the last digit: a tangent is rounded all the same, and so is F(θ′) − F(θ) in float64
        floors = {n: eps * sizes[n] + EPS64 * abs(float(evidence[1].before(o))) for n, o in observables.items()}
        errors = {name: max(abs(new - old), floors[name]) for name, (old, new) in changes.items()}
        reached = max(
            (errors[n] / sizes[n] for n, o in observables.items() if sizes[n] > evidence[1].noise(o)), default=0.0
        )
        if reached <= tolerance:
            return Path(found, n, errors, reached, True)
        known = found
    return Path(found, n, errors, reached, False)


def _integral(n: int, passes: Passes, params: Params, direction: Params) -> TokenScores:
    """Return `Σ_k w_k ṡ(θ + u_k Δθ)` over the nodes of the n-point Gauss–Legendre rule on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)  # on [−1, 1]
    total: TokenScores | None = None
    for node, weight in zip((x + 1) / 2, w / 2, strict=True):
        at = along_line(params, direction, float(node))
        tangents = passes.directional(at, direction, "E along the path").tangents
        term = engine.each(lambda t, weight=weight: float(weight) * t, tangents)
        total = term if total is None else engine.each(torch.add, total, term)
    assert total is not None
    return total


def along_line(params: Params, direction: Params, s: float) -> Params:
    """Return θ + sΔθ, added in float64 and rounded once to the dtype of the parameters."""
    return tree.map_(lambda p, v: (p.double() + s * v.double()).to(p.dtype), params, direction)


def subtraction_error(evidence: Evidence, observable: Observable, eps: float) -> float:
    """Return an estimate of the float error of `F(θ′) − F(θ)` by two evaluations: `√((Σ_it c r)² + Σ_i (Σ_t c r̄)²)`.

    c are the cotangents at θ′ and `r = s(θ′) − s(θ) − ṡ` is what the tangents do not explain of the difference of two
    scores: rounding and curvature. Where |r| is at most `10 eps (1 + |s|)` it is taken for rounding, and the first sum
    is the error itself, whatever the kernels are and however much of it the sequences share. Beyond that r is curvature
    and says nothing of rounding: the first sum leaves it out, and r̄ is r capped there. The second sum is a random walk
    over sequences i, of which the first may happen to end near 0.
    """
    assert evidence.along is not None
    c = engine.cotangents(evidence.of(observable), evidence.after)

    def by_row(c: Tensor, after: Tensor, before: Tensor, slope: Tensor) -> Tensor:
        cap = ROUNDING_UNITS * eps * (1 + before.abs())
        unexplained = after - before - slope
        rounding = torch.where(unexplained.abs() <= cap, unexplained, 0.0)
        return torch.stack([(c * rounding).sum(1), (c * unexplained.clamp(-cap, cap)).sum(1)])

    parts: TokenScores = engine.each(by_row, c, evidence.after, evidence.anchor, evidence.along.tangents)
    shared, walk = engine.fields(parts).sum(0)
    return math.hypot(float(shared.sum()), float(walk.norm()))
