"""Beyond the first order: the curvature along a step, and ΔF as an integral in which nothing cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.analysis.diagnostics import Clock
from funcprobe.analysis.evidence import Evidence
from funcprobe.analysis.passes import DEFAULT_MICROBATCH, Passes
from funcprobe.data.rollouts import take
from funcprobe.errors import InputError, NumericsError
from funcprobe.policy.module import Policy
from funcprobe.types import Microbatch, Observable, Params, Progress, Rollouts, TokenScores

#: Node counts of the rules that are tried in turn; the rule before the first is the left end alone, which is δF₁.
RULES = (1, 2, 3, 4, 6, 8, 12)

#: Rounding of the difference of two scores, at most, in units of eps·(1 + |s|): that of one is measured at up to 5 on
#: GPT-2 of 2 to 8 layers, with the kernels of AVX-512, of AVX2 and of neither.
ROUNDING_UNITS = 10.0

EPS64 = torch.finfo(torch.float64).eps

#: Sequences, and completion tokens of each, on which nested forward mode is held against forward over reverse.
CHECKED_SEQUENCES, CHECKED_TOKENS = 4, 64


class SecondOrder(NamedTuple):
    """The expansion of one observable along Δθ to second order."""

    first_order: float  #: δF₁ = DF[Δθ]
    second_order: float  #: δF₂ = ½ D²F[Δθ, Δθ]
    mode: Literal["forward", "reverse"]  #: nested forward mode, or forward over reverse
    disagreement: float  #: |nested − forward over reverse| / Σ|terms| on the sequences that were checked
    magnitude: float  #: Σ|terms| of the first order: what its rounding is relative to

    @property
    def crossover(self) -> float:
        """The multiple of Δθ at which |δF₂| = |δF₁|; infinite where there is no curvature."""
        return abs(self.first_order / self.second_order) if self.second_order else math.inf

    @property
    def linear_until(self) -> float:
        """The multiple of Δθ at which first order is 5 % off: a twentieth of the crossover."""
        return self.crossover / 20


def second_order(
    observable: Observable,
    policy: Policy,
    params: Params,
    direction: Params,
    evaluation: Rollouts,
    *,
    mode: Literal["auto", "forward", "reverse"] = "auto",
    microbatch: Microbatch = DEFAULT_MICROBATCH,
    progress: Progress | None = None,
) -> SecondOrder:
    """Return δF₁ and `δF₂ = ½ D²F(θ)[Δθ, Δθ]` of an observable along a direction Δθ.

    `D²F[v, v] = f″[ṡ, ṡ] + f′·s̈` with ṡ, s̈ from nested forward mode: one pass, nothing stored. Forward over reverse
    gives `f′·s̈` by other formulas; on the beginnings of a few sequences, with fixed cotangents, the two are always held
    against each other, and where they disagree, because an operation's second derivative is wrong, `mode="auto"` takes
    forward over reverse throughout. Reverse over forward would not do as a check: it shares the first-order forward
    formulas, which is where torch's `layer_norm` is at fault (see `engine.kernels`).

    Raises:
        ForwardModeError: If an operation of the model has no forward derivative.
        NumericsError: With `mode="forward"`, if the two disagree.
    """
    passes = Passes.over(policy, evaluation, {observable.name: observable}, microbatch, progress, Clock())
    evaluation = passes.evaluation
    found, disagreement = curved(passes, params, direction, engine.arithmetic(policy, params).eps, mode)
    evidence = Evidence(evaluation, found.scores, found.scores, found)
    magnitude = float(engine.fields(engine.contributions(evidence.of(observable), found)).abs().sum())
    first = float(evidence.first_order(observable))
    if found.curvatures is not None:
        second = float(evidence.second_order(observable))
    else:
        second = second_by_reverse(passes, params, direction, observable, found)
    used: Literal["forward", "reverse"] = "reverse" if found.curvatures is None else "forward"
    return SecondOrder(first, second, used, disagreement, magnitude)


def curved(
    passes: Passes,
    params: Params,
    direction: Params,
    eps: float,
    mode: Literal["auto", "forward", "reverse"] = "auto",
) -> tuple[engine.Directional, float]:
    """Return the scores with ṡ and s̈, and by how much a check of s̈ failed; without s̈ where it cannot be trusted.

    `eps` is that of the model's arithmetic, in whose terms the check is judged.

    Raises:
        InputError: If the mode is unknown.
        NumericsError: With `mode="forward"`, if the check fails.
    """
    if mode not in ("auto", "forward", "reverse"):
        raise InputError(f"Unknown mode '{mode}' of the second order; expected 'auto', 'forward' or 'reverse'.")
    if mode == "reverse":
        return passes.directional(params, direction, "E, forward mode"), 0.0
    found = passes.directional(params, direction, "E, second order", order=2)
    off = _disagreement(passes, params, direction, found)
    if off <= max(1e-3, 4 * eps):
        return found, off
    if mode == "forward":
        raise NumericsError(
            f"Nested forward mode and forward over reverse disagree by {off:.1e} of the size of their terms: an "
            "operation of the model has a wrong second derivative; use mode='auto' or 'reverse'."
        )
    return found._replace(curvatures=None), off


def second_by_reverse(
    passes: Passes, params: Params, direction: Params, observable: Observable, along: engine.Directional
) -> float:
    """Return δF₂ with `f′·s̈` by forward over reverse: a reverse-mode graph a microbatch, and no error bar."""
    f = Evidence(passes.evaluation, along.scores, along.scores).of(observable)
    flat = along._replace(curvatures=engine.each(torch.zeros_like, along.scores))
    bent = passes.curvature_by_reverse(engine.cotangents(f, along.scores), params, direction, "E, forward over reverse")
    return 0.5 * (float(engine.second_derivative(f, flat)) + bent)


def _disagreement(passes: Passes, params: Params, direction: Params, found: engine.Directional) -> float:
    """Return how far Σ c·s̈ of a few beginnings is from forward over reverse, relative to Σ|c·s̈|.

    The cotangents are drawn once and for all, so that no observable that happens to have none hides a fault. The
    policy is causal: the beginning of a sequence is scored as it is in the whole.
    """
    assert found.curvatures is not None
    rows, few = _beginnings(passes.evaluation)
    shape, draw = few.completion_mask.shape, torch.Generator().manual_seed(0)
    bent = engine.each(lambda x: x[rows.to(x.device), : shape[1]], found.curvatures)
    fixed = engine.each(lambda x: torch.randn(shape, generator=draw, dtype=torch.float64).to(x.device), bent)
    by_reverse = passes._replace(evaluation=few, progress=None).curvature_by_reverse(
        fixed, params, direction, "check of the second order"
    )
    terms = engine.fields(engine.each(torch.mul, fixed, bent))
    size = float(terms.abs().sum())
    return abs(float(terms.sum()) - by_reverse) / size if size else abs(by_reverse)


def _beginnings(rollouts: Rollouts) -> tuple[Tensor, Rollouts]:
    """Return the rows of the shortest sequences, and their first tokens: a graph of them is small at any length."""
    rows = rollouts.attention_mask.sum(1).argsort(stable=True)[:CHECKED_SEQUENCES]
    few = take(rollouts, rows)
    columns = int(few.prompt_lengths.max()) + CHECKED_TOKENS
    return rows, Rollouts(
        few.ids[:, :columns],
        few.attention_mask[:, :columns],
        few.prompt_lengths,
        few.completion_mask[:, :CHECKED_TOKENS],
        few.temperature,
        few.group_ids,
        few.weight,
    )


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
