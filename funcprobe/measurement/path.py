"""ΔF along the path from θ to θ + Δθ, an integral in which nothing cancels; and how far a subtraction is off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.engine.passes import Passes
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.line import Line, radau, tangents_along, walk
from funcprobe.types import Leaves, Observable, Params, TokenScores

#: How many nodes beside θ the rules have that are tried in turn; the rule before the first is θ alone, which is δF₁.
RULES = (1, 2, 3, 4, 6, 8, 12)

#: Rounding of the difference of two scores, at most, in units of eps·(1 + |s|): that of one is measured at up to 5 on
#: GPT-2 of 2 to 8 layers, with the kernels of AVX-512, of AVX2 and of neither.
ROUNDING_UNITS = 10.0

EPS64 = torch.finfo(torch.float64).eps


class Path(NamedTuple):
    """Scores at θ + Δθ, as an integral in which nothing cancels."""

    scores: TokenScores  #: [B, T]
    nodes: int  #: of the Radau rule that was used, beside θ
    errors: dict[str, float]  #: of ΔF by this rule, estimated from the rule before it
    reached: float  #: the largest of them, relative to Σ|terms|
    converged: bool  #: whether that is within the tolerance


def path(
    passes: Passes,
    params: Params,
    direction: Leaves,
    along: engine.Directional,
    observables: Mapping[str, Observable],
    tolerance: float,
    eps: float = EPS64,
    rules: Sequence[int] = RULES,
) -> Path:
    """Return the scores at θ + Δθ by the first quadrature rule that is as good as the tolerance.

    `s(θ + Δθ) = s(θ) + ∫₀¹ ṡ(θ + uΔθ) du`, with ṡ the tangents along Δθ: n nodes beside θ are n forward-mode passes
    over E. A change of a score is a sum of derivatives, as accurate relative to itself as these are, where a
    subtraction of two float32 evaluations is off by rounding of the scores themselves. What an observable makes of the
    scores is float64. The tangents at θ, which the first order has paid for, are the rule of no node: how far one node
    is from it tells the error of one node (see `_by_one_node`). Of later rules each has the difference from the one
    before for its error, cautiously. A rule is good where that is at most `tolerance · Σ|terms|` for every observable;
    where none is, the last one is returned. `eps` is that of the model's arithmetic: a path is no better.
    """
    assert rules
    before, tangents_at = Line.straight(along), tangents_along(passes, params, direction)
    for n in rules:
        line = walk(along, radau(n), tangents_at)
        old, new = (Evidence(passes.evaluation, along.scores, known.scores(1.0)) for known in (before, line))
        errors, reached = {}, 0.0
        for name, o in observables.items():
            size = new.magnitude(o)
            off = (
                _by_one_node(size, new.magnitude(o, since=old.after))
                if n == 1
                else abs(float(new.change(o)) - float(old.change(o)))
            )
            # two rules may agree to the last digit: a tangent is rounded all the same, and F(θ′) − F(θ) in float64 too
            errors[name] = max(off, eps * size + EPS64 * abs(float(new.before(o))))
            reached = max(reached, errors[name] / size if size > new.noise(o) else 0.0)
        found = Path(new.after, n, errors, reached, reached <= tolerance)
        if found.converged:
            break
        before = line
    return found


def _by_one_node(size: float, changed: float) -> float:
    """Return an upper estimate of the error of ΔF by the rule of one node beside θ, `r³ Σ|terms|`.

    r is what the node changed, `Σ|c (s₁ − s₀)| / Σ|c (s₁ − s)|`, without cancellation between tokens. Were ṡ a
    geometric series along the path, `1 + ρu + ρ²u² + …`, then r = ρ/2 + O(ρ²), and the rule, exact to u², would be off
    by `∫u³ − ¾ (⅔)³ = .028` of ρ³, or .22 r³: the estimate is four times that.
    """
    r = changed / size if size else 0.0
    return size * min(r, r**3)


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
